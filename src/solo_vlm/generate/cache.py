"""Key-value caches: one preallocated for new tokens, and one that shares prefixes between prompts."""

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
from transformers import MODEL_MAPPING, Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from solo_vlm.models.solo.modeling_solo import takes_dynamic_cache

_SPARE_TOKENS = 256  # allocated beyond the current length

Prompt = NDArray[np.int64]
_KeyValues = list[tuple[Tensor, Tensor]]  # keys and values per layer, (1, heads, length, head_dim)


class PrefixCache:
    """Keys and values of one model's earlier prompts, as a radix tree over their tokens.

    Prompts share the nodes of their common prefix, such as the image that ten questions are about. When
    memory runs out, the least recently used branch is evicted (Zheng et al. 2024, "SGLang", section 3).
    Layers with a sliding window are kept at full length, because only a complete prefix can be continued;
    their masks still honor the window.

    Thread-safe. Use one cache per model.

    Args:
        max_bytes: Maximum size of keys and values, on the model's device. One token of a 7B model with 8
            key-value heads takes 128 KiB in bfloat16, an image of 1024 x 1024 pixels 132 MiB.
    """

    def __init__(self, max_bytes: int = 2**31) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._root = _Node(np.empty(0, np.int64), [], None)
        self._clock = count()
        self._lock = Lock()

    def find(self, prompt: Prompt) -> tuple[int, Cache]:
        """Return the longest cached prefix of a prompt.

        Args:
            prompt: Result of `prompt_key`.

        Returns:
            Length of the prefix in tokens, always less than the prompt's, and a new cache with its keys
            and values.
        """
        with self._lock:
            path = self._match(prompt[:-1])
            states = [node.first(length) for node, length in path]
        cache = preallocated_cache()
        for layers in states:
            for index, (keys, values) in enumerate(layers):
                cache.update(keys, values, index)
        return sum(length for _, length in path), cache

    def add(self, tokens: Prompt, cache: Cache) -> None:
        """Keep the keys and values of a prompt and its answer.

        Args:
            tokens: Result of `prompt_key`, followed by the IDs of the answer.
            cache: Cache returned by `find`, filled since then; it may lack the last tokens.
        """
        tokens = tokens[: cache.get_seq_length()]
        with self._lock:
            path = self._match(tokens)
            cached = sum(length for _, length in path)
            if cached == len(tokens):
                return
            node, length = path[-1] if path else (self._root, 0)
            if length < len(node.tokens):
                node.split(length)
            states = [(layer.keys, layer.values) for layer in cache.layers]
            leaf = node.append(tokens[cached:], _slice(states, slice(cached, len(tokens))), next(self._clock))
            self.nbytes += leaf.nbytes
            while self.nbytes > self.max_bytes:
                oldest = min(self._root.leaves(), key=lambda node: node.last_used)
                self.nbytes -= oldest.nbytes
                oldest.remove()

    def _match(self, tokens: Prompt) -> list[tuple[_Node, int]]:
        """Return the nodes along the longest cached prefix, each with the number of its tokens that match."""
        path: list[tuple[_Node, int]] = []
        node, done, now = self._root, 0, next(self._clock)
        while done < len(tokens) and (child := node.children.get(int(tokens[done]))) is not None:
            length = _common_length(child.tokens, tokens[done:])
            child.last_used = now
            path.append((child, length))
            if length < len(child.tokens):
                break
            node, done = child, done + length
        return path


def supports_prefix_cache(config: PreTrainedConfig) -> bool:
    """Return whether a decoder's past can be cut at any token: it is the keys and values of attention alone.

    States of recurrent and convolution layers cannot be cut, and other layers keep more than keys and values.
    """
    return _cache_layers(config) <= {DynamicLayer, DynamicSlidingWindowLayer}


def prompt_key(inputs: Mapping[str, Any], image_token_id: int) -> Prompt:
    """Return the identity of a prompt: its token IDs, with a digest of the whole image for each patch.

    Prompts with different images therefore differ from the first patch on, and never within an image.

    Args:
        inputs: Model inputs of one chat: `input_ids` (1, length), and `pixel_values` and `image_grid_thw` if
            it has images.
        image_token_id: ID of the placeholder of a patch.

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


def drop_cached_images(inputs: Mapping[str, Any], prefix: Prompt) -> dict[str, Any]:
    """Return the inputs without the images that a cached prefix contains.

    Args:
        inputs: Model inputs of one chat.
        prefix: Cached prefix of the chat's `prompt_key`.
    """
    num_patches = int((prefix < 0).sum())
    if not num_patches:
        return dict(inputs)
    grids = inputs["image_grid_thw"]
    rest = grids[int((grids.prod(-1).cumsum(0) <= num_patches).sum()) :]
    vision = {"pixel_values": inputs["pixel_values"][num_patches:], "image_grid_thw": rest}
    text = {name: inputs[name] for name in inputs if name not in vision}
    return {**text, **vision} if len(rest) else text


@dataclass
class _Node:
    """A run of tokens with their keys and values, continuing those of the parent."""

    tokens: Prompt
    layers: _KeyValues
    parent: _Node | None
    last_used: int = 0
    children: dict[int, _Node] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(states.nbytes for layer in self.layers for states in layer)

    def first(self, length: int) -> _KeyValues:
        """Return the keys and values of the first `length` tokens."""
        return [(keys[..., :length, :], values[..., :length, :]) for keys, values in self.layers]

    def append(self, tokens: Prompt, layers: _KeyValues, last_used: int) -> _Node:
        """Add and return a child."""
        child = self.children[int(tokens[0])] = _Node(tokens, layers, self, last_used)
        return child

    def split(self, length: int) -> None:
        """Keep the first `length` tokens; move the rest, and the children, into a new child."""
        children, self.children = self.children, {}
        rest = self.append(self.tokens[length:], _slice(self.layers, slice(length, None)), self.last_used)
        rest.children = children
        for child in children.values():
            child.parent = rest
        self.tokens, self.layers = self.tokens[:length], _slice(self.layers, slice(length))

    def remove(self) -> None:
        assert self.parent is not None
        del self.parent.children[int(self.tokens[0])]

    def leaves(self) -> Iterator[_Node]:
        pending = list(self.children.values())
        while pending:
            node = pending.pop()
            if not node.children:
                yield node
            pending += node.children.values()


def _slice(layers: _KeyValues, part: slice) -> _KeyValues:
    # Copy: a view would keep the whole tensor in memory.
    return [(keys[..., part, :].clone(), values[..., part, :].clone()) for keys, values in layers]


def _common_length(one: Prompt, other: Prompt) -> int:
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def _digest(image: NDArray[Any], grid: NDArray[np.int64]) -> int:
    """Return a negative 63-bit digest of an image's patches and grid."""
    return -1 - (int.from_bytes(blake2b(grid.tobytes() + image.tobytes(), digest_size=8).digest()) >> 1)


def preallocated_cache() -> Cache:
    """Return an empty cache that appends tokens in place; `DynamicCache` copies everything per token.

    Every layer is kept at full length, including those with a sliding window.
    """
    return Cache(layer_class_to_replicate=_PreallocatedLayer)


def has_full_attention(config: PreTrainedConfig) -> bool:
    """Return whether every layer attends to all earlier tokens, so that full-length caches waste nothing."""
    return _cache_layers(config) <= {DynamicLayer}


def _cache_layers(config: PreTrainedConfig) -> set[type | None]:
    """Return the kinds of layers in a decoder's cache; {None} if its past is not in a `DynamicCache`."""
    if not takes_dynamic_cache(MODEL_MAPPING[type(config)]):
        return {None}
    layers = [type(layer) for layer in DynamicCache(config=config).layers]
    while layers and layers[-1] is DummyLayer:  # attends to the keys of an earlier layer
        layers.pop()
    return set(layers)


class _PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer: views of the start of longer buffers."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys = self._key_buffer = key_states[..., :0, :]
        self.values = self._value_buffer = value_states[..., :0, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append states, (batch, heads, new, head_dim); return all, (batch, heads, length, head_dim)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self._key_buffer = _append(self.keys, key_states, self._key_buffer)
        self.values, self._value_buffer = _append(self.values, value_states, self._value_buffer)
        return self.keys, self.values


def _append(past: Tensor, new: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Return past and new states as one tensor, and the buffer it is a view of: `buffer`, or a longer one."""
    cached, length = past.shape[-2], past.shape[-2] + new.shape[-2]
    replaced = past.data_ptr() != buffer.data_ptr()  # a beam search reorders or repeats rows in new memory
    if replaced or buffer.shape[-2] < length:
        buffer = new.new_empty((*new.shape[:-2], length + _SPARE_TOKENS, new.shape[-1]))
        buffer[..., :cached, :] = past
    buffer[..., cached:length, :] = new
    return buffer[..., :length, :], buffer
