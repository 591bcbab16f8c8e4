"""Many commands side by side, such as training runs: on this machine, or on a Ray cluster."""
