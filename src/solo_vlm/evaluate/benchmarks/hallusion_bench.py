"""HallusionBench: yes-or-no questions about figures and manipulated copies of them, asked in groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from solo_vlm.evaluate.predictions import Prediction, present
from solo_vlm.evaluate.scoring.extract import final_text
from solo_vlm.evaluate.scoring.score import (
    Benchmark,
    Part,
    ScoredAnswer,
    accuracy,
    by_category,
    group_units,
)
from solo_vlm.evaluate.scoring.vqa import without_punctuation

_YES_NO = {"1": "yes", "0": "no", "yes": "yes", "no": "no"}


def _read(response: str) -> str | None:
    """Return "yes" or "no" if the response has one of the words and not the other, as VLMEvalKit reads it."""
    words = set(without_punctuation(final_text(response).lower()).split())
    found = words & {"yes", "no"}
    return found.pop() if len(found) == 1 else None


def _score(prediction: Prediction) -> ScoredAnswer:
    """Score a row; where there is no figure to see, neither yes nor no is correct too."""
    reference = _YES_NO.get(str(prediction.column("gt_answer", "answer")).strip().lower())
    extracted = _read(prediction.response or "")
    unsure = extracted is None and not _has_figure(prediction.row)
    return ScoredAnswer.of(prediction, extracted, reference, 1.0 if unsure else None)


def _place(row: Mapping[str, Any], *numbers: str) -> str:
    """Return the group of a row: category, subcategory, set, and figure or question."""
    if not present(row.get("set_id")) and present(row.get("index")):
        # VLMEvalKit: the last three parts of the index are the numbers.
        parts = str(row["index"]).split("_")[-3:]
        row = {**row, **dict(zip(("set_id", "figure_id", "question_id"), parts, strict=False))}
    columns = [row.get("category"), row.get("subcategory", row.get("l2_category"))]
    columns += [str(row.get(number)).removesuffix(".0") for number in ("set_id", *numbers)]
    return "_".join(map(str, columns))


def _has_figure(row: Mapping[str, Any]) -> bool:
    return not (row.get("category") == "VS" and _place(row, "figure_id").endswith("_0"))


_question_units = group_units(lambda row: _place(row, "question_id"))
_figure_units = group_units(lambda row: _place(row, "figure_id"))


def _breakdown(answers: Sequence[ScoredAnswer]) -> dict[str, Part]:
    with_figure = [answer for answer in answers if _has_figure(answer.prediction.row)]
    metrics = {
        "aAcc (questions)": accuracy(answers, "metric"),
        "qAcc (questions over all figures)": accuracy(answers, "metric", units=_question_units),
    }
    if with_figure:
        metrics["fAcc (figures over all questions)"] = accuracy(with_figure, "metric", units=_figure_units)
    return {**metrics, **_by_category(answers)}


def _by_category(answers: Sequence[ScoredAnswer]) -> dict[str, Part]:
    def category(row: Mapping[str, Any]) -> list[str]:
        name = row.get("subcategory", row.get("l2_category"))
        return [f"{row.get('category')}, {name}"] if present(name) else []

    return by_category(answers, "category (aAcc)", category)


def _raw(answers: Sequence[ScoredAnswer]) -> dict[str, float]:
    parts = [part.score for part in _breakdown(answers).values() if part.group == "metric"]
    return {"mean of aAcc, qAcc and fAcc": sum(parts) / len(parts)} if len(parts) == 3 else {}


HALLUSION_BENCH = Benchmark(
    name="hallusion_bench_image",
    title="HallusionBench (image)",
    harness_task="hallusion_bench_image",
    hub_id="lmms-lab-encoder/HallusionBench",
    hub_files="data/image-*",
    split="image",
    license="BSD-3-Clause",
    kind="yes or no",
    size=951,
    size_source="Guan et al. 2023, arXiv 2310.14566: 951 of its 1,129 questions have a figure",
    metric="aAcc: correct answers / questions, in percent; qAcc and fAcc count a question, or a figure, "
    "if all of its answers are correct",
    source="Guan et al. 2023, arXiv 2310.14566, with its utils.py; yes and no are read by VLMEvalKit's "
    "rule, where the paper asks GPT-4",
    scorer=lambda predictions: [_score(prediction) for prediction in predictions],
    breakdown=_breakdown,
    raw=_raw,
    note="lmms-eval asks GPT-4, as the paper does.",
)
