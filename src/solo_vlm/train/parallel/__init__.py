"""Several processes: how they are laid out, what they tell each other, how a model is sharded."""
