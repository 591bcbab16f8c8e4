"""Quickstart report: scores, loss curve, and held-out images with the model's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from solo_vlm.evaluate.held_out import HeldOutAnswer
from solo_vlm.utils.files import write_text
from solo_vlm.utils.pages import image_url, png_url, render, save_figure

Answers = Mapping[str, Sequence[HeldOutAnswer]]

_SHOWN = 24  # answers per kind
_SCORES = {
    "digits_accuracy": ("handwritten digits recognized", "digits"),
    "caption_exact_match": ("captions matched exactly", "captions"),
    "qa_accuracy": ("questions about images answered correctly", "qa"),
}


def results_table(metrics: dict[str, Any]) -> Table:
    """Return the scores on held-out images and the losses of the stages, for the terminal."""
    table = Table(title="Quickstart, on held-out images", show_edge=False)
    table.add_column("metric")
    table.add_column("result", justify="right")
    table.add_column("of", justify="right")
    for key, (description, kind) in _SCORES.items():
        table.add_row(description, f"{metrics[key]:.1%}", str(metrics["held_out"][kind]))
    table.add_section()
    for name, stage in metrics["stages"].items():
        losses = f"{stage['loss_first']:.2f} -> {stage['loss_last']:.2f}"
        table.add_row(f"loss of {name}", losses, f"{stage['steps']} steps")
    table.add_section()
    table.add_row("time", f"{metrics['seconds']:.0f} s", f"{metrics['tokens_per_second']:,} tokens/s")
    return table


def write_loss_curve(path: Path, metrics: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Plot the loss of all stages in sequence (their lines of `metrics.jsonl`) as a PNG file."""
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
    axes.set(xlabel="step", ylabel="loss (nats per supervised token)", ylim=(0, None), xlim=(0, offset))
    axes.legend(ncols=len(metrics), frameon=False)
    save_figure(figure, path)


def _smooth(losses: np.ndarray, window: int = 9) -> np.ndarray:
    """Return the moving average, over a window that narrows toward both ends."""
    half = np.minimum(window // 2, np.minimum(np.arange(len(losses)), np.arange(len(losses))[::-1]))
    return np.array([losses[i - h : i + h + 1].mean() for i, h in enumerate(half)])


def write_examples(folder: Path, answers: Answers) -> None:
    """Save the first held-out image of each kind, for trying the model."""
    folder.mkdir()
    for kind, name in (("digits", "digit"), ("captions", "caption"), ("qa", "question")):
        answers[kind][0].image.save(folder / f"{name}.png")


def write_report(path: Path, metrics: Mapping[str, Any], answers: Answers, loss_curve: Path) -> None:
    """Write the report as one self-contained HTML file."""
    html = render(
        "solo_vlm.quickstart",
        "report.html.jinja",
        metrics=metrics,
        scores=_SCORES,
        loss_curve=png_url(loss_curve.read_bytes()),
        kinds={name: given[:_SHOWN] for name, given in answers.items()},
        wrong=[answer for given in answers.values() for answer in given if not answer.correct][:_SHOWN],
        image_url=image_url,
    )
    write_text(path, html)
