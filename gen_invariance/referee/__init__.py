"""The referee: which augmentation helps on a data set, found by simulated tails in its own training images."""
