"""Cost and quality as functions of size: FLOPs of SOLO and LLaVA, sweeps, scaling laws and their plots."""
