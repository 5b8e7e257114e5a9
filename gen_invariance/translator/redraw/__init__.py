"""A translator that redraws an image with the tone, stroke, pose and place of another."""
