"""Benchmarks with short texts as answers: ChartQA, DocVQA, InfoVQA, TextVQA, VQAv2 and OCRBench."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from solo_vlm.evaluate.predictions import Prediction
from solo_vlm.evaluate.scoring.extract import final_text
from solo_vlm.evaluate.scoring.options import parsed
from solo_vlm.evaluate.scoring.score import Benchmark, ScoredAnswer, Scorer, by_category, by_column
from solo_vlm.evaluate.scoring.text import anls
from solo_vlm.evaluate.scoring.vqa import textvqa_accuracy, vqa_accuracy

Credit = Callable[[str, Sequence[str]], tuple[float, str]]  # of a response and its form that was compared


def references_of(prediction: Prediction, lists_in_text: bool = True) -> list[str]:
    """Return the accepted answers of a row, from `answers` or `answer`; empty if it has none.

    A cell is a text, a list of texts, a list of `{"answer": ...}` as in VQA, or, with `lists_in_text`, the
    text of such a list.
    """
    value = prediction.column("answers", "answer")
    if isinstance(value, str) and lists_in_text and value.startswith("["):  # 1,000 is no list
        value = parsed(value) or value
    if isinstance(value, Mapping):  # one object with lists, as datasets stores a list of objects
        value = value.get("answer")
    values = value if isinstance(value, list) else [value]
    texts = [each.get("answer") if isinstance(each, Mapping) else each for each in values]
    return [str(text) for text in texts if text is not None and text == text]


def score_texts(credit: Credit, lists_in_text: bool = True) -> Scorer:
    """Return a scorer that compares each response, without special tokens, with the accepted answers."""

    def score(prediction: Prediction) -> ScoredAnswer:
        references = references_of(prediction, lists_in_text)
        if not references or prediction.response is None:
            return ScoredAnswer.of(prediction, None, references[0] if references else None)
        value, text = credit(final_text(prediction.response), references)
        return ScoredAnswer.of(prediction, text, " | ".join(dict.fromkeys(references)), value)

    return lambda predictions: [score(prediction) for prediction in predictions]


# --------------------------------------------------------------------------------------------- ChartQA

_TOLERANCE = 0.05


def relaxed_accuracy(response: str, answers: Sequence[str]) -> tuple[float, str]:
    """Return 1 if a response equals an answer, or is a number within 5% of it, else 0; and the response.

    A percentage is a hundredth; case does not matter. Numbers have no units or separators, and a reference of
    zero is compared as text.

    Source: Masry et al. 2022, arXiv 2203.10244, section 5.1, which has no script. Pix2Struct's metrics.py is
    what papers use.
    """
    text = response.strip()
    return float(any(_relaxed_match(text, answer) for answer in answers)), text


def _relaxed_match(text: str, answer: str) -> bool:
    number, reference = _number(text), _number(answer)
    if number is not None and reference:
        return abs(number - reference) / abs(reference) <= _TOLERANCE
    return text.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


CHARTQA = Benchmark(
    name="chartqa",
    title="ChartQA (test)",
    harness_task="chartqa",
    hub_id="lmms-lab-encoder/ChartQA",
    hub_files="data/test-*",
    split="test",
    license="GPL-3.0",
    kind="free",
    size=2500,
    size_source="Masry et al. 2022: 1,250 questions by people and 1,250 by a model",
    metric="relaxed accuracy: equal texts, or numbers within 5%, in percent of questions",
    source="Masry et al. 2022, arXiv 2203.10244, as Pix2Struct's metrics.py computes it",
    scorer=score_texts(relaxed_accuracy, lists_in_text=False),  # [2, 3] is an answer as it stands
    breakdown=by_column("questions", "type"),
)

# ------------------------------------------------------------------------------------ DocVQA and InfoVQA


def _anls(response: str, answers: Sequence[str]) -> tuple[float, str]:
    return anls(response, answers), response


def _question_types(row: Mapping[str, Any]) -> list[str]:
    types = row.get("question_types")
    if isinstance(types, str):
        types = parsed(types) or [types]
    return [str(each) for each in types] if isinstance(types, list) else []


DOCVQA = Benchmark(
    name="docvqa_val",
    title="DocVQA (val)",
    harness_task="docvqa_val",
    hub_id="lmms-lab-encoder/DocVQA",
    hub_config="DocVQA",
    hub_files="DocVQA/validation-*",
    split="validation",
    license="(unchecked)",
    kind="free",
    size=5349,
    size_source="Mathew et al. 2021, arXiv 2007.00398",
    metric="ANLS: mean similarity to the nearest answer, 0 if below 0.5, in percent",
    source="Mathew et al. 2021, arXiv 2007.00398, with the script of the Robust Reading Competition",
    scorer=score_texts(_anls),
    breakdown=lambda answers: by_category(answers, "question type", _question_types),
)
INFOVQA = replace(
    DOCVQA,
    name="infovqa_val",
    title="InfoVQA (val)",
    harness_task="infovqa_val",
    hub_config="InfographicVQA",
    hub_files="InfographicVQA/validation-*",
    size=2801,
    size_source="Mathew et al. 2022, arXiv 2104.12756",
    source="Mathew et al. 2022, arXiv 2104.12756, with the script of the Robust Reading Competition",
)

# ------------------------------------------------------------------------------------ TextVQA and VQAv2

TEXTVQA = Benchmark(
    name="textvqa_val",
    title="TextVQA (val)",
    harness_task="textvqa_val",
    hub_id="lmms-lab-encoder/textvqa",
    hub_files="data/validation-*",
    split="validation",
    license="CC BY 4.0",
    kind="free",
    size=5000,
    size_source="Singh et al. 2019, arXiv 1904.08920",
    metric="soft accuracy: mean over ten people of min(1, others who gave the answer / 3), in percent",
    source="Singh et al. 2019, arXiv 1904.08920, with MMF's m4c_evaluators.py",
    scorer=score_texts(textvqa_accuracy),
    breakdown=lambda answers: {},
)
VQAV2 = replace(
    TEXTVQA,
    name="vqav2_val",
    title="VQAv2 (val)",
    harness_task="vqav2_val",
    hub_id="lmms-lab-encoder/VQAv2",
    size=214_354,
    size_source="Goyal et al. 2017, arXiv 1612.00837",
    source="Goyal et al. 2017, arXiv 1612.00837, with VQA's vqaEval.py",
    scorer=score_texts(vqa_accuracy),
    breakdown=by_column("answer type", "answer_type"),
    note="lmms-eval also removes articles from the people's answers and replaces number words by digits.",
)

# --------------------------------------------------------------------------------------------- OCRBench

_OCRBENCH_TYPES = {
    "Regular Text Recognition": 50,
    "Irregular Text Recognition": 50,
    "Artistic Text Recognition": 50,
    "Handwriting Recognition": 50,
    "Digit String Recognition": 50,
    "Non-Semantic Text Recognition": 50,
    "Scene Text-centric VQA": 200,
    "Doc-oriented VQA": 200,
    "Key Information Extraction": 200,
    "Handwritten Mathematical Expression Recognition": 100,
}
_FORMULAS = "HME100k"  # the dataset of handwritten formulas


def _score_ocrbench(predictions: Sequence[Prediction]) -> list[ScoredAnswer]:
    """Score a response as correct if it contains an answer: formulas without spaces, the rest in lower case.

    Source: Liu et al. 2024, arXiv 2305.07895, with the script OCRBench/example.py.
    """

    def occurs(response: str, answers: Sequence[str]) -> tuple[float, str]:
        text = _lower(response)
        return float(any(_lower(answer) in text for answer in answers)), text

    def formula_occurs(response: str, answers: Sequence[str]) -> tuple[float, str]:
        text = _compact(response)
        return float(any(_compact(answer) in text for answer in answers)), text

    texts, formulas = score_texts(occurs), score_texts(formula_occurs)
    return [
        (formulas if prediction.column("dataset", "dataset_name") == _FORMULAS else texts)([prediction])[0]
        for prediction in predictions
    ]


def _lower(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _compact(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


OCRBENCH = Benchmark(
    name="ocrbench",
    title="OCRBench",
    harness_task="ocrbench",
    hub_id="echo840/OCRBench",
    hub_files="data/test-*",
    split="test",
    license="(unchecked)",
    kind="free",
    size=1000,
    size_source="Liu et al. 2024, arXiv 2305.07895: ten kinds of questions",
    metric="responses that contain the answer, in percent of questions; papers report their number of 1,000",
    source="Liu et al. 2024, arXiv 2305.07895, with its OCRBench/example.py",
    scorer=_score_ocrbench,
    breakdown=by_column("question type", "question_type", _OCRBENCH_TYPES),
    raw=lambda answers: {"final score (of 1,000)": float(sum(answer.correct for answer in answers))},
    note="lmms-eval also reads full-width characters as ASCII.",
)
