"""Estimate of what it costs to ask validation questions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from solo_vlm.data.encode import Encoder, load_encoder
from solo_vlm.evaluate.questions import Question, load_questions
from solo_vlm.models.flops import ModelShape, forward_flops
from solo_vlm.train.questions import BATCH_SIZE
from solo_vlm.train.recipe import Recipe


@dataclass(frozen=True)
class QuestionEstimate:
    """Estimate for one file of questions.

    Attributes:
        name: Name of the file.
        path: Path as in the recipe.
        asked: Questions per evaluation.
        total: Questions of the file.
        example: First question, its accepted answers, and its metric.
        tokens: Mean tokens of a question with its images and its answer.
        flops: FLOPs of one evaluation, with answers of the maximum length.
    """

    name: str
    path: str
    asked: int
    total: int
    example: tuple[str, str, str]
    tokens: float
    flops: int


def estimate_questions(recipe: Recipe, source: str | Path, shape: ModelShape) -> list[QuestionEstimate]:
    """Estimate the cost of each file of questions.

    Args:
        source: Model whose processor encodes the questions.

    Raises:
        SoloError: A file or the processor cannot be read.
    """
    if recipe.validation is None or not recipe.validation.questions:
        return []
    settings, encoder = recipe.validation, load_encoder(source)
    estimates = []
    for name, rows in recipe.open_questions().items():
        file = settings.questions[name]
        questions, total = load_questions(rows, settings.samples, file.metric)
        sizes = [_size(encoder, question) for question in questions]
        new, first = settings.max_new_tokens, questions[0]
        flops = sum(
            forward_flops(shape, [tokens + new], patches, predicted=new).forward for tokens, patches in sizes
        )
        estimates.append(
            QuestionEstimate(
                *(name, file.path, len(questions), total),
                (first.question, first.expected, first.metric),
                sum(tokens for tokens, _ in sizes) / len(sizes),
                flops,
            )
        )
    return estimates


def forward_passes(recipe: Recipe, asked: int, groups: int) -> int:
    """Return the most forward passes that a process runs per evaluation, given the questions in all."""
    assert recipe.validation is not None
    return math.ceil(math.ceil(asked / groups) / BATCH_SIZE) * recipe.validation.max_new_tokens


def _size(encoder: Encoder, question: Question) -> tuple[int, int]:
    """Return the tokens and patches of a question with its answer."""
    document = encoder(question.sample)
    return len(document), len(document.pixel_values)
