"""The results of a quickstart as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

_ROWS = {
    "digits_accuracy": ("real handwritten digits named", "digits"),
    "caption_exact_match": ("captions right to the letter", "captions"),
    "qa_accuracy": ("questions about images answered", "qa"),
}


def results_table(metrics: dict[str, Any]) -> Table:
    """Scores on held-out images, and the losses of the stages."""
    table = Table(title="Quickstart, on held-out images", show_edge=False)
    table.add_column("what")
    table.add_column("result", justify="right")
    table.add_column("of", justify="right")
    for key, (what, kind) in _ROWS.items():
        table.add_row(what, f"{metrics[key]:.1%}", str(metrics["held_out"][kind]))
    table.add_section()
    for stage, figures in metrics["stages"].items():
        table.add_row(
            f"loss of {stage}",
            f"{figures['loss_first']:.2f} -> {figures['loss_last']:.2f}",
            f"{figures['steps']} steps",
        )
    table.add_section()
    table.add_row("time", f"{metrics['seconds']:.0f} s", f"{metrics['tokens_per_second']:,} tokens/s")
    return table
