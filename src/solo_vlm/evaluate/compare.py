"""Paired comparison of two runs on the same questions."""

from __future__ import annotations

from dataclasses import dataclass

from solo_vlm.evaluate.benchmarks import BENCHMARKS, get
from solo_vlm.evaluate.run_folder import RunFolder
from solo_vlm.evaluate.scoring.score import Benchmark, ScoredAnswer, paired_difference, score_of
from solo_vlm.utils.errors import SoloError


@dataclass(frozen=True)
class Comparison:
    """Comparison of two runs on one task, on the rows that both have.

    Attributes:
        n: Number of shared rows.
        left_out: Number of rows that only one run has.
        first, second: Scores of the two runs on the shared rows.
        difference: Second score minus first.
        interval: 95% interval of the difference.
        p_value: Two-sided p-value of no difference.
        only_first, only_second: Number of rows that only this run answers correctly.
    """

    task: str
    title: str
    n: int
    left_out: int
    first: float
    second: float
    difference: float
    interval: tuple[float, float]
    p_value: float
    only_first: int
    only_second: int


def compare_runs(first: RunFolder, second: RunFolder) -> list[Comparison]:
    """Compare two runs on every benchmark that both have.

    Raises:
        SoloError: They share no benchmark, or no row of a shared one, or were run on different data.
    """
    tasks = [task for task in first.tasks if task in second.tasks and task in BENCHMARKS]
    if not tasks:
        raise SoloError(f"{first.path} and {second.path} have no benchmark in common")
    return [_compare(get(task), first, second) for task in tasks]


def _compare(benchmark: Benchmark, first: RunFolder, second: RunFolder) -> Comparison:
    scored = (benchmark.scorer(run.read_predictions(benchmark.name)) for run in (first, second))
    runs = [{answer.prediction.id: answer for answer in benchmark.filter(answers)} for answers in scored]
    pairs = [(runs[0][name], runs[1][name]) for name in runs[0] if name in runs[1]]
    if not pairs:
        raise SoloError(f"{benchmark.name}: the two runs have no row in common")
    for one, other in pairs:
        if one.reference != other.reference or _question(one) != _question(other):
            raise SoloError(
                f"{benchmark.name}: row {one.prediction.id} is another question in the second run; "
                "compare runs on the same data"
            )
    units, other_units = (benchmark.units(answers) for answers in zip(*pairs, strict=True))
    difference, interval, p_value = paired_difference(units, other_units)
    return Comparison(
        task=benchmark.name,
        title=benchmark.title,
        n=len(pairs),
        left_out=sum(map(len, runs)) - 2 * len(pairs),
        first=score_of(units),
        second=score_of(other_units),
        difference=difference,
        interval=interval,
        p_value=p_value,
        only_first=sum(one.correct and not other.correct for one, other in pairs),
        only_second=sum(other.correct and not one.correct for one, other in pairs),
    )


def _question(answer: ScoredAnswer) -> object:
    return answer.prediction.row.get("question")
