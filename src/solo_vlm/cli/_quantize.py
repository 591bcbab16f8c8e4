"""The option `--quantize` of the verbs that load a model to ask it."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

QuantizeOption = Annotated[
    Literal["int8", "nf4"] | None,
    typer.Option(help="Hold the weights in 8 or 4 bits (pip install 'solo-vlm[quantize]')."),
]
