"""The judge of MathVista's answers on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from solo_vlm.evaluate.benchmarks import Benchmark

JudgeModel = Annotated[
    str | None,
    typer.Option(
        "--judge", metavar="MODEL", help="MathVista: let this model extract the answers, not rules."
    ),
]
JudgeUrl = Annotated[
    str | None,
    typer.Option("--judge-url", metavar="URL", help="OpenAI-compatible endpoint of the judge, up to /v1."),
]


def benchmark_of(task: str, judge: str | None, judge_url: str | None) -> Benchmark:
    """The benchmark of a name, its answers extracted by a language model where one is asked for.

    Raises:
        SoloError: there is no such benchmark, or it needs no judge.
    """
    from solo_vlm.evaluate.benchmarks import get
    from solo_vlm.evaluate.benchmarks.mathvista import MATHVISTA, with_llm_judge
    from solo_vlm.evaluate.llm_judge import LlmJudge

    benchmark = get(task)
    if judge is None:
        if judge_url is not None:
            raise SoloError("--judge-url needs --judge MODEL: the name of the model there")
        return benchmark
    if benchmark is not MATHVISTA:
        raise SoloError(f"--judge is for mathvista only; answers to {task} are read by rules")
    return with_llm_judge(LlmJudge(judge, judge_url))
