"""The model, in transformers' file names: configuration, image processing, processing, modeling."""
