"""Distributed training: parallel dimensions, collectives, and sharded models."""
