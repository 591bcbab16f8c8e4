"""MMMU, val: college-level questions of 30 subjects, most of them multiple choice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from solo_vlm.evaluate.benchmarks.short_answers import references_of
from solo_vlm.evaluate.predictions import Prediction
from solo_vlm.evaluate.scoring.extract import final_text
from solo_vlm.evaluate.scoring.options import parsed
from solo_vlm.evaluate.scoring.score import Benchmark, Part, ScoredAnswer, by_category
from solo_vlm.utils.errors import SoloError

_DISCIPLINES = {
    "Art & Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health & Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities & Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech & Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
_DISCIPLINE = {subject: name for name, subjects in _DISCIPLINES.items() for subject in subjects}
_QUESTIONS_PER_SUBJECT = 30

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = {":", ",", ".", "!", "?", ";", "'"}
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # with commas
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # scientific
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # simple
)
_Value = str | float


def read_option(response: str, options: Sequence[str]) -> str | None:
    """Return the letter that MMMU's eval_utils.py reads, or None where it picks an option at random.

    The last "(B)" counts, else the last " B ", else, in responses of more than five words, the last option
    whose text occurs.
    """
    text = response
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    letters = ascii_uppercase[: len(options)]
    for form in ("({})", " {} "):
        places = {letter: text.rfind(form.format(letter)) for letter in letters}
        if found := {letter: place for letter, place in places.items() if place >= 0}:
            return max(found, key=lambda letter: found[letter])
    if len(text.split()) <= 5:
        return None
    lower = text.lower()
    found = {
        letter: lower.rfind(option.lower())
        for letter, option in zip(letters, options, strict=True)
        if option.lower() in lower
    }
    return max(found, key=lambda letter: found[letter]) if found else None


def read_values(response: str) -> list[_Value]:
    """Return the texts and numbers that MMMU's eval_utils.py takes for possible answers of a response."""
    parts = list(_key_parts(response.strip().strip(".").lower()))
    numbers = [number for part in parts for pattern in _NUMBERS for number in pattern.findall(part)]
    return [value for text in (*parts, *numbers) for value in _normalized(text)]


def _key_parts(text: str) -> Iterator[str]:
    """Yield the end of each line after words like "is" and "so", in the last line also "="; else the text."""
    lines = text.split("\n")
    found = False
    for number, line in enumerate(lines, start=1):
        indicators = (*_INDICATORS, "=") if number == len(lines) else _INDICATORS
        ends = [line.split(indicator)[-1].strip() for indicator in indicators if indicator in line]
        shortest = _shortest(ends)
        if shortest and shortest not in _TRIVIAL:
            found = True
            yield shortest
    if not found:
        yield text


def _shortest(ends: Sequence[str]) -> str:
    """Return the first shortest text; the script starts over after an empty one."""
    shortest = ""
    for end in ends:
        if not shortest or len(end) < len(shortest):
            shortest = end
    return shortest


def _normalized(text: str) -> list[_Value]:
    """Return a number rounded to two decimals, or the text in lower case; a single letter with a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def _matches(values: Sequence[_Value], references: Sequence[str]) -> bool:
    """Return whether a text contains a reference, or a number equals one."""
    accepted = [value for reference in references for value in _normalized(reference)]
    texts = [value for value in accepted if isinstance(value, str)]
    return any(
        any(text in value for text in texts) if isinstance(value, str) else value in accepted
        for value in values
    )


def _score(prediction: Prediction) -> ScoredAnswer:
    references = references_of(prediction)
    reference = _joined(references) or None
    if str(prediction.column("question_type")) == "multiple-choice":
        letter = read_option(final_text(prediction.response or ""), _options(prediction))
        return ScoredAnswer.of(prediction, letter, reference, float(letter in references))
    values = read_values(final_text(prediction.response or ""))
    extracted = _joined(map(str, values))
    return ScoredAnswer.of(prediction, extracted, reference, float(_matches(values, references)))


def _joined(texts: Iterable[str]) -> str:
    return " | ".join(dict.fromkeys(texts))


def _options(prediction: Prediction) -> list[str]:
    options = prediction.column("options")
    options = parsed(options) if isinstance(options, str) else options
    if not isinstance(options, list) or not options:
        raise SoloError(f"row {prediction.id} is multiple choice, but its column options has no list")
    return list(map(str, options))


def _subject(row: Mapping[str, Any]) -> list[str]:
    found = re.fullmatch(r"[^_]+_(.+?)_\d+", str(row.get("id", "")))  # validation_Art_Theory_1
    return [found.group(1)] if found else []


def _breakdown(answers: Sequence[ScoredAnswer]) -> dict[str, Part]:
    sizes = {name: _QUESTIONS_PER_SUBJECT * len(subjects) for name, subjects in _DISCIPLINES.items()}

    def discipline(row: Mapping[str, Any]) -> list[str]:
        return [_DISCIPLINE[subject] for subject in _subject(row) if subject in _DISCIPLINE]

    return {
        **by_category(answers, "discipline", discipline, sizes),
        **by_category(answers, "subject", _subject, dict.fromkeys(_DISCIPLINE, _QUESTIONS_PER_SUBJECT)),
    }


def _raw(answers: Sequence[ScoredAnswer]) -> dict[str, float]:
    """Return the expected score if unreadable answers are replaced by random options, as the script does."""
    expected = [
        answer.credit
        if answer.extracted is not None or answer.problem
        else 1 / len(_options(answer.prediction))
        for answer in answers
    ]
    return {"expected with random options for unreadable answers": 100 * sum(expected) / len(expected)}


MMMU = Benchmark(
    name="mmmu_val",
    title="MMMU (val)",
    harness_task="mmmu_val",
    hub_id="lmms-lab-encoder/MMMU",
    hub_files="data/validation-*",
    split="validation",
    license="Apache-2.0",
    kind="free",
    size=900,
    size_source="Yue et al. 2023, arXiv 2311.16502: 30 subjects of 30 questions",
    metric="correct answers / questions, in percent; an unreadable option counts as wrong",
    source="Yue et al. 2023, arXiv 2311.16502, with its eval_utils.py, which picks a random option for an "
    "unreadable one",
    scorer=lambda predictions: [_score(prediction) for prediction in predictions],
    breakdown=_breakdown,
    raw=_raw,
    note='lmms-eval also reads "B." and a capital letter at the end of any word, picks random options, and '
    "compares with the text of a list of answers where a question has several.",
)
