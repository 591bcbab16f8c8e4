"""Inspection of data before training: statistics, verification, samples as the model sees them."""
