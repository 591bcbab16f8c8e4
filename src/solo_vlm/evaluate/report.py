"""The report of an evaluation run: scores beside published ones, categories, answers with their images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from solo_vlm.evaluate.benchmarks import Benchmark
from solo_vlm.evaluate.published import PUBLISHED
from solo_vlm.evaluate.rows import Rows
from solo_vlm.evaluate.score import Part, Score, ScoredAnswer
from solo_vlm.models.solo.image_loading_solo import ImageError
from solo_vlm.utils.files import new_file
from solo_vlm.utils.pages import figure_url, render, thumbnail_url

_SHOWN = 12  # right answers, and as many wrong ones, of each task


@dataclass(frozen=True)
class TaskReport:
    """What a report tells of one task.

    Attributes:
        benchmark: the task.
        score: of the run.
        answers: one a row, in the order of the rows.
        rows: of the benchmark; the run may have asked the first of them only.
        prompt: the exact text of the prompt of a row, by its number.
        facts: what was run, for the record.
    """

    benchmark: Benchmark
    score: Score
    answers: Sequence[ScoredAnswer]
    rows: Rows
    prompt: Callable[[int], str]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Card:
    """One answer as the page shows it."""

    id: str
    images: Sequence[str]
    prompt: str
    answer: ScoredAnswer


def write_reports(folder: Path, facts: Mapping[str, Any], reports: Sequence[TaskReport]) -> None:
    """Write `report.html`, one file that needs nothing else, and `report.md`, without images.

    Args:
        folder: of the run.
        facts: what was run: model, versions, settings.
        reports: one a task.
    """
    values = {
        "facts": facts,
        "reports": reports,
        "scores": [report.score for report in reports],
        "published": [model for model in PUBLISHED if any(r.score.task in model.scores for r in reports)],
    }
    html = render(
        "solo_vlm.evaluate",
        "report.html.jinja",
        **values,
        plot=lambda score: figure_url(category_plot(score)),
        cards=_cards,
    )
    markdown = render("solo_vlm.evaluate", "report.md.jinja", **values)
    for name, page in (("report.html", html), ("report.md", markdown)):
        with new_file(folder / name) as partial:
            partial.write_text(page, encoding="utf-8")


def category_plot(score: Score) -> Any:
    """Bars of the score of each category, in per cent of a perfect model's, with 95% intervals."""
    from matplotlib.figure import Figure

    parts = score.breakdown
    groups = list(dict.fromkeys(part.group for part in parts.values()))
    figure = Figure(figsize=(9, 0.7 + 0.26 * len(parts)), layout="constrained")
    axes = figure.subplots()
    for color, group in enumerate(groups):
        members = {name: part for name, part in parts.items() if part.group == group}
        axes.barh(
            [f"{name}  ({part.n:,})" for name, part in members.items()],
            [_share(part, part.score) for part in members.values()],
            xerr=np.transpose([_error(part) for part in members.values()]),
            color=f"C{color}",
            ecolor="0.4",
            label=group,
            height=0.7,
        )
    axes.set(xlim=(0, 100), ylim=(len(parts) - 0.5, -0.5), xlabel="per cent of a perfect model")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    if len(groups) > 1:
        figure.legend(loc="outside upper center", ncols=len(groups), frameon=False)
    return figure


def _share(part: Part, value: float) -> float:
    return 100 * value / part.maximum


def _error(part: Part) -> tuple[float, float]:
    """How far the interval reaches below and above the score."""
    low, high = part.interval
    return max(0.0, _share(part, part.score - low)), max(0.0, _share(part, high - part.score))


def _cards(report: TaskReport, correct: bool) -> list[Card]:
    """A sample of the right or the wrong answers, spread evenly over the rows."""
    numbers = [number for number, answer in enumerate(report.answers) if answer.correct == correct]
    places = np.linspace(0, len(numbers) - 1, min(_SHOWN, len(numbers))).round().astype(int)
    return [_card(report, numbers[place]) for place in places]


def _card(report: TaskReport, number: int) -> Card:
    try:
        images = [thumbnail_url(image) for image in report.rows.images(number)]
    except ImageError:  # the card says so: the row has no response
        images = []
    return Card(report.rows.ids[number], images, report.prompt(number), report.answers[number])
