"""Paired comparison of two runs on the same questions."""

from __future__ import annotations

from dataclasses import dataclass

from solo_vlm.evaluate.run_folder import RunFolder
from solo_vlm.evaluate.saved_task import SavedTask, UnscoredRowsError, load_task
from solo_vlm.evaluate.scoring.score import paired_difference, score_of
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
        maximum: Score of a perfect model; None if it is unknown, as for lmms-eval's own metrics.
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
    maximum: float | None


def compare_runs(first: RunFolder, second: RunFolder) -> tuple[list[Comparison], dict[str, str]]:
    """Compare two runs on every task that both have.

    Returns:
        The comparisons, and the reasons for the tasks without one.

    Raises:
        SoloError: There is no comparison; or the runs share no row of a task, or were run on different data.
    """
    shared = set(first.tasks) & set(second.tasks)
    if not shared:
        raise SoloError(f"{first.path} and {second.path} have no task in common")
    reasons = {
        task: f"{task}: only {run.path} has it" for run in (first, second) for task in set(run.tasks) - shared
    }
    comparisons = []
    for task in sorted(shared):
        try:
            runs = load_task(first, task), load_task(second, task)
        except UnscoredRowsError as error:
            reasons[task] = str(error)
        else:
            comparisons.append(_compare(task, *runs))
    if not comparisons:
        raise SoloError("; ".join(reasons.values()))
    return comparisons, dict(sorted(reasons.items()))


def _compare(task: str, first: SavedTask, second: SavedTask) -> Comparison:
    runs = [{answer.prediction.id: answer for answer in run.answers} for run in (first, second)]
    pairs = [(runs[0][name], runs[1][name]) for name in runs[0] if name in runs[1]]
    if not pairs:
        raise SoloError(f"{task}: the two runs have no row in common")
    for one, other in pairs:
        asked = first.asked(one.prediction), second.asked(other.prediction)
        if one.reference != other.reference or asked[0] != asked[1]:
            raise SoloError(
                f"{task}: row {one.prediction.id} is another question in the second run; "
                "compare runs on the same data"
            )
    units, other_units = (first.units(answers) for answers in zip(*pairs, strict=True))
    difference, interval, p_value = paired_difference(units, other_units)
    return Comparison(
        task=task,
        title=first.title,
        n=len(pairs),
        left_out=sum(map(len, runs)) - 2 * len(pairs),
        first=score_of(units),
        second=score_of(other_units),
        difference=difference,
        interval=interval,
        p_value=p_value,
        only_first=sum(one.correct and not other.correct for one, other in pairs),
        only_second=sum(other.correct and not one.correct for one, other in pairs),
        maximum=first.maximum,
    )
