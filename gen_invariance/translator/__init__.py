"""Learned nuisances. Import from the modules: `munit`, `spatial`, `fit`, `load` (diffusers is slow to import)."""
