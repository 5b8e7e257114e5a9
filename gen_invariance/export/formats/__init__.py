"""Formats that a labelled image set is kept in."""
