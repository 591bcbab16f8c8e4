"""SEED-Bench: multiple-choice questions on images (9 dimensions) and videos (3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from solo_vlm.evaluate.benchmarks.benchmark import Benchmark
from solo_vlm.evaluate.multiple_choice import accuracy, by_category, score_choices
from solo_vlm.evaluate.predictions import present
from solo_vlm.evaluate.score import Part, ScoredAnswer

# Ids as in the corrected SEED-Bench.json (its issue 28): older copies name 3 and 4 the other way round.
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
DIMENSIONS = dict(enumerate((*_IMAGE_DIMENSIONS, *_VIDEO_DIMENSIONS), start=1))


_BY_ID = {str(number): name for number, name in DIMENSIONS.items()}


def _dimension(row: Mapping[str, Any]) -> list[str]:
    if present(row.get("question_type_id")):
        number = str(row["question_type_id"]).removesuffix(".0")
        return [_BY_ID.get(number, f"dimension {number}")]
    return [str(row["category"]).lower()] if present(row.get("category")) else []


def _is_image(row: Mapping[str, Any]) -> bool:
    if present(row.get("data_type")):
        return str(row["data_type"]).strip().lower() == "image"
    return not set(_dimension(row)) & set(_VIDEO_DIMENSIONS)


def _breakdown(answers: Sequence[ScoredAnswer]) -> dict[str, Part]:
    images = [answer for answer in answers if _is_image(answer.prediction.row)]
    videos = [answer for answer in answers if not _is_image(answer.prediction.row)]
    return {
        **by_category(images, "image dimension", _dimension),
        **by_category(videos, "video dimension", _dimension),
    }


def _all_questions(answers: Sequence[ScoredAnswer]) -> dict[str, float]:
    return {"images and videos": accuracy(answers, "").score}


SEEDBENCH = Benchmark(
    name="seedbench",
    title="SEED-Bench (image)",
    harness_task="seedbench",
    hub_id="lmms-lab-encoder/SEED-Bench",
    hub_files="data/test-*",
    split="test",
    licence="CC BY-NC 4.0",
    kind="multiple choice",
    size=14_233,
    size_source="SEED-Bench v1: 14,233 image questions; the hub's split has 17,990 rows with videos",
    metric="right answers / image questions, in per cent",
    source="Li et al. 2023, arXiv 2307.16125; papers print the image split",
    scorer=score_choices,
    breakdown=_breakdown,
    belongs=_is_image,
    raw=_all_questions,
    note="lmms-eval reads the first character only; here the option is read wherever it is named.",
)
