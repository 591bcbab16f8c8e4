"""Answers of a SOLO model: as a stream, in batches, or about every image of a folder."""

from solo_vlm.generate.answerer import Answerer, ContextError, Reply
from solo_vlm.generate.chats import check_prompt, open_images, user_turn
from solo_vlm.generate.prefix_cache import PrefixCache

__all__ = ["Answerer", "ContextError", "PrefixCache", "Reply", "check_prompt", "open_images", "user_turn"]
