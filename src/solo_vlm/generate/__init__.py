"""Generation: streamed or batched answers to chats, and a cache of shared prompt prefixes.

May import: data, models, utils.
"""

from solo_vlm.generate.cache import PrefixCache
from solo_vlm.generate.pipeline import (
    BatchGenerator,
    ContextError,
    GenerationOutput,
    GenerationPipeline,
    GenerationRequest,
    check_prompt,
    open_images,
    user_turn,
)

__all__ = [
    "BatchGenerator",
    "ContextError",
    "GenerationOutput",
    "GenerationPipeline",
    "GenerationRequest",
    "PrefixCache",
    "check_prompt",
    "open_images",
    "user_turn",
]
