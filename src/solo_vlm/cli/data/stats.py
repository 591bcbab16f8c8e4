"""`solo data stats`: what a mixture holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from solo_vlm.cli._common import STDOUT, print_json, progress_bar, quiet_libraries
from solo_vlm.cli.data._arguments import Json, MixtureFile, Overrides

if TYPE_CHECKING:
    from rich.table import Table

_COUNTS = ("instances", "samples", "images", "tokens")


def stats(
    mixture: MixtureFile,
    overrides: Overrides = None,
    exact: Annotated[bool, typer.Option("--exact", help="Read everything once.")] = False,
    samples: Annotated[
        int, typer.Option(min=10, help="Rows to draw from each source for an estimate.")
    ] = 1000,
    json: Json = False,
) -> None:
    """Count packed sequences, images, text and vision tokens of each source: the paper's Table 1."""
    quiet_libraries()
    from solo_vlm.data.encode import load_encoder
    from solo_vlm.data.mixture import Mixture
    from solo_vlm.data.survey.stats import mixture_stats

    settings = Mixture.load(mixture, overrides or [])
    encoder = load_encoder(settings.model_source())
    with progress_bar("reading") as on_progress:
        facts = mixture_stats(settings, encoder, None if exact else samples, on_progress).as_dict()
    if json:
        print_json(facts)
        return
    STDOUT.print(_table(facts))
    _print_notes(facts)


def _table(facts: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(show_edge=False)
    table.add_column("source", overflow="fold", min_width=20)
    for column in (*_COUNTS, "share", "text tokens", "vision tokens", "fill", "skipped"):
        table.add_column(column, justify="right", no_wrap=True)
    for source in facts["sources"]:
        table.add_row(*_cells(source["source"], source, source["share"]))
    table.add_section()
    total = facts["total"]
    table.add_row(*_cells("total", total, 1.0))
    shares = [f"{total[name]:.2%}" for name in ("text_share", "vision_share")]
    table.add_row("share", *[""] * (len(_COUNTS) + 1), *shares)
    return table


def _cells(name: str, facts: dict[str, Any], share: float) -> list[str]:
    return [
        name,
        *(f"{facts[count]:,}" for count in _COUNTS),
        f"{share:.2%}",
        f"{facts['text_tokens']:,}",
        f"{facts['vision_tokens']:,}",
        f"{facts['fill']:.4f}",
        f"{sum(facts['skipped'].values()):,}",
    ]


def _print_notes(facts: dict[str, Any]) -> None:
    total = facts["total"]
    if total["skipped"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in total["skipped"].items())
        STDOUT.print(f"skipped: {reasons}", highlight=False)
    if facts["exact"]:
        return
    intervals = {name: f"{low:,} to {high:,}" for name, (low, high) in total["interval_95"].items()}
    STDOUT.print(
        f"An estimate from up to {facts['rows_drawn']:,} rows a source; --exact reads everything. "
        f"95% intervals of the totals:\n  tokens {intervals['tokens']}\n"
        f"  text tokens {intervals['text_tokens']}\n  vision tokens {intervals['vision_tokens']}\n"
        f"  images {intervals['images']}",
        highlight=False,
    )
