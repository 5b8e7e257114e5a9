"""Flow matching from a content view."""
