"""The plan of a run, before anything is loaded: what will be trained, on how much memory, for how long."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from solo_vlm.data.encode import load_encoder
from solo_vlm.models.flops import ModelShape, ParameterCounts, forward_flops
from solo_vlm.models.load import load_config
from solo_vlm.train.estimate.data import DataEstimate, estimate_data
from solo_vlm.train.estimate.devices import Device
from solo_vlm.train.estimate.memory import Memory, memory_per_device, trained_parameters
from solo_vlm.train.parallel.layout import Layout, layout
from solo_vlm.train.recipe import ParallelSettings, Recipe
from solo_vlm.utils.errors import SoloError

_USABLE = 0.9  # of a device's memory; the rest is for what `memory.py` does not count


@dataclass(frozen=True)
class Plan:
    """What a run will do and need.

    Attributes:
        recipe: its settings.
        shape: of the model.
        shape_from: where the model's configuration was read.
        layout: how processes share the work.
        device: each process has one.
        memory: of each device.
        steps: optimizer steps; None where only the data can tell, and they are not there.
        data: what a sample of them says; None where they, or the model's tokenizer, are not there. One
            document a sequence, text alone, is then assumed: the most attention that can be.
        data_missing: what is not there.
        mfu: assumed utilisation of the devices.
    """

    recipe: Recipe
    shape: ModelShape
    shape_from: str
    layout: Layout
    device: Device
    memory: Memory
    steps: int | None
    data: DataEstimate | None
    data_missing: str
    mfu: float

    @property
    def parameters(self) -> ParameterCounts:
        """By part; adapters are not among them."""
        return self.shape.parameters

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return trained_parameters(self.shape, self.recipe)

    @property
    def tokens_per_step(self) -> int:
        """Text and vision tokens, and padding."""
        return self.recipe.global_batch * self.recipe.data.sequence_length

    @property
    def flops_per_step(self) -> int:
        """Of forward and backward pass over all processes, without what is computed again."""
        length = self.recipe.data.sequence_length
        documents = max(round(length / self.data.document_length), 1) if self.data else 1
        vision = round(length * self.data.vision_share) if self.data else 0
        borders = np.linspace(0, length, documents + 1).astype(int)
        flops = forward_flops(self.shape, np.diff(borders), patches=vision, predicted=length - vision)
        frozen = self.recipe.lora is not None or self.recipe.trainable != "all"
        return self.recipe.global_batch * (flops.training_frozen if frozen else flops.training)

    @property
    def seconds_per_step(self) -> float:
        """At the assumed utilisation."""
        return self.flops_per_step / (self.layout.processes * self.device.peak_flops * self.mfu)

    @property
    def fits(self) -> bool:
        """Whether the memory needed leaves a tenth of the device's for what is not counted."""
        return self.memory.total <= _USABLE * self.device.memory

    def ways_to_fit(self) -> dict[str, int]:
        """Overrides of the recipe that need less memory, and the bytes of a device with each."""
        recipe, parallel, processes = self.recipe, self.recipe.parallel, self.layout.processes
        changes: dict[str, dict[str, Any]] = {
            "activation_checkpointing=full": {"activation_checkpointing": "full"},
            "parallel.reshard=true": {"parallel": ParallelSettings(tensor=parallel.tensor)},
            f"parallel.tensor={2 * parallel.tensor}": {
                "parallel": ParallelSettings(tensor=2 * parallel.tensor, reshard=parallel.reshard)
            },
        }
        totals = {}
        for change, update in changes.items():
            changed = recipe.model_copy(update=update)
            try:
                total = memory_per_device(self.shape, changed, _arrange(changed, processes, self.shape)).total
            except SoloError:  # processes or layers do not divide that way
                continue
            if total < self.memory.total:
                totals[change] = total
        return totals

    @property
    def sequences(self) -> int | None:
        """Packed sequences of the run."""
        return None if self.steps is None else self.steps * self.recipe.global_batch

    @property
    def tokens(self) -> int | None:
        """Of the run, padding included."""
        return None if self.steps is None else self.steps * self.tokens_per_step

    @property
    def documents(self) -> int | None:
        """About how many the run reads: all of its passes, or as many as fill its steps."""
        if self.tokens is None or self.data is None:
            return None
        if self.recipe.steps is None:
            return self.data.documents
        return round(self.tokens * self.data.fill / self.data.document_length)

    @property
    def seconds(self) -> float | None:
        """Of the run, at the assumed utilisation."""
        return None if self.steps is None else self.steps * self.seconds_per_step

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        counts = self.parameters
        return {
            "model": self.recipe.model,
            "shape_from": self.shape_from,
            "parameters": {"total": counts.total, "trained": self.trained, **asdict(counts)},
            "steps": self.steps,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "documents": self.documents,
            "data": asdict(self.data) if self.data else None,
            "global_batch": self.recipe.global_batch,
            "sequence_length": self.recipe.data.sequence_length,
            "layout": {"processes": self.layout.processes, **asdict(self.layout)},
            "device": asdict(self.device),
            "memory": {"total": self.memory.total, **asdict(self.memory)},
            "fits": self.fits,
            "ways_to_fit": {} if self.fits else self.ways_to_fit(),
            "mfu": self.mfu,
            "flops_per_step": self.flops_per_step,
            "seconds_per_step": self.seconds_per_step,
            "seconds": self.seconds,
        }


def make_plan(
    recipe: Recipe, processes: int, device: Device, mfu: float, config_folder: Path | None = None
) -> Plan:
    """Work out the plan of a run. No weights are read, and the model need not be there yet.

    Args:
        recipe: the settings.
        processes: of the run, one for each device.
        device: of each process.
        mfu: utilisation to assume: FLOPs of the model over what the devices could do.
        config_folder: where a `config.json` says what the model will be, as long as it is not there itself.

    Raises:
        SoloError: nothing says what the model is, its family is not counted, or the processes cannot share
            the global batch or its layers.
    """
    _check_end(recipe)
    source = _config_source(recipe, config_folder)
    shape = _read_shape(source)
    arranged = _arrange(recipe, processes, shape)
    data, missing = _estimate(recipe, source)
    return Plan(
        recipe=recipe,
        shape=shape,
        shape_from=str(source),
        layout=arranged,
        device=device,
        memory=memory_per_device(shape, recipe, arranged),
        steps=_steps(recipe, data) if data and recipe.steps is None else recipe.steps,
        data=data,
        data_missing=missing,
        mfu=mfu,
    )


def planned_steps(recipe: Recipe) -> int:
    """Optimizer steps of a run: the recipe's, or as many as its passes over the data are estimated to take.

    The same recipe and data give the same number.

    Raises:
        SoloError: the model or a source is missing, or neither `steps` nor `data.epochs` ends the run.
    """
    _check_end(recipe)
    if recipe.steps is not None:
        return recipe.steps
    return _steps(recipe, estimate_data(recipe, load_encoder(recipe.model_source())))


def _check_end(recipe: Recipe) -> None:
    if recipe.steps is None and recipe.data.epochs is None:
        raise SoloError("neither steps nor data.epochs is set, so the run would never end: set one of them")


def _steps(recipe: Recipe, data: DataEstimate) -> int:
    return max(math.ceil(data.sequences / recipe.global_batch), 1)


def _arrange(recipe: Recipe, processes: int, shape: ModelShape) -> Layout:
    """The layout, refused where it would split what cannot be split."""
    arranged = layout(recipe, processes)
    if not shape.splits(arranged.tensor):
        raise SoloError(
            f"parallel.tensor = {arranged.tensor} does not divide the heads ({shape.heads}, and "
            f"{shape.key_heads} of keys) and the MLP ({shape.mlp}) of the model: set it to a common divisor"
        )
    if recipe.lora and arranged.tensor > 1:
        raise SoloError("lora: layers with adapters cannot be split; set parallel.tensor to 1")
    return arranged


def _config_source(recipe: Recipe, config_folder: Path | None) -> str | Path:
    """The model if it is there, else what is known of it, else a hub id."""
    if config_folder is None or recipe.at(recipe.model).exists():
        return recipe.model_source()
    known = config_folder / "config.json"
    return known if known.is_file() else recipe.model_source()


def _read_shape(source: str | Path) -> ModelShape:
    try:
        return ModelShape.of(load_config(source))
    except SoloError as error:
        raise SoloError(
            f"no plan: {error}; fetch the model, make it with solo init, or run the stage before"
        ) from error


def _estimate(recipe: Recipe, source: str | Path) -> tuple[DataEstimate | None, str]:
    """The estimate; or none, and why there is none."""
    if source != recipe.model_source():
        return None, f"{recipe.model}, whose tokenizer reads the data, is not there yet"
    try:
        return estimate_data(recipe, load_encoder(source)), ""
    except SoloError as error:
        return None, str(error)
