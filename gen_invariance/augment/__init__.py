"""Giving the nuisance to the tail: `policy` (class size to probability) and `stage` (the kornia module)."""
