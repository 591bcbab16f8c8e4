"""Convert checkpoints of the original SOLO code and of Megatron-LLM to model folders, and back.

One tensor is in memory at a time.

May import: models, utils.
"""
