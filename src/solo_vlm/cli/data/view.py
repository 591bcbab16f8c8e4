"""`solo data view`: samples as the model sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from solo_vlm.cli._common import STDOUT, print_json, quiet_libraries
from solo_vlm.cli.data._arguments import Json, MixtureFile, Overrides


def view(
    mixture: MixtureFile,
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="How many, shared by the sources.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice.")] = 0,
    json: Json = False,
) -> None:
    """Write an HTML page of samples: patches of the images, tokens, and which of these are supervised."""
    quiet_libraries()
    from solo_vlm.data.encode import load_encoder
    from solo_vlm.data.mixture import Mixture
    from solo_vlm.data.survey.view import write_gallery

    settings = Mixture.load(mixture, overrides or [])
    shown = write_gallery(out, settings, load_encoder(settings.model_source()), samples, seed)
    if json:
        print_json({"out": str(out), "samples": shown})
        return
    STDOUT.print(f"{out}: {shown} samples", highlight=False, markup=False)
