"""Benchmarks by name: what they are (`registry`), their arms (`arms`), a grid of cells (`grid`), the whole (`run`).

Import the module you need; this one stays empty so that `import gen_invariance` is cheap.
"""
