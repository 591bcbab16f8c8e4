"""How Megatron-LLM cuts and fuses the weights of a Llama-like decoder, and how that is undone.

- The rows of some weights, the columns of others, are dealt to the tensor-parallel ranks in order.
- `query_key_value` holds, for each key/value head: its query heads, the key head, the value head.
- Rows within a query or key head are interleaved (0, d/2, 1, d/2 + 1, ...): Megatron-LLM rotates pairs of
  neighbours where transformers rotates the two halves.
- `dense_h_to_4h` of a rank is its rows of the up projection, then its rows of the gate.
- The vocabulary is padded, so that it can be dealt evenly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from solo_vlm.convert.tensors import PlannedTensor, StoredTensor
from solo_vlm.utils.errors import SoloError


@dataclass(frozen=True)
class Cut:
    """How one weight of a decoder is found in Megatron's.

    Attributes:
        name: Megatron's, without "layers.N.".
        axis: along which ranks hold parts: 0 (rows), 1 (columns), or None (all hold the whole).
        fused_rows: rows of Megatron's whole tensor where it holds more than this weight; None: as many as
            this weight has, or more (padding, at the end).
        take: this weight's share of one rank's part.
    """

    name: str
    axis: int | None = 0
    fused_rows: int | None = None
    take: Callable[[Tensor], Tensor] = lambda part: part

    def plan(self, name: str, shape: tuple[int, ...], parts: Sequence[StoredTensor]) -> PlannedTensor:
        """The weight `name` of this `shape`, put together when it is written.

        Raises:
            SoloError: a part has the wrong shape or type (naming file and key).
        """
        for part in parts:
            if not self._fits(part, shape, len(parts)) or part.dtype != parts[0].dtype:
                raise SoloError(
                    f"{part.file}: {part.key} is {part.dtype} {list(part.shape)}, which cannot be a part in "
                    f"{len(parts)} of {name} with the shape {list(shape)}"
                )
        return PlannedTensor(name, parts[0].dtype, shape, lambda: self._join(parts, shape))

    def _fits(self, part: StoredTensor, shape: tuple[int, ...], ranks: int) -> bool:
        if self.axis is None:
            return part.shape == shape
        if len(part.shape) != 2 or part.shape[1] * (ranks if self.axis == 1 else 1) != shape[1]:
            return False
        rows = part.shape[0] * (ranks if self.axis == 0 else 1)
        return rows >= shape[0] if self.fused_rows is None else rows == self.fused_rows

    def _join(self, parts: Sequence[StoredTensor], shape: tuple[int, ...]) -> Tensor:
        if self.axis is None:
            return parts[0].read()
        joined = torch.empty(shape, dtype=parts[0].dtype)
        done = 0
        for part in parts:  # one in memory at a time
            share = self.take(part.read())
            room = min(share.shape[self.axis], shape[self.axis] - done)  # less than the share where it pads
            joined.narrow(self.axis, done, room).copy_(share.narrow(self.axis, 0, room))
            done += room
        return joined


@dataclass(frozen=True)
class FusedAttention:
    """Grouped queries, keys and values in one weight: numbers of heads, and the size of one."""

    heads: int
    key_value_heads: int
    head_dim: int
    interleaved: bool

    @property
    def rows(self) -> int:
        """Rows of the whole fused weight."""
        return (self.heads + 2 * self.key_value_heads) * self.head_dim

    def query(self, part: Tensor) -> Tensor:
        """(fused rows of a rank, hidden) to its query rows."""
        return self._rotated(self._groups(part)[:, :-2])

    def key(self, part: Tensor) -> Tensor:
        """(fused rows of a rank, hidden) to its key rows."""
        return self._rotated(self._groups(part)[:, -2:-1])

    def value(self, part: Tensor) -> Tensor:
        """(fused rows of a rank, hidden) to its value rows."""
        return self._groups(part)[:, -1].flatten(0, 1)

    def _groups(self, part: Tensor) -> Tensor:
        per_group = self.heads // self.key_value_heads + 2
        return part.unflatten(0, (-1, per_group, self.head_dim))  # (groups, per_group, head_dim, hidden)

    def _rotated(self, heads: Tensor) -> Tensor:
        """(groups, n, head_dim, hidden) to rows, each head's in transformers' order."""
        if self.interleaved:
            pairs = heads.unflatten(2, (self.head_dim // 2, 2))  # (groups, n, head_dim / 2, 2, hidden)
            heads = pairs.transpose(2, 3).flatten(2, 3)
        return heads.flatten(0, 2)


def model_cuts() -> dict[str, Cut]:
    """Cuts of the weights outside of layers, by this project's names."""
    return {
        "model.language_model.embed_tokens.weight": Cut("word_embeddings"),
        "model.embed_vision_patch.weight": Cut("embed_vision_patch"),
        "model.language_model.norm.weight": Cut("final_layernorm", axis=None),
        "lm_head.weight": Cut("lm_head"),
    }


def layer_cuts(attention: FusedAttention, intermediate_size: int) -> dict[str, Cut]:
    """Cuts of the weights of a layer, by transformers' names."""
    fused = "self_attention.query_key_value"
    mlp = "mlp.dense_h_to_4h"
    return {
        "input_layernorm.weight": Cut("input_layernorm", axis=None),
        "post_attention_layernorm.weight": Cut("post_attention_layernorm", axis=None),
        "self_attn.q_proj.weight": Cut(fused, 0, attention.rows, attention.query),
        "self_attn.k_proj.weight": Cut(fused, 0, attention.rows, attention.key),
        "self_attn.v_proj.weight": Cut(fused, 0, attention.rows, attention.value),
        "self_attn.o_proj.weight": Cut("self_attention.dense", axis=1),
        "mlp.up_proj.weight": Cut(mlp, 0, 2 * intermediate_size, lambda part: part.chunk(2)[0]),
        "mlp.gate_proj.weight": Cut(mlp, 0, 2 * intermediate_size, lambda part: part.chunk(2)[1]),
        "mlp.down_proj.weight": Cut("mlp.dense_4h_to_h", axis=1),
    }
