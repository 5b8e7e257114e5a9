"""Records of measured results, their summary over seeds, and the report page.

`records` holds and summarises, `tables` arranges, `figures` draws (the only importer of matplotlib), `report` writes
the page. Import the module you need; this one stays empty so that `import gen_invariance` is cheap.
"""
