"""Keys and values of earlier prompts: what a new prompt has in common with them is not computed again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_GROWTH = 256  # tokens allocated beyond the current length

Prompt = NDArray[np.int64]
_States = list[tuple[Tensor, Tensor]]  # keys and values of each layer, (1, heads, length, head size)


class PrefixCache:
    """What the decoder has computed for the prompts of one model, as a radix tree over their tokens.

    Prompts that begin alike share what they have in common, such as the image that ten questions are about.
    Where memory runs out, the branch that has not been used for longest goes first (Zheng et al. 2024,
    "SGLang", section 3). Layers with a sliding window are kept at full length, because a beginning must be
    whole to be gone on from; their masks honour the window all the same.

    It belongs to one model, and several threads may use it.

    Args:
        max_bytes: of keys and values, on the model's device. One token of a 7B model with 8 key-value heads
            takes 128 KiB in bfloat16, an image of 1024 x 1024 pixels 132 MiB.
    """

    def __init__(self, max_bytes: int = 2**31) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._root = _Node(np.empty(0, np.int64), [], None)
        self._clock = count()
        self._lock = Lock()

    def find(self, prompt: Prompt) -> tuple[int, Cache]:
        """The longest known beginning of a prompt.

        Args:
            prompt: see `prompt_key`.

        Returns:
            How many tokens it has, always fewer than the prompt, and a cache of its own with their keys and
            values.
        """
        with self._lock:
            path = self._path(prompt[:-1])
            pieces = [node.states(agreeing) for node, agreeing in path]
        cache = preallocated_cache()
        for layers in pieces:
            for index, (keys, values) in enumerate(layers):
                cache.update(keys, values, index)
        return sum(agreeing for _, agreeing in path), cache

    def add(self, tokens: Prompt, cache: Cache) -> None:
        """Keep what was computed for a prompt and its answer.

        Args:
            tokens: of `prompt_key`, and the ids of the answer.
            cache: filled from one that `find` returned; it may lack the last tokens.
        """
        tokens = tokens[: cache.get_seq_length()]
        with self._lock:
            path = self._path(tokens)
            known = sum(agreeing for _, agreeing in path)
            if known == len(tokens):
                return
            node, agreeing = path[-1] if path else (self._root, 0)
            if agreeing < len(node.tokens):
                node.split(agreeing)
            states = [(layer.keys, layer.values) for layer in cache.layers]
            leaf = node.grow(tokens[known:], _cut(states, slice(known, len(tokens))), next(self._clock))
            self.bytes += leaf.bytes
            self._evict()

    def _path(self, tokens: Prompt) -> list[tuple[_Node, int]]:
        """The nodes that hold the beginning of the tokens, each with how many of its own agree."""
        path: list[tuple[_Node, int]] = []
        node, done, now = self._root, 0, next(self._clock)
        while done < len(tokens) and (child := node.children.get(int(tokens[done]))) is not None:
            agreeing = _agreeing(child.tokens, tokens[done:])
            child.used = now
            path.append((child, agreeing))
            if agreeing < len(child.tokens):
                break
            node, done = child, done + agreeing
        return path

    def _evict(self) -> None:
        while self.bytes > self.max_bytes:
            leaf = min(self._root.leaves(), key=lambda node: node.used)
            self.bytes -= leaf.bytes
            leaf.drop()


def supports_prefix_cache(config: PreTrainedConfig) -> bool:
    """Whether a decoder's past is keys and values of attention alone: recurrent states cannot be cut.

    Args:
        config: of the decoder.
    """
    layers = DynamicCache(config=config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def prompt_key(inputs: Mapping[str, Any], image_token_id: int) -> Prompt:
    """What tells prompts apart: token ids, and in the place of patches a digest of their whole image.

    So prompts with different images part at the first patch, and none ever within an image.

    Args:
        inputs: of one chat: `input_ids` (1, length), and `pixel_values` and `image_grid_thw` where there are
            images.
        image_token_id: of `<vpatch>`.

    Returns:
        (length,) int64; digests are negative.
    """
    tokens: Prompt = inputs["input_ids"][0].cpu().numpy().copy()
    if "pixel_values" in inputs:
        patches, grids = inputs["pixel_values"].cpu().numpy(), inputs["image_grid_thw"].cpu().numpy()
        sizes = grids.prod(axis=1)
        images = np.split(patches, sizes.cumsum()[:-1])
        digests = [_digest(image, grid) for image, grid in zip(images, grids, strict=True)]
        tokens[tokens == image_token_id] = np.repeat(digests, sizes)
    return tokens


def drop_cached_images(inputs: Mapping[str, Any], known: Prompt) -> dict[str, Any]:
    """Model inputs of a prompt whose beginning is in the cache: patches that it holds are left out.

    Args:
        inputs: of one chat.
        known: the beginning of its `prompt_key`.
    """
    patches = int((known < 0).sum())
    if not patches:
        return dict(inputs)
    grids = inputs["image_grid_thw"]
    rest = grids[int((grids.prod(-1).cumsum(0) <= patches).sum()) :]
    vision = {"pixel_values": inputs["pixel_values"][patches:], "image_grid_thw": rest} if len(rest) else {}
    text = {name: inputs[name] for name in inputs if name not in ("pixel_values", "image_grid_thw")}
    return {**text, **vision}


@dataclass
class _Node:
    """A stretch of tokens with their keys and values, after that of its parent."""

    tokens: Prompt
    layers: _States
    parent: _Node | None
    used: int = 0
    children: dict[int, _Node] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(states.nbytes for layer in self.layers for states in layer)

    def states(self, length: int) -> _States:
        """Of the first tokens."""
        return [(keys[..., :length, :], values[..., :length, :]) for keys, values in self.layers]

    def grow(self, tokens: Prompt, layers: _States, used: int) -> _Node:
        """A new child."""
        child = self.children[int(tokens[0])] = _Node(tokens, layers, self, used)
        return child

    def split(self, length: int) -> None:
        """Keep so many tokens; the rest, with all that follows, becomes a child."""
        children, self.children = self.children, {}
        rest = self.grow(self.tokens[length:], _cut(self.layers, slice(length, None)), self.used)
        rest.children = children
        for child in children.values():
            child.parent = rest
        self.tokens, self.layers = self.tokens[:length], _cut(self.layers, slice(length))

    def drop(self) -> None:
        assert self.parent is not None
        del self.parent.children[int(self.tokens[0])]

    def leaves(self) -> Iterator[_Node]:
        waiting = list(self.children.values())
        while waiting:
            node = waiting.pop()
            if not node.children:
                yield node
            waiting += node.children.values()


def _cut(layers: _States, part: slice) -> _States:
    """A part of the keys and values, in memory of its own, so that the others can be given back."""
    return [(keys[..., part, :].clone(), values[..., part, :].clone()) for keys, values in layers]


def _agreeing(one: Prompt, other: Prompt) -> int:
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def _digest(image: NDArray[Any], grid: NDArray[np.int64]) -> int:
    """A negative number of 63 bits that stands for the patches of an image and their arrangement."""
    return -1 - (int.from_bytes(blake2b(grid.tobytes() + image.tobytes(), digest_size=8).digest()) >> 1)


def preallocated_cache() -> Cache:
    """An empty cache like transformers' `DynamicCache`, which copies everything for every token.

    All layers are kept whole, also those whose attention is a sliding window.
    """
    return Cache(layer_class_to_replicate=PreallocatedLayer)


def has_full_attention(config: PreTrainedConfig) -> bool:
    """Whether every layer of a decoder reads all that was before, so that keeping layers whole costs nothing.

    Args:
        config: of the decoder.
    """
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values: the beginning of a stretch of memory that is longer than they are."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys = self._key_buffer = key_states[..., :0, :]
        self.values = self._value_buffer = value_states[..., :0, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append states, (batch, heads, new, head size); return all, (batch, heads, length, head size)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self._key_buffer = _append(self.keys, key_states, self._key_buffer)
        self.values, self._value_buffer = _append(self.values, value_states, self._value_buffer)
        return self.keys, self.values


def _append(past: Tensor, new: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """Past and new states as one tensor, and the memory whose beginning that is: `room`, or a longer one."""
    known, length = past.shape[-2], past.shape[-2] + new.shape[-2]
    moved = past.data_ptr() != room.data_ptr()  # by whoever reorders or repeats the rows of a batch
    if moved or room.shape[-2] < length:
        room = new.new_empty((*new.shape[:-2], length + _GROWTH, new.shape[-1]))
        room[..., :known, :] = past
    room[..., known:length, :] = new
    return room[..., :length, :], room
