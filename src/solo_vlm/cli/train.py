"""`solo train`: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from solo_vlm.cli._console import STDOUT, print_json, quiet_libraries
from solo_vlm.errors import SoloError


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="YAML file, or a name such as quickstart/stage1.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Fail unless there is a run to go on from.")
    ] = False,
    from_manifest: Annotated[Path | None, typer.Option(help="Repeat the run of a manifest.json.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Train a model. A run that was interrupted goes on from its newest checkpoint."""
    quiet_libraries()
    from solo_vlm.train.loop import train as run
    from solo_vlm.train.manifest import read_recipe
    from solo_vlm.train.recipe import Recipe

    if from_manifest:
        changes = ([recipe] if recipe else []) + (overrides or [])
        settings = read_recipe(from_manifest).override(changes)
    elif recipe:
        settings = Recipe.load(recipe, overrides or [])
    else:
        raise SoloError("give a recipe, or --from-manifest FILE")
    trained = run(settings, resume=resume)
    if json:
        print_json({"model": str(trained.model), **trained.figures})
        return
    figures = trained.figures
    STDOUT.print(
        f"{trained.model}: {figures['steps']} steps, {figures['tokens']:,} tokens, "
        f"{figures['tokens_per_second']:,.0f} tokens/s",
        highlight=False,
    )
