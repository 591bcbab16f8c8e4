"""Reports of an evaluation run: scores next to published ones, categories, answers with their images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from solo_vlm.evaluate.data import Rows
from solo_vlm.evaluate.scoring.score import Part, Score, ScoredAnswer, points, span
from solo_vlm.models.solo.image_loading_solo import ImageError
from solo_vlm.utils.files import write_text
from solo_vlm.utils.pages import figure_url, render, thumbnail_url

_SHOWN = 12  # correct answers, and as many wrong ones, per task


@dataclass(frozen=True)
class PublishedModel:
    """A model with published scores."""

    name: str
    source: str  # paper that presents it
    scores: Mapping[str, float]  # by benchmark, on this project's scale
    unverified: frozenset[str] = frozenset()  # benchmarks whose score could not be traced to its source


PUBLISHED = (
    PublishedModel(
        "SOLO-7B",
        "Chen et al. 2024, arXiv 2407.06438",
        {"mmstar": 35.5, "mme": 1260, "seedbench": 64.4, "ai2d": 61.4, "scienceqa": 73.3, "mathvista": 34.4},
        unverified=frozenset({"mmstar"}),
    ),
    PublishedModel(
        "LLaVA-1.5-7B",
        "Liu et al. 2023, arXiv 2310.03744, and later comparisons",
        {"mmstar": 33.1, "mme": 1859, "seedbench": 64.3, "ai2d": 54.8, "scienceqa": 66.8, "mathvista": 25.5},
    ),
    PublishedModel(
        "EVEv2-7B",
        "Diao et al. 2025, arXiv 2502.06788",
        {"mme": 1709, "seedbench": 71.4, "ai2d": 74.8, "scienceqa": 96.2, "mathvista": 60.0},
    ),
    PublishedModel(
        "NEO-9B",
        "Diao et al. 2025, arXiv 2510.14979",
        {"mmstar": 62.4, "seedbench": 76.3, "ai2d": 83.1},
    ),
)


@dataclass(frozen=True)
class TaskReport:
    """Content of a report about one task."""

    score: Score
    answers: Sequence[ScoredAnswer]  # in order of the rows
    rows: Rows  # a limited run has answers to the first only
    prompt: Callable[[int], str]  # returns the exact text of a row's prompt
    metadata: Mapping[str, Any]  # settings, failures and duration


def write_reports(folder: Path, run: Mapping[str, Any], reports: Sequence[TaskReport]) -> None:
    """Write `report.html`, a self-contained page, and `report.md`, without images, into a run's folder."""
    values = {
        "run": run,
        "reports": reports,
        "scores": [report.score for report in reports],
        "published": [model for model in PUBLISHED if any(r.score.task in model.scores for r in reports)],
    }
    tools = {"plot": lambda score: figure_url(category_plot(score)), "cards": _cards}
    tools |= {"points": points, "span": span}
    for name in ("report.html", "report.md"):
        page = render("solo_vlm.evaluate", f"{name}.jinja", **values, **tools)
        write_text(folder / name, page)


def category_plot(score: Score) -> Any:
    """Plot the score of each category in percent of a perfect model's, with 95% intervals."""
    from matplotlib.figure import Figure

    parts = score.breakdown
    groups = list(dict.fromkeys(part.group for part in parts.values()))
    figure = Figure(figsize=(9, 0.7 + 0.26 * len(parts)), layout="constrained")
    axes = figure.subplots()
    for color, group in enumerate(groups):
        members = {name: part for name, part in parts.items() if part.group == group}
        axes.barh(
            [f"{name}  ({part.n:,})" for name, part in members.items()],
            [_percent(part, part.score) for part in members.values()],
            xerr=np.transpose([_error(part) for part in members.values()]),
            color=f"C{color}",
            ecolor="0.4",
            label=group,
            height=0.7,
        )
    axes.set(xlim=(0, 100), ylim=(len(parts) - 0.5, -0.5), xlabel="percent of a perfect model")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    if len(groups) > 1:
        figure.legend(loc="outside upper center", ncols=len(groups), frameon=False)
    return figure


def _percent(part: Part, value: float) -> float:
    return 100 * value / (part.maximum or 100.0)


def _error(part: Part) -> tuple[float, float]:
    """Return the lengths of the interval below and above the score, in percent."""
    low, high = part.interval or (part.score, part.score)
    return max(0.0, _percent(part, part.score - low)), max(0.0, _percent(part, high - part.score))


def _cards(report: TaskReport, correct: bool) -> list[dict[str, Any]]:
    """Return a sample of the correct or the wrong answers, spread evenly over the rows."""
    numbers = [number for number, answer in enumerate(report.answers) if answer.correct == correct]
    cards = []
    for place in np.linspace(0, len(numbers) - 1, min(_SHOWN, len(numbers))).round().astype(int):
        number = numbers[place]
        try:
            images = [thumbnail_url(image) for image in report.rows.images(number)]
        except ImageError:  # the card shows no response either
            images = []
        answer, prompt = report.answers[number], report.prompt(number)
        cards.append({"id": report.rows.ids[number], "images": images, "prompt": prompt, "answer": answer})
    return cards
