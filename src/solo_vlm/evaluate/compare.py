"""Two runs on the same questions: is the difference of their scores more than chance?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from solo_vlm.evaluate.benchmarks import Benchmark, get
from solo_vlm.evaluate.run_folder import RunFolder
from solo_vlm.evaluate.score import ScoredAnswer
from solo_vlm.evaluate.statistics import paired_difference, score_of
from solo_vlm.utils.errors import SoloError


@dataclass(frozen=True)
class Comparison:
    """Two runs on one task, on the rows that both have.

    Attributes:
        task: the benchmark's name on the command line.
        title: in print.
        n: rows that both runs have.
        left_out: rows that one run has and the other has not.
        first: score of the first run on the shared rows.
        second: score of the second.
        difference: second less first.
        interval: 95% of the difference.
        p_value: two-sided, that there is no difference.
        only_first: rows that only the first run has right.
        only_second: rows that only the second run has right.
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
    """Compare two runs on every task that both have.

    Raises:
        SoloError: they share no task, or no row of one, or were run on different data.
    """
    tasks = [task for task in first.tasks if task in second.tasks]
    if not tasks:
        raise SoloError(f"{first.path} and {second.path} have no task in common")
    return [_compare(get(task), first, second) for task in tasks]


def _compare(benchmark: Benchmark, first: RunFolder, second: RunFolder) -> Comparison:
    runs = [
        {
            answer.prediction.id: answer
            for answer in benchmark.counted(benchmark.scorer(run.read_predictions(benchmark.name)))
        }
        for run in (first, second)
    ]
    shared = [name for name in runs[0] if name in runs[1]]
    if not shared:
        raise SoloError(f"{benchmark.name}: the two runs have no row in common")
    one, other = ([run[name] for name in shared] for run in runs)
    _check_same_questions(benchmark, one, other)
    units, other_units = benchmark.units(one), benchmark.units(other)
    difference, interval, p_value = paired_difference(units, other_units)
    pairs = list(zip(one, other, strict=True))
    return Comparison(
        task=benchmark.name,
        title=benchmark.title,
        n=len(shared),
        left_out=sum(map(len, runs)) - 2 * len(shared),
        first=score_of(units),
        second=score_of(other_units),
        difference=difference,
        interval=interval,
        p_value=p_value,
        only_first=sum(mine.correct and not theirs.correct for mine, theirs in pairs),
        only_second=sum(theirs.correct and not mine.correct for mine, theirs in pairs),
    )


def _check_same_questions(
    benchmark: Benchmark, one: Sequence[ScoredAnswer], other: Sequence[ScoredAnswer]
) -> None:
    for mine, theirs in zip(one, other, strict=True):
        if mine.reference != theirs.reference or _question(mine) != _question(theirs):
            raise SoloError(
                f"{benchmark.name}: row {mine.prediction.id} is another question in the second run; "
                "runs are compared on the same data only"
            )


def _question(answer: ScoredAnswer) -> object:
    return answer.prediction.row.get("question")
