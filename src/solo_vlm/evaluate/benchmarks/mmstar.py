"""MMStar: 1,500 multiple-choice questions that cannot be answered without the image."""

from __future__ import annotations

from collections.abc import Sequence

from solo_vlm.evaluate.benchmarks.benchmark import Benchmark
from solo_vlm.evaluate.multiple_choice import by_column, score_choices
from solo_vlm.evaluate.score import Part, ScoredAnswer

_CATEGORIES = (
    "coarse perception",
    "fine-grained perception",
    "instance reasoning",
    "logical reasoning",
    "science & technology",
    "math",
)
_by_category = by_column("category", "category", dict.fromkeys(_CATEGORIES, 250))
_by_axis = by_column("axis", "l2_category")


def _breakdown(answers: Sequence[ScoredAnswer]) -> dict[str, Part]:
    return {**_by_category(answers), **_by_axis(answers)}


def _macro_average(answers: Sequence[ScoredAnswer]) -> dict[str, float]:
    axes = _by_axis(answers).values()
    if not axes:
        return {}
    return {"mean of the 18 axes (lmms-eval's average)": sum(axis.score for axis in axes) / len(axes)}


MMSTAR = Benchmark(
    name="mmstar",
    title="MMStar",
    harness_task="mmstar",
    hub_id="Lin-Chen/MMStar",
    hub_files="mmstar.parquet",
    split="val",
    licence="none stated on its card",
    kind="multiple choice",
    size=1500,
    size_source="Chen et al. 2024 (arXiv 2403.20330): 6 capabilities of 250 questions, 18 axes",
    metric="right answers / questions, in per cent",
    source="Chen et al. 2024, arXiv 2403.20330; VLMEvalKit computes the same",
    scorer=score_choices,
    breakdown=_breakdown,
    raw=_macro_average,
)
