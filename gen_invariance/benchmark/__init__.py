"""Benchmarks by name, grids of their cells, and the demonstration."""
