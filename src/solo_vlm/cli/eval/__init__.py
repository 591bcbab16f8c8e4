"""`solo eval`: scores on the paper's benchmarks; one small file a verb."""

from __future__ import annotations

import typer

from solo_vlm.cli.eval.compare import compare
from solo_vlm.cli.eval.contamination import contamination
from solo_vlm.cli.eval.rescore import rescore
from solo_vlm.cli.eval.run import run

app = typer.Typer(
    help="Evaluation: run a model on the paper's benchmarks, score saved answers, compare runs.",
    no_args_is_help=True,
)

for verb in (run, rescore, compare, contamination):
    app.command()(verb)
