"""`solo train`: run a recipe, or show what it would take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from solo_vlm.cli._common import STDOUT, print_json, quiet_libraries
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from solo_vlm.train.recipe import Recipe


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="YAML file, or a name such as quickstart/stage1.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Fail unless there is a run to go on from.")
    ] = False,
    from_manifest: Annotated[Path | None, typer.Option(help="Repeat the run of a manifest.json.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what the run will do, need and take.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Of a dry run; default: those of this machine.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Of a dry run, as H100; default: this machine's, or A100-80GB.")
    ] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1.0, help="Utilisation that a dry run assumes.")] = 0.4,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Train a model. A run that was interrupted goes on from its newest checkpoint."""
    quiet_libraries()
    from solo_vlm.train.manifest import read_recipe
    from solo_vlm.train.recipe import Recipe

    if from_manifest:
        changes = ([recipe] if recipe else []) + (overrides or [])
        settings = read_recipe(from_manifest).override(changes)
    elif recipe:
        settings = Recipe.load(recipe, overrides or [])
    else:
        raise SoloError("give a recipe, or --from-manifest FILE")
    if dry_run:
        _plan(settings, recipe if not from_manifest else None, processes, device, mfu, json)
    else:
        _train(settings, resume, json)


def _train(recipe: Recipe, resume: bool, json: bool) -> None:
    from solo_vlm.train.trainer import train as run

    trained = run(recipe, resume=resume)
    if int(os.environ.get("RANK", 0)):  # torchrun's first process speaks for all
        return
    if json:
        print_json({"model": str(trained.model), **trained.figures})
        return
    figures = trained.figures
    STDOUT.print(
        f"{trained.model}: {figures['steps']} steps, {figures['tokens']:,} tokens, "
        f"{figures['tokens_per_second']:,.0f} tokens/s",
        highlight=False,
    )


def _plan(
    recipe: Recipe, name: str | None, processes: int | None, device: str | None, mfu: float, json: bool
) -> None:
    from solo_vlm.cli._plan import choose_device, default_processes, show_plan
    from solo_vlm.train.estimate.plan import make_plan
    from solo_vlm.utils.settings import find_settings

    plan = make_plan(
        recipe,
        processes or default_processes(recipe),
        choose_device(device),
        mfu,
        find_settings(name, "recipe").parent if name else None,
    )
    print_json(plan.as_dict()) if json else show_plan(plan)
