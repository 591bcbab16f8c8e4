"""`solo train`: run a recipe, or show its plan."""

from __future__ import annotations

import os
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from solo_vlm.cli._common import STDOUT, JsonOption, is_first_process, print_json, quiet_libraries
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from solo_vlm.train.estimate.plan import Plan
    from solo_vlm.train.recipe import Recipe

_GIB = 2**30
_DEFAULT_DEVICE = "A100-80GB"  # used in the paper


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="YAML file, or a name such as quickstart/stage1.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Fail unless there is a checkpoint to resume from.")
    ] = False,
    from_manifest: Annotated[Path | None, typer.Option(help="Repeat the run of a manifest.json.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the plan: steps, memory, time.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes of a dry run; default: one per accelerator.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device of a dry run, e.g. H100; default: this machine's or A100-80GB.")
    ] = None,
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Model FLOPs utilization assumed by a dry run.")
    ] = 0.4,
    network: Annotated[
        str | None,
        typer.Option(
            help="Network of a dry run, e.g. nvlink+400g: in a machine, and Gbit/s per device between."
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Train a model. An interrupted run resumes from its newest checkpoint.

    Show what a run will do and need:

        solo train recipe.yaml --dry-run --device RTX-4090

    Fine-tune on your data with one 24 GB GPU:

        solo train presets/lora "data.sources=[{path: x.json, images: photos}]"

    Train a stage of a recipe of the package, with other settings:

        solo train quickstart/stage2 root=runs/quickstart steps=2000

    Repeat a run:

        solo train --from-manifest run/manifest.json out=again
    """
    quiet_libraries()
    from solo_vlm.train.recipe import Recipe
    from solo_vlm.train.run_folder import read_manifest_recipe

    if from_manifest:
        if recipe and "=" not in recipe:
            raise SoloError(f"give either a recipe ({recipe}) or --from-manifest, not both")
        changes = ([recipe] if recipe else []) + (overrides or [])
        settings = read_manifest_recipe(from_manifest).override(changes)
    elif recipe:
        settings = Recipe.load(recipe, overrides or [])
    else:
        raise SoloError("give a recipe, or --from-manifest FILE")
    if dry_run:
        _plan(settings, recipe if not from_manifest else None, processes, device, mfu, network, json)
    else:
        _train(settings, resume, json)


def _train(recipe: Recipe, resume: bool, json: bool) -> None:
    from solo_vlm.train.trainer import train as run

    result = run(recipe, resume=resume)
    if not is_first_process():
        return
    metrics = result.metrics
    if json:
        return print_json({"model": str(result.model), **metrics})
    STDOUT.print(
        f"{result.model}: {metrics['steps']} steps, {metrics['tokens']:,} tokens, "
        f"{metrics['tokens_per_second']:,.0f} tokens/s"
    )
    if metrics["stopped"]:
        STDOUT.print(f"stopped early: {metrics['stopped']}", soft_wrap=True)
    if best := metrics["best"]:
        of_best = f"best: step {best['step']:,}, {best['metric']} {best['value']:.4g}"
        if best["step"] == metrics["steps"]:
            STDOUT.print(f"{of_best}; {result.model} is this model", soft_wrap=True)
        else:
            STDOUT.print(
                f"{of_best}; {result.model} is of the last step ({metrics['steps']:,}), export the best with "
                f"solo convert checkpoint {result.model.parent} FOLDER --best",
                soft_wrap=True,
            )


def _plan(
    recipe: Recipe,
    name: str | None,
    processes: int | None,
    device: str | None,
    mfu: float,
    network: str | None,
    json: bool,
) -> None:
    import torch

    from solo_vlm.train.estimate.communication import Network
    from solo_vlm.train.estimate.memory import find_device, recognize_device
    from solo_vlm.train.estimate.plan import make_plan
    from solo_vlm.train.parallel.context import number_in
    from solo_vlm.utils.settings import find_settings

    # Default: torchrun's world size, or one process per accelerator; at least what the layout needs.
    found = number_in(os.environ, "WORLD_SIZE", 0) or torch.accelerator.device_count()
    here = recognize_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    chosen = find_device(device) if device else here or find_device(_DEFAULT_DEVICE)
    parallel = recipe.parallel
    plan = make_plan(
        recipe,
        processes or max(found, parallel.tensor * parallel.context * parallel.replicate),
        chosen,
        mfu,
        find_settings(name, "recipe").parent if name else None,
        Network.parse(network, chosen.name) if network else None,
    )
    if json:
        return print_json(plan.as_dict())
    parts = (_model_lines, _run_lines, _question_lines, _memory_lines, _network_lines, _advice_lines)
    for line in list(chain.from_iterable(part(plan) for part in parts)):  # all of them, or an error
        STDOUT.print(line, markup=False)


def _model_lines(plan: Plan) -> list[str]:
    counts, active = plan.parameters, plan.shape.active_parameters
    of_token = f", {active:,} active per token" if active < counts.total else ""  # mixture of experts
    parts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in vars(counts).items() if count)
    return [
        f"model       {plan.recipe.model}, shape from {plan.shape_from}",
        f"parameters  {counts.total:,}{of_token}, trained {plan.trained:,}",
        f"            {parts}",
    ]


def _run_lines(plan: Plan) -> list[str]:
    recipe, dims, device = plan.recipe, plan.dims, plan.device
    length, batch = recipe.data.sequence_length, recipe.global_batch
    run = "until the data ends"
    if plan.steps is not None:
        about = "" if recipe.steps else "about "
        run = f"{about}{plan.steps:,} steps, {plan.sequences:,} sequences, {plan.tokens:,} tokens"
    data = f"assuming one document per sequence: {plan.data_missing}"
    if plan.data:
        documents = f", {plan.documents:,} documents" if plan.documents else ""
        data = (
            f"about {plan.data.document_length:,.0f} tokens per document{documents}, "
            f"{plan.data.vision_share:.1%} vision tokens"
        )
    total = f", {_duration(plan.seconds)} in total" if plan.seconds else ""
    copies = f" (parameters on {dims.replicate} x {dims.shards})" if dims.replicate > 1 else ""
    slices = f" x context parallel {dims.cp}" if dims.cp > 1 else ""
    layout = f"data parallel {dims.dp}{copies}{slices} x tensor parallel {dims.tp}"
    update = recipe.router_bias_update
    routers = [f"routers     biases move by {update:g} per step to balance experts"] if update else []
    return [
        f"step        {batch:,} sequences of {length:,} tokens: {plan.tokens_per_step:,} tokens",
        f"run         {run}",
        f"data        {data}",
        f"processes   {dims.world_size}: {layout}, "
        f"{dims.gradient_accumulation_steps} gradient accumulation steps",
        *routers,
        f"time        {_duration(plan.seconds_per_step)} per step{total}, on {dims.world_size} x "
        f"{device.name} at {plan.mfu:.0%} of {device.peak_flops / 1e12:,.0f} TFLOP/s",
    ]


def _question_lines(plan: Plan) -> list[str]:
    validation = plan.recipe.validation
    if plan.questions_missing:
        return [f"questions   not counted: {plan.questions_missing}"]
    if not plan.questions or validation is None:
        return []
    lines = []
    for file in plan.questions:
        question, expected, metric = file.example
        lines += [
            f"{file.name}: {file.asked:,} of {file.total:,} in {file.path}, about {file.tokens:,.0f} tokens "
            "each",
            f"  {' '.join(question.split())[:80]} -> {expected[:40]} ({metric})",
        ]
    lines.append(
        f"every {validation.interval:,} steps, at most {plan.question_passes:,} forward passes per process: "
        f"{plan.question_share:.1%} of the FLOPs of the steps between"
    )
    return [f"{'' if number else 'questions':<12}{line}" for number, line in enumerate(lines)]


def _memory_lines(plan: Plan) -> list[str]:
    from solo_vlm.train.estimate.memory import describe_modes

    parts = [f"  {name:<12}{_gib(size)}" for name, size in vars(plan.memory).items()]
    total = f"  {'total':<12}{_gib(plan.memory.total)} of {plan.device.memory / _GIB:g} GiB"
    auto = plan.recipe.activation_checkpointing == "auto"
    modes = [describe_modes(plan.layout, plan.recipe, plan.device.memory)] if auto else []
    host = [f"  {name:<12}{_gib(size)}" for name, size in vars(plan.host).items() if size]
    of_host = f"  {'total':<12}{_gib(plan.host.total)}"
    return [
        f"memory per {plan.device.name}",
        *parts,
        total,
        *modes,
        "main memory of the first machine",
        *host,
        of_host,
    ]


def _network_lines(plan: Plan) -> list[str]:
    found = plan.collectives
    if not found:
        return []
    network = plan.network
    lines = ["sent per process and step"]
    for each in found:
        took = f", {_duration(each.seconds(network))} over {network.name}" if network else ""
        hidden = " behind computation" if network and each.overlaps else ""
        lines.append(
            f"  {each.purpose:<21}{_gib(each.sent)}  {each.kind} over {each.size} processes{took}{hidden}"
        )
    if plan.warning:
        lines.append(f"warning     {plan.warning}")
    if plan.speeds:
        worst, best = plan.speeds
        parts = [
            f"{part} {flops / 1e15:,.0f} PFLOPs ({again / 1e15:,.0f} recomputed)"
            for part, (flops, again) in plan.computed_flops.items()
        ]
        lines.append(f"computed    {', '.join(parts)} per step")
        lines.append(
            f"expected    {worst.mfu:.0%} to {best.mfu:.0%} MFU: {_duration(best.compute)} to "
            f"{_duration(worst.compute)} of computation, and {_duration(worst.exposed)} of communication "
            f"that it does not hide ({worst.exposed / (worst.compute + worst.exposed):.0%})"
        )
    return lines


def _advice_lines(plan: Plan) -> list[str]:
    if plan.fits:
        return []
    ways = [f"  {way:<34}{_gib(total)}" for way, total in plan.ways_to_fit().items()]
    return [
        "It does not fit: a tenth of the memory must stay free for what is not counted here.",
        *(["Total memory with other settings:", *ways] if ways else []),
        "More processes (--processes) share the weights; shorter sequences (data.sequence_length) reduce "
        "activations.",
    ]


def _gib(size: float) -> str:
    return f"{size / _GIB:8.1f} GiB"


def _duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))
