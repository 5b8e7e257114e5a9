"""Formats a labelled image set is kept in."""
