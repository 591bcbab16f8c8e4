"""Makes vLLM know SOLO models: the entry point `solo` in the group `vllm.general_plugins`."""

from __future__ import annotations

_ARCHITECTURE = "SoloForConditionalGeneration"
# vLLM's own wrapper of a transformers model: its attention, its paged cache, our layers.
_BACKEND = "vllm.model_executor.models.transformers:TransformersMultiModalForCausalLM"


def register() -> None:
    """Register the architecture. vLLM calls this in each of its processes, maybe more than once.

    The Auto classes know SOLO as soon as this package is imported.
    """
    from vllm import ModelRegistry

    if _ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(_ARCHITECTURE, _BACKEND)
