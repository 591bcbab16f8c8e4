"""`solo data download`: the images of a URL list."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def download(
    name: Annotated[str, typer.Argument(help="A name of solo data list whose raw form lists URLs.")],
    urls: Annotated[Path, typer.Option(help="The published list, or a folder of its files.")],
    out: Annotated[Path, typer.Option(help="Folder for tar files, the raw files of solo data convert.")],
    img2dataset: Annotated[str, typer.Option(help="The program, by name or path.")] = "img2dataset",
    processes: Annotated[int, typer.Option(min=1, help="Processes of the program.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each process.")] = 64,
) -> None:
    """Download the images of CapFusion or CC3M with img2dataset. Run it again to go on where it stopped."""
    from solo_vlm.data.catalog.download import download as run
    from solo_vlm.data.catalog.registry import get

    run(get(name), urls, out, img2dataset, processes, threads)
