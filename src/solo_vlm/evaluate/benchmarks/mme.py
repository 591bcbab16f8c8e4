"""MME: yes-or-no questions in 14 subtasks, two per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from solo_vlm.evaluate.predictions import Prediction
from solo_vlm.evaluate.scoring.extract import read_yes_no
from solo_vlm.evaluate.scoring.score import (
    Benchmark,
    Part,
    ScoredAnswer,
    Unit,
    bootstrap_interval,
    score_of,
)
from solo_vlm.utils.errors import SoloError

_PERCEPTION = {
    "existence": 60,
    "count": 60,
    "position": 60,
    "color": 60,
    "posters": 294,
    "celebrity": 340,
    "scene": 400,
    "landmark": 400,
    "artwork": 400,
    "OCR": 40,
}
_COGNITION = {
    "commonsense_reasoning": 140,
    "numerical_calculation": 40,
    "text_translation": 40,
    "code_reasoning": 40,
}
_GROUPS = {"perception": _PERCEPTION, "cognition": _COGNITION}
_SUBTASKS = {name.lower(): name for name in (*_PERCEPTION, *_COGNITION)}
_QUESTIONS_PER_IMAGE = 2
_PERFECT = 200.0  # acc 100 and acc+ 100

_Images = dict[tuple[str, str], list[ScoredAnswer]]  # answers by (subtask, image)


def _score(prediction: Prediction) -> ScoredAnswer:
    reference = read_yes_no(str(prediction.column("answer")))
    return ScoredAnswer.of(prediction, read_yes_no(prediction.response or ""), reference)


def _units(images: _Images) -> list[Unit]:
    """Return one unit per image: the percentage of correct answers, plus 100 if both are correct."""
    return [
        Unit(f"{subtask}/{image}", _acc(answers) + _acc_plus(answers), subtask)
        for (subtask, image), answers in images.items()
    ]


def _breakdown(answers: Sequence[ScoredAnswer]) -> dict[str, Part]:
    images = _by_image(answers)
    sums = {group: _part(images, sizes, "sum") for group, sizes in _GROUPS.items()}
    subtasks = {
        subtask: _part(images, {subtask: size}, group)
        for group, sizes in _GROUPS.items()
        for subtask, size in sizes.items()
    }
    return {name: part for name, part in (sums | subtasks).items() if part.n}


def _part(images: _Images, sizes: Mapping[str, int], group: str) -> Part:
    """Return the score over some subtasks; for a single one also its acc and acc+."""
    chosen = {key: answers for key, answers in images.items() if key[0] in sizes}
    units = _units(chosen)
    more = {}
    if len(sizes) == 1 and chosen:
        more = {
            "acc": sum(map(_acc, chosen.values())) / len(chosen),
            "acc_plus": sum(map(_acc_plus, chosen.values())) / len(chosen),
        }
    return Part(
        score=score_of(units),
        n=sum(map(len, chosen.values())),
        interval=bootstrap_interval(units),
        group=group,
        maximum=_PERFECT * len(sizes),
        expected_n=sum(sizes.values()),
        more=more,
    )


def _by_image(answers: Sequence[ScoredAnswer]) -> _Images:
    images: _Images = {}
    for answer in answers:
        category = str(answer.prediction.column("category"))
        if category.lower() not in _SUBTASKS:
            known = ", ".join(_SUBTASKS.values())
            raise SoloError(f"row {answer.prediction.id}: MME has no subtask {category}; it has {known}")
        image = str(answer.prediction.column("question_id", "image_path", "image"))
        pair = images.setdefault((_SUBTASKS[category.lower()], image), [])
        pair.append(answer)
        if len(pair) > _QUESTIONS_PER_IMAGE:
            rows = ", ".join(answer.prediction.id for answer in pair)
            raise SoloError(f"MME asks two questions per image, but {image} has rows {rows}")
    return images


def _acc(answers: Sequence[ScoredAnswer]) -> float:
    return 100 * sum(answer.correct for answer in answers) / len(answers)


def _acc_plus(answers: Sequence[ScoredAnswer]) -> float:
    return 100.0 * (len(answers) == _QUESTIONS_PER_IMAGE and all(answer.correct for answer in answers))


MME = Benchmark(
    name="mme",
    title="MME",
    harness_task="mme",
    hub_id="lmms-lab-encoder/MME",
    hub_files="data/test-*",
    split="test",
    license="for academic research only, by the readme in its archive",
    kind="yes or no",
    size=2374,
    size_source="dataset card of lmms-lab/MME; subtasks: Fu et al. 2023, arXiv 2306.13394",
    metric="perception + cognition: sum over 14 subtasks of acc (percent of questions) and acc+ "
    "(percent of images with both answers correct)",
    source="Fu et al. 2023, arXiv 2306.13394, with its calculation.py",
    scorer=lambda predictions: [_score(prediction) for prediction in predictions],
    breakdown=_breakdown,
    units=lambda answers: _units(_by_image(answers)),
    interval=bootstrap_interval,
    maximum=_PERFECT * len(_SUBTASKS),
    note="calculation.py looks for yes and no in the first four characters, so None counts as no; "
    "here they must be words.",
)
