"""The plan of a training run, shown."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from solo_vlm.cli._common import STDOUT

if TYPE_CHECKING:
    from solo_vlm.train.estimate.devices import Device
    from solo_vlm.train.estimate.plan import Plan
    from solo_vlm.train.recipe import Recipe

_GIB = 2**30
_DEFAULT_DEVICE = "A100-80GB"  # the paper's


def default_processes(recipe: Recipe) -> int:
    """As torchrun says, else one for each accelerator of this machine, and as many as split a layer."""
    import torch

    found = int(os.environ.get("WORLD_SIZE", 0)) or torch.accelerator.device_count()
    return max(found, recipe.parallel.tensor)


def choose_device(name: str | None) -> Device:
    """The device of that name, else this machine's, else the paper's.

    Raises:
        SoloError: no such device is known.
    """
    import torch

    from solo_vlm.train.estimate.devices import find_device, recognize_device

    here = recognize_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return find_device(name) if name else here or find_device(_DEFAULT_DEVICE)


def show_plan(plan: Plan) -> None:
    """Print a plan."""
    for line in [*_model(plan), *_run(plan), *_memory(plan), *_advice(plan)]:
        STDOUT.print(line, highlight=False, markup=False)


def _model(plan: Plan) -> list[str]:
    counts = plan.parameters
    parts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in vars(counts).items() if count)
    return [
        f"model       {plan.recipe.model}, with the shape in {plan.shape_from}",
        f"parameters  {counts.total:,}, trained {plan.trained:,}",
        f"            {parts}",
    ]


def _run(plan: Plan) -> list[str]:
    recipe, layout, device = plan.recipe, plan.layout, plan.device
    length, batch = recipe.data.sequence_length, recipe.global_batch
    run = "as many steps as the data last"
    if plan.steps is not None:
        about = "" if recipe.steps else "about "
        run = f"{about}{plan.steps:,} steps, {plan.sequences:,} sequences, {plan.tokens:,} tokens"
    data = f"one document a sequence is assumed: {plan.data_missing}"
    if plan.data:
        documents = f", {plan.documents:,} documents" if plan.documents else ""
        data = (
            f"about {plan.data.document_length:,.0f} tokens a document{documents}, "
            f"{plan.data.vision_share:.1%} vision tokens"
        )
    whole = f", {_duration(plan.seconds)} in all" if plan.seconds else ""
    return [
        f"step        {batch:,} sequences of {length:,} tokens: {plan.tokens_per_step:,} tokens",
        f"run         {run}",
        f"data        {data}",
        f"processes   {layout.processes}: data parallel {layout.data} x tensor parallel {layout.tensor}; "
        f"{layout.accumulation} sequences each, one after the other",
        f"time        {_duration(plan.seconds_per_step)} a step{whole}, on {layout.processes} x "
        f"{device.name} at {plan.mfu:.0%} of {device.peak_flops / 1e12:,.0f} TFLOP/s each",
    ]


def _memory(plan: Plan) -> list[str]:
    parts = [f"  {name:<12}{_gib(size)}" for name, size in vars(plan.memory).items()]
    total = f"  {'total':<12}{_gib(plan.memory.total)} of {plan.device.memory / _GIB:g} GiB"
    return [f"memory of each {plan.device.name}", *parts, total]


def _advice(plan: Plan) -> list[str]:
    if plan.fits:
        return []
    ways = [f"  {way:<34}{_gib(total)}" for way, total in plan.ways_to_fit().items()]
    return [
        "It does not fit; a tenth of the memory must stay free for what is not counted here.",
        *(["It would take:", *ways] if ways else []),
        "More processes (--processes) share the weights, shorter sequences (data.sequence_length) the rest.",
    ]


def _gib(size: float) -> str:
    return f"{size / _GIB:8.1f} GiB"


def _duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))
