"""Accuracy and invariance by class, and honest statistics over seeds."""
