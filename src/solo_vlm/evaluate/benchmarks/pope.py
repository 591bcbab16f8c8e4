"""POPE: yes-or-no questions about objects that are in the image or only likely to be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from solo_vlm.evaluate.predictions import Prediction
from solo_vlm.evaluate.scoring.extract import final_text, read_yes_no
from solo_vlm.evaluate.scoring.score import Benchmark, Part, ScoredAnswer, by_column

_CATEGORIES = ("random", "popular", "adversarial")
_NEGATIONS = {"No", "not", "no"}
_by_sampling = by_column("sampling", "category", dict.fromkeys(_CATEGORIES, 3000))


def _read(response: str) -> str:
    """Return "no" if the first sentence has one of three words, else "yes", as POPE's evaluate.py does."""
    words = final_text(response).split(".")[0].replace(",", "").split(" ")
    return "no" if _NEGATIONS.intersection(words) else "yes"


def _score(prediction: Prediction) -> ScoredAnswer:
    reference = str(prediction.column("answer", "label")).strip().lower()
    extracted = _read(prediction.response) if prediction.response is not None else None
    return ScoredAnswer.of(prediction, extracted, reference if reference in ("yes", "no") else None)


def _metrics(answers: Sequence[ScoredAnswer]) -> dict[str, float]:
    """Return precision, recall and F1 of "yes", and its share, in percent; 0 where there is none."""
    counts = Counter((answer.extracted, answer.reference) for answer in answers)
    hits = counts["yes", "yes"]
    said = sum(count for (extracted, _), count in counts.items() if extracted == "yes")
    true = sum(count for (_, reference), count in counts.items() if reference == "yes")
    shares = {
        "precision": hits / said if said else 0.0,
        "recall": hits / true if true else 0.0,
        "F1": 2 * hits / (said + true) if said + true else 0.0,
        "said yes": said / len(answers),
    }
    return {name: 100 * value for name, value in shares.items()}


def _breakdown(answers: Sequence[ScoredAnswer]) -> dict[str, Part]:
    parts = _by_sampling(answers)
    members = {
        name: [answer for answer in answers if answer.prediction.row["category"] == name] for name in parts
    }
    return {name: replace(part, more=_metrics(members[name])) for name, part in parts.items()}


def _raw(answers: Sequence[ScoredAnswer]) -> dict[str, float]:
    parts = [part.more["F1"] for part in _breakdown(answers).values()]
    unclear = sum(read_yes_no(answer.prediction.response or "") is None for answer in answers)
    return {
        **_metrics(answers),
        **({"mean F1 of the samplings": sum(parts) / len(parts)} if parts else {}),
        "answers that begin with neither yes nor no": float(unclear),
    }


POPE = Benchmark(
    name="pope",
    title="POPE",
    harness_task="pope",
    hub_id="lmms-lab-encoder/POPE",
    hub_files="data/test-*",
    split="test",
    license="MIT",
    kind="yes or no",
    size=9000,
    size_source="Li et al. 2023, arXiv 2305.10355: three samplings of 3,000 questions",
    metric="correct answers / questions, in percent; precision, recall and F1 are those of yes",
    source="Li et al. 2023, arXiv 2305.10355, with its evaluate.py",
    scorer=lambda predictions: [_score(prediction) for prediction in predictions],
    breakdown=_breakdown,
    raw=_raw,
    note="A first sentence without No, no or not counts as yes, as in evaluate.py; lmms-eval requires the "
    "answer to be the word alone.",
)
