"""A score on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from solo_vlm.cli._common import STDOUT

if TYPE_CHECKING:
    from solo_vlm.evaluate.score import Score


def print_score(score: Score) -> None:
    """The score with its categories, and how it is computed."""
    from rich.table import Table

    table = Table(title=score.name, title_justify="left", title_style="bold", show_edge=False)
    table.add_column("", overflow="fold", min_width=20)
    more = list(dict.fromkeys(name for part in score.breakdown.values() for name in part.more))
    for column in (*(name.replace("_plus", "+") for name in more), "score", "95% interval", "rows"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("all", *[""] * len(more), *_cells(score.score, score.interval, score.n), style="bold")
    group = ""
    for name, part in score.breakdown.items():
        if part.group != group:
            table.add_section()
        group = part.group
        figures = [f"{part.more[key]:.1f}" if key in part.more else "" for key in more]
        table.add_row(name, *figures, *_cells(part.score, part.interval, part.n))
    STDOUT.print(table)
    for line in _notes(score):
        STDOUT.print(line, highlight=False)


def _cells(score: float, interval: tuple[float, float], n: int) -> list[str]:
    low, high = interval
    return [f"{score:,.1f}", f"{low:,.1f} to {high:,.1f}", f"{n:,}"]


def _notes(score: Score) -> list[str]:
    notes = [f"score: {score.metric}", f"source: {score.source}"]
    notes += [f"{name}: {value:.2f}" for name, value in score.raw.items()]
    if score.unreadable:
        notes.append(f"answers that could not be read, and count as wrong: {score.unreadable:,}")
    if score.bad_rows:
        rows = ", ".join(score.bad_rows[:10]) + (", ..." if len(score.bad_rows) > 10 else "")
        notes.append(f"bad rows, which count as wrong: {len(score.bad_rows):,} (rows {rows})")
    if score.filtered:
        notes.append(f"rows that do not belong to this score, and are set aside: {score.filtered:,}")
    return notes
