"""Which rows of a benchmark a model may have seen: images by perceptual hash, questions by runs of words."""
