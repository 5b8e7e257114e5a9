"""Readers of image sets, by name."""
