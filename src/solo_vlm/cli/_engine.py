"""Who runs jobs, as the options of verbs name it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Engine(StrEnum):
    """Who runs."""

    LOCAL = "local"
    RAY = "ray"


RunsOn = Annotated[
    Engine, typer.Option(help="This machine's processes, or Ray: RAY_ADDRESS names a cluster.")
]
SideBySide = Annotated[int, typer.Option(min=1, help="Runs side by side.")]
