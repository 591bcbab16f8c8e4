"""The matches of a contamination check on one HTML page, for the eye to judge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from solo_vlm.evaluate.contamination.check import Contamination, Match
from solo_vlm.evaluate.rows import Rows
from solo_vlm.utils.files import new_file
from solo_vlm.utils.pages import render, thumbnail_url

_SHOWN = 300  # of each kind; a page with thousands of images would open slowly


def write_page(path: Path, mixture: str, found: Contamination, benchmarks: Mapping[str, Rows]) -> None:
    """Write pairs of images, the nearest first, and shared words, as one file that needs nothing else.

    Args:
        path: of the file.
        mixture: its name.
        found: the matches.
        benchmarks: rows that were looked for.
    """
    images = sorted((m for m in found.matches if m.kind == "image"), key=lambda match: match.distance or 0)
    questions = [match for match in found.matches if match.kind == "question"]
    numbers = {task: {row: n for n, row in enumerate(rows.ids)} for task, rows in benchmarks.items()}

    def benchmark_images(match: Match) -> list[str]:
        pictures = benchmarks[match.task].images(numbers[match.task][match.id])
        return [thumbnail_url(picture) for picture in pictures]

    html = render(
        "solo_vlm.evaluate.contamination",
        "page.html.jinja",
        mixture=mixture,
        found=found,
        images=images,
        questions=questions,
        shown=_SHOWN,
        benchmark_images=benchmark_images,
    )
    with new_file(path) as partial:
        partial.write_text(html, encoding="utf-8")
