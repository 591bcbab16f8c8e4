"""`solo push`: publish a model on the hub, with its card and its code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from solo_vlm.cli._common import STDOUT, JsonOption, print_json, quiet_libraries
from solo_vlm.utils.errors import SoloError


def push(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="Folder of a SOLO model.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Repository on the hub: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    run: Annotated[
        list[Path] | None, typer.Option(help="Folder of a training run; repeatable, in order of training.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="Folder of the model's evaluation.")
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", help="Hub ID of the license of the weights.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub ID of the LLM the model was made from.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write to --out; upload nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="New folder for --dry-run.")] = None,
    json: JsonOption = False,
) -> None:
    """Publish a model: card, weights, and the code with which transformers loads it without solo-vlm."""
    if dry_run != (out is not None):
        raise SoloError("--dry-run and --out DIR must be given together")
    quiet_libraries()
    from solo_vlm.hub.upload import Publication

    publication = Publication(model, repo_id, run or (), evaluation, license, base_model)
    if out:
        publication.write(out)
    where = str(out) if out else publication.upload(private)
    if json:
        return print_json({"out" if out else "url": where})
    STDOUT.print(f"{where}: check the card ({where}/README.md)" if out else where)
