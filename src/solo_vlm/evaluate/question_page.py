"""Page of questions with their images, accepted answers, and the responses of one or several models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from solo_vlm.evaluate.questions import Question
from solo_vlm.models.solo.image_loading_solo import ImageError, load_image
from solo_vlm.utils.files import write_text
from solo_vlm.utils.pages import render, thumbnail_url

MAX_SHOWN = 24  # questions per file


class Response(NamedTuple):
    """Response of a model to a question; None if it failed."""

    text: str | None
    credit: float


@dataclass(frozen=True)
class QuestionTable:
    """Questions of one file.

    Attributes:
        name: Name of the file.
        note: Sentence below the title.
        columns: Titles of the models, such as steps of a run.
        rows: Questions with the URLs of their images, and one response per model.
    """

    name: str
    note: str
    columns: Sequence[str]
    rows: Sequence[tuple[Question, Sequence[str], Sequence[Response]]]


def write_page(path: Path, title: str, tables: Sequence[QuestionTable]) -> None:
    """Write a self-contained page."""
    write_text(path, render("solo_vlm.evaluate", "question_page.html.jinja", title=title, tables=tables))


def shown_places(count: int) -> list[int]:
    """Return the places of the questions that a page shows, spread evenly over all."""
    step = -(-count // MAX_SHOWN) if count else 1
    return list(range(0, count, step))


def image_urls(question: Question) -> list[str]:
    """Return the images of a question as URLs of thumbnails; none if one cannot be read."""
    try:
        return [thumbnail_url(load_image(source)) for source in question.sample.images]
    except ImageError:
        return []
