"""ScienceQA: multiple-choice questions of school science, about half of them with an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from solo_vlm.evaluate.benchmarks.benchmark import Benchmark
from solo_vlm.evaluate.multiple_choice import by_category, by_column, score_listed_choices
from solo_vlm.evaluate.predictions import present
from solo_vlm.evaluate.score import Part, ScoredAnswer

_NO = ("", "false", "0", "0.0", "no", "none", "nan")
_by_subject = by_column("subject", "subject")


def _grade(row: Mapping[str, Any]) -> list[str]:
    digits = "".join(character for character in str(row.get("grade") or "") if character.isdigit())
    return [] if not digits else ["grades 1-6" if int(digits) <= 6 else "grades 7-12"]


def _context(row: Mapping[str, Any]) -> list[str]:
    """A question may have a text (its hint) and an image as context, one of them, or none."""
    if "hint" not in row and "has_image" not in row:
        return []
    contexts = ["text context"] * present(row.get("hint")) + ["image context"] * (
        "has_image" in row and _may_have_image(row)
    )
    return contexts or ["no context"]


def _breakdown(answers: Sequence[ScoredAnswer]) -> dict[str, Part]:
    return {
        **_by_subject(answers),
        **by_category(answers, "context", _context),
        **by_category(answers, "grade", _grade),
    }


def _may_have_image(row: Mapping[str, Any]) -> bool:
    return str(row.get("has_image", True)).strip().lower() not in _NO  # a table has it as text


SCIENCEQA = Benchmark(
    name="scienceqa",
    title="ScienceQA (image)",
    harness_task="scienceqa_img",
    hub_id="lmms-lab-encoder/ScienceQA",
    hub_config="ScienceQA-IMG",
    hub_files="ScienceQA-IMG/test-*",
    split="test",
    licence="CC BY-NC-SA 4.0",
    kind="multiple choice",
    size=2017,
    size_source="data set card of lmms-lab/ScienceQA",
    metric="right answers / questions with an image, in per cent",
    source="Lu et al. 2022, arXiv 2209.09513; LLaVA's papers print the image split",
    scorer=score_listed_choices,
    breakdown=_breakdown,
    belongs=_may_have_image,
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
    metric="right answers / questions, with and without an image, in per cent",
    source="Lu et al. 2022, arXiv 2209.09513",
    belongs=lambda row: True,
)
