"""Plan of a run: parameters, steps, memory and time, before any weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from solo_vlm.data.encode import load_encoder
from solo_vlm.data.sources import Source
from solo_vlm.models.flops import Flops, ModelShape, ParameterCounts, forward_flops
from solo_vlm.models.load import load_config, model_without_weights
from solo_vlm.train.estimate.communication import (
    Collective,
    Network,
    Speed,
    collectives,
    crossing_groups,
    expected_speeds,
)
from solo_vlm.train.estimate.data import DataEstimate, estimate_data
from solo_vlm.train.estimate.host import HostMemory, host_memory
from solo_vlm.train.estimate.layout import Layout
from solo_vlm.train.estimate.memory import (
    USABLE,
    Device,
    Memory,
    memory_per_device,
    plan_layout,
    trained_parameters,
)
from solo_vlm.train.estimate.questions import QuestionEstimate, estimate_questions, forward_passes
from solo_vlm.train.experts import prepare_biases
from solo_vlm.train.parallel.context import ParallelDims
from solo_vlm.train.parallel.context_parallel import check_context_parallel
from solo_vlm.train.parallel.tensor_parallel import check_tensor_parallel
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError


@dataclass(frozen=True)
class Plan:
    """Plan of a run: its steps and requirements.

    Attributes:
        shape_from: Source of the model's configuration.
        steps: Optimizer steps; None if they depend on missing data.
        data: Estimate from a sample of the data; None if the data or the model's tokenizer are missing. Then
            one text document per sequence is assumed, which maximizes attention.
        data_missing: Reason for a missing estimate, if any.
        questions: Estimate for each file of validation questions.
        questions_missing: Reason for a missing estimate of these, if any.
        mfu: Assumed model FLOPs utilization.
        host: Main memory of one machine.
        network: Network between the devices, if it is known.
    """

    recipe: Recipe
    config: PreTrainedConfig
    layout: Layout
    shape_from: str
    device: Device
    memory: Memory
    steps: int | None
    data: DataEstimate | None
    data_missing: str
    questions: list[QuestionEstimate]
    questions_missing: str
    mfu: float
    host: HostMemory
    network: Network | None = None

    @property
    def shape(self) -> ModelShape:
        """Sizes of the whole model."""
        return self.layout.shape

    @property
    def dims(self) -> ParallelDims:
        """Parallel dimensions."""
        return self.layout.dims

    @property
    def parameters(self) -> ParameterCounts:
        """Parameters by part, without adapters."""
        return self.shape.parameters

    @property
    def trained(self) -> int:
        """Number of trainable parameters, including adapters."""
        return trained_parameters(self.shape, self.recipe)

    @property
    def tokens_per_step(self) -> int:
        """Tokens per step, including padding."""
        return self.recipe.global_batch * self.recipe.data.sequence_length

    @property
    def flops_per_step(self) -> int:
        """FLOPs of forward and backward pass over all processes, without recomputation."""
        is_frozen = self.recipe.is_decoder_frozen
        return self.forward_flops.training_frozen if is_frozen else self.forward_flops.training

    @property
    def forward_flops(self) -> Flops:
        """FLOPs of the forward pass of a step over all processes."""
        return self._forward_flops(self.shape)

    def _forward_flops(self, shape: ModelShape) -> Flops:
        length, batch = self.recipe.data.sequence_length, self.recipe.global_batch
        documents = max(round(length / self.data.document_length), 1) if self.data else 1
        vision = round(length * self.data.vision_share) if self.data else 0
        lengths = np.tile(np.diff(np.linspace(0, length, documents + 1).astype(int)), batch)
        return forward_flops(shape, lengths, batch * vision, predicted=batch * (length - vision))

    @property
    def computed_flops(self) -> dict[str, tuple[float, float]]:
        """FLOPs of a step by part, and how many of them are recomputed, over all processes.

        What tensor parallelism does not split counts once per process that computes it.
        """
        forward, tp = self._forward_flops(self.layout.own), self.dims.tp
        again = forward.recomputed_parts(self.layout.modes.recomputed)
        parts = forward.hardware_parts(self.layout.modes.recomputed, self.recipe.is_decoder_frozen)
        return {part: (tp * flops, tp * again[part]) for part, flops in parts.items()}

    @property
    def collectives(self) -> list[Collective]:
        """Collectives of a step."""
        return collectives(self.layout, self.recipe)

    @property
    def warning(self) -> str | None:
        """Fault of the layout on the network; None if there is none, or the network is not known."""
        return crossing_groups(self.dims, self.network) if self.network else None

    @property
    def speeds(self) -> tuple[Speed, Speed] | None:
        """Worst and best expected speed of a step; None if the network is not known."""
        if self.network is None:
            return None
        counts = self._forward_flops(self.layout.own), self.flops_per_step
        return expected_speeds(*counts, self.layout, self.recipe, self.device.peak_flops, self.network)

    @property
    def question_passes(self) -> int:
        """Most forward passes of a process per evaluation on questions."""
        return forward_passes(self.recipe, sum(file.asked for file in self.questions), self.dims.dp)

    @property
    def question_share(self) -> float:
        """FLOPs of the questions relative to those of the steps between two evaluations."""
        assert self.recipe.validation is not None
        flops = sum(file.flops for file in self.questions)
        return flops / (self.recipe.validation.interval * self.flops_per_step)

    @property
    def seconds_per_step(self) -> float:
        """Seconds per step at the assumed utilization."""
        return self.flops_per_step / (self.dims.world_size * self.device.peak_flops * self.mfu)

    @property
    def fits(self) -> bool:
        """Whether the run fits and leaves a tenth of the device memory for what is not counted."""
        return self.memory.total <= USABLE * self.device.memory

    def ways_to_fit(self) -> dict[str, int]:
        """Return overrides of the recipe that need less memory, with the bytes per device of each."""
        recipe, parallel, processes = self.recipe, self.recipe.parallel, self.dims.world_size
        changes: dict[str, dict[str, Any]] = {
            "activation_checkpointing=full": {"activation_checkpointing": "full"},
        }
        values: dict[str, Any] = {"reshard": True, "defer_reduction": False, "replicate": 1}
        values |= {"tensor": 2 * parallel.tensor, "context": 2 * parallel.context}
        for name, value in values.items():
            changed = parallel.model_copy(update={name: value})
            changes[f"parallel.{name}={str(value).lower()}"] = {"parallel": changed}
        totals = {}
        for change, update in changes.items():
            new = recipe.model_copy(update=update)
            try:
                dims = _parallel_dims(new, processes, self.config)
            except SoloError:  # does not divide processes or layers
                continue
            layout = plan_layout(self.config, new, dims, self.device.memory, self.layout)
            total = memory_per_device(layout, new).total
            if total < self.memory.total:
                totals[change] = total
        return totals

    @property
    def sequences(self) -> int | None:
        """Packed sequences of the run."""
        return None if self.steps is None else self.steps * self.recipe.global_batch

    @property
    def tokens(self) -> int | None:
        """Tokens of the run, including padding."""
        return None if self.steps is None else self.steps * self.tokens_per_step

    @property
    def documents(self) -> int | None:
        """Approximate number of documents of the run: in all epochs, or as many as fill its steps."""
        if self.tokens is None or self.data is None:
            return None
        if self.recipe.steps is None:
            return self.data.documents
        return round(self.tokens * self.data.fill / self.data.document_length)

    @property
    def seconds(self) -> float | None:
        """Seconds of the run at the assumed utilization."""
        return None if self.steps is None else self.steps * self.seconds_per_step

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        counts = self.parameters
        return {
            "model": self.recipe.model,
            "shape_from": self.shape_from,
            "parameters": {
                "total": counts.total,
                "active": self.shape.active_parameters,
                "trained": self.trained,
                **asdict(counts),
            },
            "steps": self.steps,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "documents": self.documents,
            "data": asdict(self.data) if self.data else None,
            "questions": [asdict(file) for file in self.questions],
            "global_batch": self.recipe.global_batch,
            "sequence_length": self.recipe.data.sequence_length,
            "parallel": {"world_size": self.dims.world_size, **asdict(self.dims)},
            "device": asdict(self.device),
            "activation_checkpointing": asdict(self.layout.modes),
            "memory": {"total": self.memory.total, **asdict(self.memory)},
            "fits": self.fits,
            "ways_to_fit": {} if self.fits else self.ways_to_fit(),
            "mfu": self.mfu,
            "flops_per_step": self.flops_per_step,
            "computed_flops": {part: {"all": a, "again": b} for part, (a, b) in self.computed_flops.items()},
            "seconds_per_step": self.seconds_per_step,
            "seconds": self.seconds,
            "host_memory": {"total": self.host.total, **asdict(self.host)},
            "collectives": [{**asdict(each), "sent": each.sent} for each in self.collectives],
            "network": asdict(self.network) if self.network else None,
            "warning": self.warning,
            "speeds": [asdict(speed) for speed in self.speeds] if self.speeds else None,
        }


def make_plan(
    recipe: Recipe,
    processes: int,
    device: Device,
    mfu: float,
    config_folder: Path | None = None,
    network: Network | None = None,
) -> Plan:
    """Plan a run. No weights are read, and the model need not exist yet.

    Args:
        processes: Number of processes, one per device.
        mfu: Assumed model FLOPs utilization: model FLOPs over peak FLOPs of the devices.
        config_folder: Folder whose `config.json` describes the model while it does not exist yet.
        network: Network between the devices, if it is known.

    Raises:
        SoloError: There is no configuration of the model, its family is not supported, it has no biases of
            routers to update, or global batch or layers cannot be divided among the processes.
    """
    _check_end(recipe)
    source = _config_source(recipe, config_folder)
    config = _read_config(source)
    dims = _parallel_dims(recipe, processes, config)
    with _needed_by_plan_alone():
        layout = Layout.of(config, recipe, dims)
    if recipe.router_bias_update:
        prepare_biases(model_without_weights(config), is_updated=True)
    layout = plan_layout(config, recipe, dims, device.memory, layout)
    with _needed_by_plan_alone():
        memory = memory_per_device(layout, recipe)
    data, missing = _estimate(recipe, source)
    questions, questions_missing = _estimate_questions(recipe, source, layout.shape)
    return Plan(
        recipe=recipe,
        config=config,
        layout=layout,
        shape_from=str(source),
        device=device,
        memory=memory,
        steps=_steps(recipe, data) if data and recipe.steps is None else recipe.steps,
        data=data,
        data_missing=missing,
        questions=questions,
        questions_missing=questions_missing,
        mfu=mfu,
        host=host_memory(
            layout, recipe, *(data.vision_share, data.document_length, data.tokens) if data else ()
        ),
        network=network,
    )


@contextmanager
def _needed_by_plan_alone() -> Iterator[None]:
    try:
        yield
    except SoloError as error:
        raise SoloError(f"no plan: {error}; the run needs none: start it without --dry-run") from error


def planned_steps(recipe: Recipe, sources: Sequence[Source]) -> int:
    """Return the optimizer steps of a run: the recipe's, or a deterministic estimate for `data.epochs`.

    Args:
        sources: Opened sources of its mixture.
    """
    _check_end(recipe)
    if recipe.steps is not None:
        return recipe.steps
    return _steps(recipe, estimate_data(recipe, load_encoder(recipe.mixture.model_source()), sources))


def _check_end(recipe: Recipe) -> None:
    if recipe.steps is None and recipe.data.epochs is None:
        raise SoloError("neither steps nor data.epochs is set, so the run would never end: set one of them")


def _steps(recipe: Recipe, data: DataEstimate) -> int:
    return max(math.ceil(data.sequences / recipe.global_batch), 1)


def _parallel_dims(recipe: Recipe, processes: int, config: PreTrainedConfig) -> ParallelDims:
    """Return the parallel dimensions; raise SoloError if they cannot split the layers."""
    dims = ParallelDims.from_recipe(recipe, processes)
    check_tensor_parallel(config, dims.tp)
    check_context_parallel(config, dims.cp, dims.tp)
    if recipe.lora and dims.tp > 1:
        raise SoloError("lora: adapters do not support tensor parallelism; set parallel.tensor to 1")
    return dims


def _config_source(recipe: Recipe, config_folder: Path | None) -> str | Path:
    """Return the model if it exists, else the known configuration, else the hub ID."""
    if config_folder is None or recipe.mixture.at(recipe.model).exists():
        return recipe.mixture.model_source()
    known = config_folder / "config.json"
    return known if known.is_file() else recipe.mixture.model_source()


def _read_config(source: str | Path) -> PreTrainedConfig:
    try:
        return load_config(source)
    except SoloError as error:
        raise SoloError(
            f"no plan: {error}; download the model, create it with solo init, or run the previous stage"
        ) from error


def _estimate(recipe: Recipe, source: str | Path) -> tuple[DataEstimate | None, str]:
    """Return the data estimate, or None and the reason."""
    if source != recipe.mixture.model_source():
        return None, f"{recipe.model}, whose tokenizer reads the data, does not exist yet"
    try:
        return estimate_data(recipe, load_encoder(source), recipe.mixture.open_sources()), ""
    except SoloError as error:
        return None, str(error)


def _estimate_questions(
    recipe: Recipe, source: str | Path, shape: ModelShape
) -> tuple[list[QuestionEstimate], str]:
    """Return the estimates of questions, or the reason why there are none."""
    try:
        return estimate_questions(recipe, source, shape), ""
    except SoloError as error:
        return [], str(error)
