"""Hand-written nuisances: class-agnostic transformations, batched, behind one protocol."""
