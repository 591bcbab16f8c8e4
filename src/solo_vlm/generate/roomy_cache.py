"""Keys and values with room for those to come, so that a token does not copy all that were before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

_ROOM = 256  # tokens


def roomy_cache() -> Cache:
    """An empty cache like transformers' `DynamicCache`, which copies everything for every token.

    All layers are kept whole, also those whose attention is a sliding window.
    """
    return Cache(layer_class_to_replicate=RoomyLayer)


def has_full_attention(config: PreTrainedConfig) -> bool:
    """Whether every layer of a decoder reads all that was before, so that keeping layers whole costs nothing.

    Args:
        config: of the decoder.
    """
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


class RoomyLayer(DynamicLayer):
    """One layer's keys and values: the beginning of a stretch of memory that is longer than they are."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys = self._key_room = key_states[..., :0, :]
        self.values = self._value_room = value_states[..., :0, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append states, (batch, heads, new, head size); return all, (batch, heads, length, head size)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self._key_room = _append(self.keys, key_states, self._key_room)
        self.values, self._value_room = _append(self.values, value_states, self._value_room)
        return self.keys, self.values


def _append(past: Tensor, new: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """Past and new states as one tensor, and the memory whose beginning that is: `room`, or a longer one."""
    known, length = past.shape[-2], past.shape[-2] + new.shape[-2]
    moved = past.data_ptr() != room.data_ptr()  # by whoever reorders or repeats the rows of a batch
    if moved or room.shape[-2] < length:
        room = new.new_empty((*new.shape[:-2], length + _ROOM, new.shape[-1]))
        room[..., :known, :] = past
    room[..., known:length, :] = new
    return room[..., :length, :], room
