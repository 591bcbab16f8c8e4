"""`solo eval rescore`: scores saved predictions without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from solo_vlm.cli._common import print_json
from solo_vlm.cli.eval._judge import JudgeModel, JudgeUrl, benchmark_of
from solo_vlm.cli.eval._scores import print_score


def rescore(
    task: Annotated[str, typer.Option(help="mmstar, mme, seedbench, ai2d, scienceqa, mathvista, ...")],
    predictions: Annotated[
        Path, typer.Option(help="JSONL, JSON, CSV, TSV or XLSX file, or a folder of MME's text files.")
    ],
    judge: JudgeModel = None,
    judge_url: JudgeUrl = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score saved predictions as the benchmark's paper does."""
    from solo_vlm.evaluate.rescore import rescore as rescore_file

    score = rescore_file(benchmark_of(task, judge, judge_url), predictions)
    if json:
        print_json(score.as_dict())
    else:
        print_score(score)
