"""The multiple-choice benchmarks: MMStar, SEED-Bench, AI2D, ScienceQA and RealWorldQA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from solo_vlm.evaluate.predictions import Prediction, present
from solo_vlm.evaluate.scoring.extract import clean, read_choice
from solo_vlm.evaluate.scoring.options import options_of, reference_letter
from solo_vlm.evaluate.scoring.score import Benchmark, Part, ScoredAnswer, accuracy, by_category, by_column


def score_choices(predictions: Sequence[Prediction], answers_are_indices: bool = False) -> list[ScoredAnswer]:
    """Score answers to questions whose reference is a letter or an option's text.

    With `answers_are_indices`, a number as the reference is an index into the options, from 0.
    """

    def score(prediction: Prediction) -> ScoredAnswer:
        options = options_of(prediction.row)
        reference = reference_letter(prediction, options, answers_are_indices)
        return ScoredAnswer.of(prediction, read_choice(prediction.response or "", options), reference)

    return [score(prediction) for prediction in predictions]


# ---------------------------------------------------------------------------------------------- MMStar

_MMSTAR_CATEGORIES = (
    "coarse perception",
    "fine-grained perception",
    "instance reasoning",
    "logical reasoning",
    "science & technology",
    "math",
)
_by_capability = by_column("category", "category", dict.fromkeys(_MMSTAR_CATEGORIES, 250))
_by_axis = by_column("axis", "l2_category")


def _macro_average(answers: Sequence[ScoredAnswer]) -> dict[str, float]:
    axes = _by_axis(answers).values()
    if not axes:
        return {}
    return {"mean of the 18 axes (lmms-eval's average)": sum(axis.score for axis in axes) / len(axes)}


MMSTAR = Benchmark(
    name="mmstar",
    title="MMStar",
    harness_task="mmstar",
    hub_id="Lin-Chen/MMStar",
    hub_files="mmstar.parquet",
    split="val",
    license="none stated on its card",
    kind="multiple choice",
    size=1500,
    size_source="Chen et al. 2024 (arXiv 2403.20330): 6 capabilities of 250 questions, 18 axes",
    metric="correct answers / questions, in percent",
    source="Chen et al. 2024, arXiv 2403.20330; VLMEvalKit computes the same",
    scorer=score_choices,
    breakdown=lambda answers: {**_by_capability(answers), **_by_axis(answers)},
    raw=_macro_average,
)

# ------------------------------------------------------------------------------------------ SEED-Bench

# IDs as in the corrected SEED-Bench.json (its issue 28): older copies swap 3 and 4.
_IMAGE_DIMENSIONS = (
    "scene understanding",
    "instance identity",
    "instance location",
    "instance attributes",
    "instances counting",
    "spatial relation",
    "instance interaction",
    "visual reasoning",
    "text understanding",
)
_VIDEO_DIMENSIONS = ("action recognition", "action prediction", "procedure understanding")
SEEDBENCH_DIMENSIONS = dict(enumerate((*_IMAGE_DIMENSIONS, *_VIDEO_DIMENSIONS), start=1))
_DIMENSION_BY_ID = {str(number): name for number, name in SEEDBENCH_DIMENSIONS.items()}


def _dimension(row: Mapping[str, Any]) -> list[str]:
    if present(row.get("question_type_id")):
        number = str(row["question_type_id"]).removesuffix(".0")
        return [_DIMENSION_BY_ID.get(number, f"dimension {number}")]
    return [str(row["category"]).lower()] if present(row.get("category")) else []


def _is_image(row: Mapping[str, Any]) -> bool:
    if present(row.get("data_type")):
        return str(row["data_type"]).strip().lower() == "image"
    return not set(_dimension(row)) & set(_VIDEO_DIMENSIONS)


def _by_dimension(answers: Sequence[ScoredAnswer]) -> dict[str, Part]:
    images = [answer for answer in answers if _is_image(answer.prediction.row)]
    videos = [answer for answer in answers if not _is_image(answer.prediction.row)]
    return {
        **by_category(images, "image dimension", _dimension),
        **by_category(videos, "video dimension", _dimension),
    }


SEEDBENCH = Benchmark(
    name="seedbench",
    title="SEED-Bench (image)",
    harness_task="seedbench",
    hub_id="lmms-lab-encoder/SEED-Bench",
    hub_files="data/test-*",
    split="test",
    license="CC BY-NC 4.0",
    kind="multiple choice",
    size=14_233,
    size_source="SEED-Bench v1: 14,233 image questions; the hub's split has 17,990 rows with videos",
    metric="correct answers / image questions, in percent",
    source="Li et al. 2023, arXiv 2307.16125; papers report the image split",
    scorer=score_choices,
    breakdown=_by_dimension,
    is_scored=_is_image,
    raw=lambda answers: {"images and videos": accuracy(answers, "").score},
    note="lmms-eval reads the first character only; here the option is read wherever it is named.",
)

# ------------------------------------------------------------------------------------------------ AI2D

AI2D = Benchmark(
    name="ai2d",
    title="AI2D (masked)",
    harness_task="ai2d",
    hub_id="lmms-lab-encoder/ai2d",
    hub_files="data/test-*",
    split="test",
    license="(unchecked)",
    kind="multiple choice",
    size=3088,
    size_source="dataset card of lmms-lab/ai2d",
    metric="correct answers / questions, in percent; labels in the diagram are replaced by letters",
    source="Kembhavi et al. 2016, arXiv 1603.07396",
    scorer=partial(score_choices, answers_are_indices=True),
    breakdown=by_column("category", "category"),
    note="The reference is the option's index, from 0.",
)
AI2D_NO_MASK = replace(
    AI2D,
    name="ai2d_no_mask",
    title="AI2D (not masked)",
    harness_task="ai2d_no_mask",
    hub_id="Efficient-Large-Model/ai2d-no-mask",
    size_source="dataset card of lmms-lab/ai2d-no-mask",
    metric="correct answers / questions, in percent; labels in the diagram are legible, which is easier",
)

# ------------------------------------------------------------------------------------------- ScienceQA

_FALSE = ("", "false", "0", "0.0", "no", "none", "nan")
_by_subject = by_column("subject", "subject")


def _grade(row: Mapping[str, Any]) -> list[str]:
    digits = "".join(character for character in str(row.get("grade") or "") if character.isdigit())
    return [] if not digits else ["grades 1-6" if int(digits) <= 6 else "grades 7-12"]


def _context(row: Mapping[str, Any]) -> list[str]:
    """Return the contexts of a question: a text (its hint), an image, both or neither."""
    if "hint" not in row and "has_image" not in row:
        return []
    contexts = ["text context"] if present(row.get("hint")) else []
    contexts += ["image context"] if "has_image" in row and _may_have_image(row) else []
    return contexts or ["no context"]


def _may_have_image(row: Mapping[str, Any]) -> bool:
    return str(row.get("has_image", True)).strip().lower() not in _FALSE  # text in a CSV file


SCIENCEQA = Benchmark(
    name="scienceqa",
    title="ScienceQA (image)",
    harness_task="scienceqa_img",
    hub_id="lmms-lab-encoder/ScienceQA",
    hub_config="ScienceQA-IMG",
    hub_files="ScienceQA-IMG/test-*",
    split="test",
    license="CC BY-NC-SA 4.0",
    kind="multiple choice",
    size=2017,
    size_source="dataset card of lmms-lab/ScienceQA",
    metric="correct answers / questions with an image, in percent",
    source="Lu et al. 2022, arXiv 2209.09513; LLaVA's papers report the image split",
    scorer=partial(score_choices, answers_are_indices=True),
    breakdown=lambda answers: {
        **_by_subject(answers),
        **by_category(answers, "context", _context),
        **by_category(answers, "grade", _grade),
    },
    is_scored=_may_have_image,
    note="lmms-eval calls this split scienceqa_img, and the full one scienceqa.",
)
SCIENCEQA_FULL = replace(
    SCIENCEQA,
    name="scienceqa_full",
    title="ScienceQA (full)",
    harness_task="scienceqa",
    hub_config="ScienceQA-FULL",
    hub_files="ScienceQA-FULL/test-*",
    size=4241,
    metric="correct answers / questions, with and without an image, in percent",
    source="Lu et al. 2022, arXiv 2209.09513",
    is_scored=lambda row: True,
)

# ----------------------------------------------------------------------------------------- RealWorldQA

_REALWORLDQA_REQUEST = "Please answer directly with"  # ends the question


def _score_realworldqa(predictions: Sequence[Prediction]) -> list[ScoredAnswer]:
    """Score the options that a question lists, after "A.", "B.", ...; other questions ask for a word."""

    def score(prediction: Prediction) -> ScoredAnswer:
        reference = str(prediction.column("answer")).strip()
        response = prediction.response or ""
        if reference.upper() not in ("A", "B", "C", "D"):
            words = clean(response).lower().rstrip(".")
            return ScoredAnswer.of(prediction, words or None, reference.lower() or None)
        question = str(prediction.row.get("question", "")).split(_REALWORLDQA_REQUEST)[0]
        options = options_of({**prediction.row, "question": question})
        return ScoredAnswer.of(prediction, read_choice(response, options), reference.upper())

    return [score(prediction) for prediction in predictions]


REALWORLDQA = Benchmark(
    name="realworldqa",
    title="RealWorldQA",
    harness_task="realworldqa",
    hub_id="lmms-lab-encoder/RealWorldQA",
    hub_files="data/test-*",
    split="test",
    license="CC BY-ND 4.0",
    kind="free",
    size=765,
    size_source="xAI 2024, the release of Grok-1.5 Vision",
    metric="correct answers / questions, in percent: an option, or else the exact word",
    source="xAI 2024, x.ai/news/grok-1.5v, without a script; the rules are lmms-eval's, without its guesses",
    scorer=_score_realworldqa,
    breakdown=lambda answers: {},
    note="lmms-eval takes a letter that occurs anywhere, such as the A of Apple, for an option.",
)
