"""MMBench: multiple-choice questions, each asked once per rotation of its options (CircularEval)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from solo_vlm.evaluate.predictions import Prediction, present
from solo_vlm.evaluate.scoring.extract import final_text
from solo_vlm.evaluate.scoring.score import Benchmark, ScoredAnswer, by_column, group_units
from solo_vlm.utils.errors import SoloError

_ROTATION = 1_000_000  # added to a question's index in each further rotation
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 4
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def read_option(response: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that VLMEvalKit infers without a language model, or None.

    It is the only letter that is a word of its own, among the last four words, else the only option whose
    text occurs in a response at most twice as long as all options.
    """
    if any(refusal in response for refusal in _REFUSALS):
        return None
    words = response.translate(_SEPARATORS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
        return named[0]
    if not named and "Z" in words:  # none of them
        return None
    lower = response.lower()
    if len(lower) > 2 * sum(map(len, options.values())):
        return None
    occurring = [letter for letter, option in options.items() if option.lower() in lower]
    return occurring[0] if len(occurring) == 1 else None


def _score(prediction: Prediction) -> ScoredAnswer:
    options = _options(prediction)
    reference = str(prediction.column("answer")).strip()
    extracted = read_option(final_text(prediction.response or ""), options)
    return ScoredAnswer.of(prediction, extracted, reference if reference in options else None)


def _options(prediction: Prediction) -> dict[str, str]:
    cells = {letter: prediction.row.get(letter.lower()) for letter in ascii_uppercase}
    options = {letter: str(cell) for letter, cell in cells.items() if present(cell) and cell != "nan"}
    if not options:
        columns = ", ".join(prediction.row)
        raise SoloError(f"row {prediction.id} has no options in A, B, ...; its columns are: {columns}")
    return options


def _question(row: Mapping[str, Any]) -> str:
    try:
        return str(int(float(row["index"])) % _ROTATION)
    except (KeyError, TypeError, ValueError) as error:
        raise SoloError(
            f"MMBench needs a whole number in the column index, not {row.get('index')!r}: rotations of a "
            f"question have its index plus {_ROTATION:,}, {2 * _ROTATION:,}, ..."
        ) from error


_question_units = group_units(_question)
_by_ability = by_column("ability", "l2_category", units=_question_units)
_by_category = by_column("fine-grained ability", "category", units=_question_units)


def _rows_correct(answers: Sequence[ScoredAnswer]) -> dict[str, float]:
    return {"rows correct (VanillaEval over rotations)": 100 * sum(a.correct for a in answers) / len(answers)}


MMBENCH = Benchmark(
    name="mmbench_en_dev",
    title="MMBench (English, dev)",
    harness_task="mmbench_en_dev_static",
    hub_id="lmms-lab-encoder/MMBench",
    hub_config="en",
    hub_files="en/dev-*",
    split="dev",
    license="Apache-2.0",
    kind="multiple choice",
    size=4329,
    size_source="Liu et al. 2023, arXiv 2307.06281: 1,164 questions in 4,329 rotations",
    metric="CircularEval: questions answered correctly in every rotation of their options, in percent",
    source="Liu et al. 2023, arXiv 2307.06281, as VLMEvalKit computes it without a language model",
    scorer=lambda predictions: [_score(prediction) for prediction in predictions],
    breakdown=lambda answers: {**_by_ability(answers), **_by_category(answers)},
    units=_question_units,
    raw=_rows_correct,
    note="lmms-eval guesses answers that it cannot infer, at random or by any letter that occurs.",
)
