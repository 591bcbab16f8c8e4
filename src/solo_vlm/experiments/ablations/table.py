"""The figures of an ablation as lines of text, for the terminal and for pages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

COLUMNS = ("metric", "arm", "mean", "difference", "95% interval", "p")


def results_table(facts: dict[str, Any]) -> Table:
    """For the terminal.

    Args:
        facts: see `Report.as_dict`.
    """
    table = Table(title=facts["question"], title_justify="left", show_edge=False)
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
    for line in lines(facts):
        if line[0]:
            table.add_section()
        table.add_row(*line)
    return table


def lines(facts: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A line for each arm on each metric, with the columns of `COLUMNS`; the metric on its first line alone.

    Args:
        facts: see `Report.as_dict`.
    """
    for metric, found in facts["metrics"].items():
        share = found["kind"] == "accuracy"
        for number, (arm, mean) in enumerate(found["means"].items()):
            value = f"{mean['mean']:.1%}" if share else f"{mean['mean']:.3f}"
            difference = found["differences"].get(arm)
            compared = _difference(difference, share) if difference else ("", "", "")
            yield ("" if number else metric, arm, value, *compared)


def _difference(difference: dict[str, Any], share: bool) -> tuple[str, str, str]:
    """The difference, its interval and its p-value; differences of shares in percentage points."""
    mean, low, high = (difference[key] * (100 if share else 1) for key in ("mean", "low", "high"))
    p = "-" if difference["p_value"] is None else f"{difference['p_value']:.3f}"
    if share:
        return f"{mean:+.1f} pp", f"{low:+.1f} to {high:+.1f}", p
    return f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}", p
