"""How far results of another device may be from the CPU's."""

ROUNDED = {"rtol": 2e-2, "atol": 5e-3}
"""Kernels of a GPU add in another order; Adam's first steps are as large as its rate, however small a gradient is."""

WARPED = {"rtol": 1e-3, "atol": 1e-4}
"""Of the pretended device where images are warped: elsewhere than on a CPU the inverses are written out."""
