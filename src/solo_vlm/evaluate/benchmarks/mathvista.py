"""MathVista, testmini: 1,000 questions on mathematics with images; options, integers, floats and lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from solo_vlm.evaluate.benchmarks.benchmark import Benchmark
from solo_vlm.evaluate.llm_judge import LlmJudge
from solo_vlm.evaluate.mathvista_answers import Problem
from solo_vlm.evaluate.multiple_choice import by_category, by_column, score_answer
from solo_vlm.evaluate.options import as_list, parsed
from solo_vlm.evaluate.predictions import Prediction, present
from solo_vlm.evaluate.score import Part, ScoredAnswer

_TASKS = {
    "figure question answering": 269,
    "geometry problem solving": 208,
    "math word problem": 186,
    "textbook question answering": 158,
    "visual question answering": 179,
}
_SKILLS = {
    "algebraic reasoning": 281,
    "arithmetic reasoning": 353,
    "geometry reasoning": 239,
    "logical reasoning": 37,
    "numeric commonsense": 144,
    "scientific reasoning": 122,
    "statistical reasoning": 301,
}
_by_answer_type = by_column("answer type", "answer_type")


def with_llm_judge(judge: LlmJudge) -> Benchmark:
    """MathVista as its paper scores it: a language model extracts the answers."""
    return replace(
        MATHVISTA,
        scorer=judge,
        metric="right answers / questions, in per cent; answers extracted by the language model "
        f"{judge.model}, the nearest option taken where none is spelled exactly",
        source="Lu et al. 2023, arXiv 2310.02255, with its calculate_score.py; the prompt is this project's",
    )


def _score_by_rules(predictions: Sequence[Prediction]) -> list[ScoredAnswer]:
    return [_score(prediction) for prediction in predictions]


def _score(prediction: Prediction) -> ScoredAnswer:
    problem = Problem.of(prediction)
    reference = problem.normalise(prediction.column("answer"))
    extraction = prediction.row.get("extraction")
    if present(extraction):
        extracted = problem.read_extraction(str(extraction))
    else:
        extracted = problem.read(prediction.response or "")
    return score_answer(prediction, extracted, reference)


def _breakdown(answers: Sequence[ScoredAnswer]) -> dict[str, Part]:
    return {
        **by_category(answers, "task", _task, _TASKS),
        **by_category(answers, "skill", _skills, _SKILLS),
        **_by_answer_type(answers),
    }


def _task(row: Mapping[str, Any]) -> list[str]:
    task = _metadata(row).get("task")
    return [str(task)] if present(task) else []


def _skills(row: Mapping[str, Any]) -> list[str]:
    return as_list(_metadata(row).get("skills"))


def _metadata(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The column `metadata`, text in a table; VLMEvalKit has its entries as columns of their own."""
    metadata = row.get("metadata")
    if isinstance(metadata, str):
        metadata = parsed(metadata)
    return metadata if isinstance(metadata, Mapping) else row


MATHVISTA = Benchmark(
    name="mathvista",
    title="MathVista (testmini)",
    harness_task="mathvista_testmini_format",
    hub_id="AI4Math/MathVista",
    hub_files="data/testmini-*",
    split="testmini",
    licence="CC BY-SA 4.0",
    kind="free",
    size=1000,
    size_source="data set card of AI4Math/MathVista; tasks and skills as VLMEvalKit counts them",
    metric="rule-based: right answers / questions, in per cent; an option's letter or exact text is read, or "
    "a number, and nothing is guessed (an `extraction` that a file brings along is taken as it is)",
    source="Lu et al. 2023, arXiv 2310.02255, with the normalisation of its calculate_score.py; the paper "
    "extracts answers with GPT-4",
    scorer=_score_by_rules,
    breakdown=_breakdown,
)
