"""Publishing: a trained model becomes a folder that loads anywhere, with a model card, on the hub."""
