"""The report of a quickstart: scores, loss curve, and held-out images beside the model's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from solo_vlm.evaluate.held_out import HeldOutAnswer
from solo_vlm.utils.files import new_file
from solo_vlm.utils.pages import image_url, png_url, render

Answers = Mapping[str, Sequence[HeldOutAnswer]]

_SHOWN = 24  # answers of each kind


def write_loss_curve(path: Path, metrics: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Draw the loss of all stages, one after the other, as a PNG.

    Args:
        path: of the file.
        metrics: lines of each stage's metrics, in order.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots()
    offset = 0.0
    for stage, lines in metrics.items():
        steps = [offset + line["step"] for line in lines]
        losses = np.array([line["loss"] for line in lines])
        (faint,) = axes.plot(steps, losses, linewidth=0.6, alpha=0.3)
        axes.plot(steps, _smooth(losses), color=faint.get_color(), label=stage)
        offset += lines[-1]["step"]
        axes.axvline(offset, color="0.85", linewidth=1, zorder=0)
    axes.set(xlabel="step", ylabel="loss (nats a supervised token)", ylim=(0, None), xlim=(0, offset))
    axes.legend(ncols=len(metrics), frameon=False)
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _smooth(losses: np.ndarray, window: int = 9) -> np.ndarray:
    """Mean over a window that narrows towards both ends."""
    half = np.minimum(window // 2, np.minimum(np.arange(len(losses)), np.arange(len(losses))[::-1]))
    return np.array([losses[i - h : i + h + 1].mean() for i, h in enumerate(half)])


def write_examples(folder: Path, answers: Answers) -> None:
    """Save the first held-out image of each kind, to be asked about."""
    folder.mkdir()
    for kind, name in (("digits", "digit"), ("captions", "caption"), ("qa", "question")):
        answers[kind][0].image.save(folder / f"{name}.png")


def write_report(path: Path, metrics: Mapping[str, Any], answers: Answers, loss_curve: Path) -> None:
    """Write the report as one HTML file that needs nothing else."""
    html = render(
        "solo_vlm.quickstart",
        "report.html.jinja",
        metrics=metrics,
        loss_curve=png_url(loss_curve.read_bytes()),
        kinds={name: given[:_SHOWN] for name, given in answers.items()},
        wrong=[answer for given in answers.values() for answer in given if not answer.correct][:_SHOWN],
        picture=image_url,
    )
    with new_file(path) as partial:
        partial.write_text(html)
