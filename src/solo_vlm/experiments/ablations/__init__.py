"""Ablations: pipelines of training stages that differ in one or two settings, over several seeds."""
