"""Contamination: benchmark rows in training data, found by perceptual hashes of images and by n-grams."""
