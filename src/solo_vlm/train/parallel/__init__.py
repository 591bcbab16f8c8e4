"""Distributed training: process layout, collectives, and sharded models."""
