"""What is read off the measurements: stability, gains along the order, predictors, curricula."""
