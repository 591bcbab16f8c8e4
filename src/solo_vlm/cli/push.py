"""`solo push`: a model on the hub, with its card and the code that reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from solo_vlm.cli._common import STDOUT, print_json, quiet_libraries


def push(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="Folder of a SOLO model.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Where to on the hub: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="A repository that is made is private.")] = False,
    run: Annotated[
        list[Path] | None, typer.Option(help="Folder of a training run; once a stage, in order.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="Folder of the model's evaluation.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="Licence of the weights, as the hub calls it.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the LLM that the model grew out of.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the folder; upload nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="New folder for --dry-run.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Publish a model: card, weights, and the code that lets transformers load it without solo-vlm."""
    from solo_vlm.utils.errors import SoloError

    if dry_run != (out is not None):
        raise SoloError("--dry-run and --out DIR go together: a dry run writes to DIR, an upload needs none")
    quiet_libraries()
    from solo_vlm.hub.publication import Publication

    publication = Publication(model, repo_id, run or (), evaluation, licence, base_model)
    if out:
        publication.write(out)
    where = str(out) if out else publication.upload(private)
    if json:
        print_json({"out" if out else "url": where})
        return
    STDOUT.print(f"{where}: read the card ({where}/README.md)" if out else where, highlight=False)
