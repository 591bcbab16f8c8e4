"""Checkpoints of the release and of Megatron become folders of this project, tensor by tensor, and back."""
