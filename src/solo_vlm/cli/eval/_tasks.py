"""What verbs that read benchmarks take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Tasks = Annotated[
    str | None, typer.Option(help="Names with commas between, such as mmstar,mme. Default: the paper's six.")
]
DataRoot = Annotated[
    Path | None, typer.Option(help="Folder with a folder for each benchmark. Default: the hub.")
]


def task_names(tasks: str | None) -> list[str]:
    """The names, each once, in the order given."""
    from solo_vlm.evaluate.benchmarks import PAPER

    return (
        list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
        if tasks
        else list(PAPER)
    )
