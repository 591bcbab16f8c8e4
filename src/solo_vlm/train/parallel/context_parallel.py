"""Context parallelism (Ulysses): each process computes a slice of every packed row.

Everything but attention computes each token by itself, so a process needs only its slice of a row. For
attention, an all-to-all gives it the whole row for its share of the heads, and another one its slice for all
heads (Jacobs et al. 2023, "DeepSpeed Ulysses").
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig, PreTrainedModel

from solo_vlm.models.load import model_without_weights
from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.models.packed.rotary import depends_on_length
from solo_vlm.utils.errors import SoloError


def context_parallel_obstacle(config: PreTrainedConfig, size: int = 2, tensor: int = 1) -> str | None:
    """Return why the rows of a model cannot be divided among `size` processes; None if they can.

    Args:
        config: Configuration of a SOLO model or a plain LLM; no weights are needed.
        tensor: Processes that split the heads already.
    """
    text_config = config.get_text_config(decoder=True)
    model = model_without_weights(config)
    try:
        treatments = isolate_documents(model)
    except SoloError as error:
        return str(error)
    for name, treatment in treatments.items():
        if treatment != "packed attention":
            return f"{name} looks at other tokens in another way than transformers' attention interface"
    if getattr(text_config, "attention_chunk_size", None):
        return "its attention is chunked"
    if any(depends_on_length(module) for module in model.modules()):
        return "its rotary embeddings depend on the length of documents"
    heads = text_config.num_attention_heads
    if heads % (size * tensor):
        share = f" / parallel.tensor = {tensor}" if tensor > 1 else ""
        return f"its {heads} attention heads{share} are not divisible by {size}"
    return None


def check_context_parallel(config: PreTrainedConfig, size: int, tensor: int = 1) -> None:
    """Raise SoloError if the rows of a model cannot be divided among `size` processes."""
    if size > 1 and (obstacle := context_parallel_obstacle(config, size, tensor)):
        smaller = [n for n in range(1, size) if size % n == 0]
        fitting = [n for n in smaller if n == 1 or not context_parallel_obstacle(config, n, tensor)]
        family = config.get_text_config(decoder=True).model_type
        raise SoloError(
            f"parallel.context = {size}: context parallelism does not support this {family} model: "
            f"{obstacle}; set parallel.context to {' or '.join(map(str, fitting))}"
        )


def exchange_heads(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Let attention of an isolated model see whole rows, of which each process of the mesh has a slice."""
    model.packed_row.attend_across = HeadExchange(mesh)  # type: ignore[union-attr, assignment]


class HeadExchange:
    """Attention over rows whose slices lie in the processes of a mesh, in order."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._group, self._size, self._rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()

    def __call__(
        self, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        """Return attention of a slice's tokens to the whole row, (slice, num_heads, value_dim).

        Args:
            attend: Attention over a whole row, for some of the heads.
            query: (slice, num_heads, head_dim).
            key: (slice, num_key_value_heads, head_dim).
            value: (slice, num_key_value_heads, value_dim).
            sinks: (num_heads,), or None.
        """
        length, heads, _ = query.shape
        if heads % self._size:
            raise SoloError(
                f"parallel.context = {self._size} does not divide {heads} attention heads of a layer: "
                "set it to 1"
            )
        # Fewer key heads than processes: several processes get the same one.
        copies = math.lcm(key.shape[1], self._size) // key.shape[1]
        key, value = (states.repeat_interleave(copies, 1) for states in (key, value))
        parts = [states.reshape(length, self._size, -1) for states in (query, key, value)]
        sizes = [part.shape[-1] for part in parts]
        sent = torch.cat(parts, -1).transpose(0, 1).flatten(0, 1)  # (processes * slice, features)
        received = self._exchange(sent).split(sizes, -1)  # (row, features) each
        q, k, v = (
            part.unflatten(-1, (-1, states.shape[-1]))
            for part, states in zip(received, (query, key, value), strict=True)
        )
        own = None if sinks is None else sinks.chunk(self._size)[self._rank]
        attended = attend(q, k, v, own)  # (row, heads / processes, value_dim)
        of_slice = self._exchange(attended).unflatten(0, (self._size, length))
        return of_slice.transpose(0, 1).flatten(1, 2)

    def _exchange(self, states: Tensor) -> Tensor:
        """Send the i-th part of the first dimension to process i; return what all sent, in order."""
        return all_to_all_single_autograd(states.contiguous(), None, None, self._group)
