"""Chat samples of every stage, built from scenes, digits and texts.

A sample is {"id", "messages": [{"role", "content": [part, ...]}], "images": [{"bytes", "path"}]}. A part is
{"type": "image"} or {"type": "text", "text"}; the n-th image part refers to the n-th image.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from . import texts
from .grids import GRIDS, Grid
from .scenes import (
    DIGIT_QUESTION,
    FAMILIES,
    Question,
    Scene,
    bar_chart,
    counted_objects,
    held_out_digit,
    single_object,
    training_digit,
    two_objects,
    written_letter,
    written_word,
)

CAPTION_REQUEST = "Describe the image."

Sample = dict[str, Any]
Build = Callable[[np.random.Generator], Sample]
Draw = Callable[[np.random.Generator], Scene]
_Drawn = TypeVar("_Drawn", Scene, Grid)

# Sampling probabilities of the scenes, per stage: more of what is slowest to learn. In the first two stages
# that is letters and words, in the last two questions about two objects and about the heights of bars.
_NAMED: dict[Draw, float] = {
    training_digit: 0.4,
    written_letter: 0.28,
    written_word: 0.18,
    single_object: 0.14,
}
_CAPTIONED: dict[Draw, float] = {
    written_word: 0.28,
    counted_objects: 0.24,
    two_objects: 0.2,
    training_digit: 0.13,
    bar_chart: 0.12,
    single_object: 0.03,
}
_ASKED: dict[Draw, float] = {
    two_objects: 0.36,
    bar_chart: 0.22,
    counted_objects: 0.18,
    written_word: 0.13,
    training_digit: 0.07,
    single_object: 0.04,
}


def text_sample(rng: np.random.Generator) -> Sample:
    """Build a text of the LLM's corpus."""
    return pretraining_sample(texts.document(rng))


def stage1_sample(rng: np.random.Generator) -> Sample:
    """Build an image of one object with its class name: "red circle", "seven", "b"."""
    scene = _draw(rng, _NAMED)
    return pretraining_sample(scene.name, scene.image)


def stage2_sample(rng: np.random.Generator) -> Sample:
    """Build an image with its caption."""
    scene = _draw(rng, _CAPTIONED)
    return pretraining_sample(scene.caption, scene.image)


def stage3_sample(rng: np.random.Generator) -> Sample:
    """Build an image with its caption, with two to four questions and answers, or with both.

    Without a caption, questions can only be answered from the image.
    """
    scene = _draw(rng, _ASKED)
    kind = rng.random()
    if kind < 0.2:
        return pretraining_sample(scene.caption, scene.image)
    asked = _some(rng, scene.questions, int(rng.integers(2, 5)))
    text = [f"{question} {answer}." for question, answer in asked]
    if kind < 0.5:
        text.insert(0, f"{scene.caption}.")
    return pretraining_sample(" ".join(text), scene.image)


def instruction_sample(rng: np.random.Generator) -> Sample:
    """Build a chat: a question without an image, a caption request, or one to three questions on an image."""
    kind = rng.random()
    if kind < 0.1:
        return chat_sample([texts.question(rng)])
    scene = _draw(rng, _ASKED)
    if kind < 0.3:
        return chat_sample([(CAPTION_REQUEST, scene.caption)], scene.image)
    turns = int(rng.choice((1, 2, 3), p=(0.2, 0.3, 0.5)))
    return chat_sample(_some(rng, scene.questions, turns), scene.image)


def grid_sample(rng: np.random.Generator) -> Sample:
    """Build a chat of up to three questions about shapes in a grid, or name a single shape.

    Names come first: without them, a small model took a thousand steps to begin to look at images.
    """
    if rng.random() < 0.5:
        scene = single_object(rng)
        return pretraining_sample(scene.name, scene.image)
    image, questions = _draw(rng, GRIDS)
    return chat_sample(_some(rng, questions, 3), image)


def held_out_digit_sample(index: int) -> Sample:
    """Build the question which digit the held-out image number `index` shows."""
    scene = held_out_digit(index)
    return chat_sample([(DIGIT_QUESTION, scene.name)], scene.image)


def held_out_caption_sample(index: int, rng: np.random.Generator) -> Sample:
    """Build a caption request; scene families alternate, and half of the pairs are reserved ones."""
    scene = _held_out_scene(index, rng)
    return chat_sample([(CAPTION_REQUEST, scene.caption)], scene.image)


def held_out_question_sample(index: int, rng: np.random.Generator) -> Sample:
    """Build one question; scene families alternate, and half of the pairs are reserved ones."""
    scene = _held_out_scene(index, rng)
    return chat_sample(_some(rng, scene.questions, 1), scene.image)


def held_out_grid_sample(index: int, rng: np.random.Generator) -> Sample:
    """Build one question about shapes in a grid; the kinds of grids alternate."""
    image, questions = tuple(GRIDS)[index % len(GRIDS)](rng)
    return chat_sample(_some(rng, questions, 1), image)


def pretraining_sample(text: str, image: Image.Image | None = None) -> Sample:
    """Build a chat of one assistant turn: the image, if any, then the text."""
    return _sample([_turn("assistant", text, image is not None)], image)


def chat_sample(exchanges: Sequence[Question], image: Image.Image | None = None) -> Sample:
    """Build a chat of questions and answers; the image, if any, precedes the first question."""
    messages = []
    for number, (question, answer) in enumerate(exchanges):
        messages.append(_turn("user", question, image is not None and number == 0))
        messages.append(_turn("assistant", answer))
    return _sample(messages, image)


def _sample(messages: list[dict[str, Any]], image: Image.Image | None) -> Sample:
    images = [] if image is None else [{"bytes": _png(image), "path": None}]
    return {"id": "", "messages": messages, "images": images}


def _turn(role: str, text: str, with_image: bool = False) -> dict[str, Any]:
    content: list[dict[str, str]] = [{"type": "image"}] if with_image else []
    return {"role": role, "content": [*content, {"type": "text", "text": text}]}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _draw(rng: np.random.Generator, shares: dict[Callable[[np.random.Generator], _Drawn], float]) -> _Drawn:
    draws = tuple(shares)
    return draws[rng.choice(len(draws), p=tuple(shares.values()))](rng)


def _some(rng: np.random.Generator, questions: Sequence[Question], count: int) -> list[Question]:
    return [questions[index] for index in rng.permutation(len(questions))[:count]]


def _held_out_scene(index: int, rng: np.random.Generator) -> Scene:
    turn, family = divmod(index, len(FAMILIES))
    draw = list(FAMILIES.values())[family]
    return two_objects(rng, reserved=True) if draw is two_objects and turn % 2 else draw(rng)
