"""Share of the model that each process of a run holds, and the activation checkpointing of its layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from transformers import PreTrainedConfig

from solo_vlm.models.flops import ModelShape
from solo_vlm.models.load import model_without_weights
from solo_vlm.train.activation_checkpointing import LayerModes
from solo_vlm.train.estimate.activations import Activations
from solo_vlm.train.parallel.context import ParallelDims
from solo_vlm.train.parallel.tensor_parallel import Exchange, keep_share, list_exchanges
from solo_vlm.train.parallel.vocabulary import can_split_head
from solo_vlm.train.recipe import Recipe


@dataclass(frozen=True)
class Layout:
    """A model on the processes of a run.

    Attributes:
        shape: Whole model.
        own: Share of one process of a tensor-parallel group, before FSDP shards it. In some families
            attention or state-space layers are whole in every process, or only their weights are split.
        dims: Parallel dimensions.
        modes: Activation checkpointing of the layers.
        tokens: Tokens of a packed sequence that a process computes.
        activations: Memory that the layers keep for these.
        exchanges: Values per token that processes that split layers exchange.
    """

    shape: ModelShape
    own: ModelShape
    dims: ParallelDims
    modes: LayerModes
    tokens: int
    activations: Activations
    exchanges: tuple[Exchange, ...] = ()

    @classmethod
    def of(
        cls, config: PreTrainedConfig, recipe: Recipe, dims: ParallelDims, known: Layout | None = None
    ) -> Self:
        """Count a model that tensor parallelism supports; with "auto", every layer is checkpointed at first.

        Args:
            known: Layout of the same model and precision, with counts to use again.

        Raises:
            SoloError: See `ModelShape.of`.
        """
        mode, tokens = recipe.activation_checkpointing, recipe.data.sequence_length // dims.cp
        shape = known.shape if known else ModelShape.of(config)
        modes = LayerModes.uniform("full" if mode == "auto" else mode, shape.layers)
        if known and known.dims.tp == dims.tp:
            return cls(shape, known.own, dims, modes, tokens, known.activations, known.exchanges)
        dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        activations = Activations(config, dtype, dims.tp)
        if dims.tp == 1:
            return cls(shape, shape, dims, modes, tokens, activations)
        exchanges = tuple(list_exchanges(model_without_weights(config)))
        return cls(shape, _share(config, shape, dims.tp), dims, modes, tokens, activations, exchanges)

    @property
    def replicated(self) -> float:
        """Parameters that every process of a tensor-parallel group has."""
        own, whole, tp = self.own.parameters.total, self.shape.parameters.total, self.dims.tp
        return (tp * own - whole) / (tp - 1) if tp > 1 else 0  # own = split / tp + replicated


def _share(config: PreTrainedConfig, shape: ModelShape, tp: int) -> ModelShape:
    own = ModelShape.of(config, partial(keep_share, size=tp))
    if not (shape.patch and can_split_head(shape.vocabulary, shape.tied, tp)):  # a plain LLM's is not split
        return own
    parameters = replace(own.parameters, head=own.parameters.head // tp)
    return replace(own, vocabulary=own.vocabulary // tp, parameters=parameters)


def layer_weights(shape: ModelShape) -> float:
    """Return the parameters of one layer."""
    counts = shape.parameters
    return (counts.attention + counts.mlp + counts.norms - shape.hidden) / shape.layers  # but the last norm


def outside_weights(shape: ModelShape) -> int:
    """Return the parameters outside layers."""
    counts = shape.parameters
    return counts.embedding + counts.patch_embedding + counts.head + shape.hidden
