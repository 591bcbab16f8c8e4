"""Many runs: the launcher, scaling sweeps and laws, ablations.

Imports `train`, `generate`, `evaluate`, `quickstart` and what these import.
"""
