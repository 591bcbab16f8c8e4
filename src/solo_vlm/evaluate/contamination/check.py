"""Goes through a training mixture once, and finds what of some benchmarks is in it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch.utils.data import DataLoader, Dataset

from solo_vlm.data.mixture import Mixture
from solo_vlm.data.sample import Sample, SampleError, parse_sample
from solo_vlm.data.sources import Source
from solo_vlm.data.survey.reading import OnProgress, ShardProgress
from solo_vlm.evaluate.contamination.hashes import HashIndex, perceptual_hash
from solo_vlm.evaluate.contamination.overlap import COMMON, Overlap, Question
from solo_vlm.evaluate.options import options_of
from solo_vlm.evaluate.rows import Rows
from solo_vlm.models.solo.image_loading_solo import ImageError, load_image
from solo_vlm.utils.pages import thumbnail_url

DISTANCE = 4
"""Bits of 64 in which two images may differ. Of unrelated images whose bits fell by chance, one pair in 3e13
would lie so near: not one in 25 million training images against 25 thousand of benchmarks."""

_LISTED = 10  # places of each benchmark row; more are counted


@dataclass(frozen=True)
class Match:
    """A place in the training data that holds an image or words of a benchmark's row.

    Attributes:
        kind: what was found.
        task: the benchmark.
        id: of its row.
        source: of the mixture.
        where: in the source.
        distance: bits in which the images differ.
        words: the run of words that both have.
        picture: the training image, small, as a data URL.
    """

    kind: Literal["image", "question"]
    task: str
    id: str
    source: str
    where: str
    distance: int | None = None
    words: str | None = None
    picture: str | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values without the picture, for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "picture"}


@dataclass
class TaskFindings:
    """What of one benchmark was looked for, and found.

    Attributes:
        rows: of the benchmark.
        images: that were compared.
        unreadable_images: that could not be.
        questions: long enough to be compared.
        run_length: words that a question must share with a training text in a row.
        image_matches: places found, by row.
        question_matches: places found, by row.
    """

    rows: int = 0
    images: int = 0
    unreadable_images: int = 0
    questions: int = 0
    run_length: int = 0
    image_matches: dict[str, int] = field(default_factory=dict)
    question_matches: dict[str, int] = field(default_factory=dict)


@dataclass
class Contamination:
    """What a mixture has of some benchmarks.

    Attributes:
        tasks: findings by benchmark.
        matches: places, at most ten a row and kind.
        distance: bits of 64 in which images may differ.
        training_rows: that were read.
        training_images: that were compared.
        skipped: training rows and images that cannot be used, by reason.
    """

    tasks: dict[str, TaskFindings]
    matches: list[Match]
    distance: int
    training_rows: int = 0
    training_images: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "tasks": {task: asdict(findings) for task, findings in self.tasks.items()},
            "matches": [match.as_dict() for match in self.matches],
            "distance": self.distance,
            "training_rows": self.training_rows,
            "training_images": self.training_images,
            "skipped": dict(self.skipped),
        }


def check_mixture(
    benchmarks: Mapping[str, Rows],
    mixture: Mixture,
    distance: int = DISTANCE,
    workers: int = 0,
    on_progress: OnProgress = lambda done, total: None,
) -> Contamination:
    """Look for images and questions of benchmarks in a mixture.

    Args:
        benchmarks: rows of each, by name.
        mixture: all of its sources are read once.
        distance: bits of 64 in which the perceptual hashes of two images may differ.
        workers: processes that read and compare; 0: this one.
        on_progress: called with the shards read and their number.

    Raises:
        SoloError: a source is missing.
    """
    sources = mixture.open_sources()
    tasks = {task: TaskFindings(rows=len(rows)) for task, rows in benchmarks.items()}
    index = HashIndex(_image_hashes(benchmarks, tasks), distance)
    overlap = Overlap.of(
        {
            (task, rows.ids[number]): _question_text(row)
            for task, rows in benchmarks.items()
            for number, row in enumerate(rows.columns)
        }
    )
    for task, findings in tasks.items():
        findings.questions, findings.run_length = overlap.compared[task], overlap.lengths[task]

    found = Contamination(tasks, [], distance)
    shards = _Shards(sources, index, overlap)
    on_shard = ShardProgress(len(shards), on_progress)
    texts: dict[str, list[tuple[str, str]]] = defaultdict(list)  # run of words -> sources and places
    for shard in DataLoader(shards, batch_size=None, num_workers=workers, collate_fn=_as_it_is):
        found.training_rows += shard.rows
        found.training_images += shard.images
        found.skipped += shard.skipped
        for match in shard.image_matches:
            _add(found, match, tasks[match.task].image_matches)
        for run, source, where in shard.runs:
            if len(texts[run]) <= COMMON:
                texts[run].append((source, where))
        on_shard()
    for match in _question_matches(texts, overlap):
        _add(found, match, tasks[match.task].question_matches)
    return found


@dataclass
class _Shard:
    """What one shard of the training data gave."""

    rows: int = 0
    images: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    image_matches: list[Match] = field(default_factory=list)
    runs: list[tuple[str, str, str]] = field(default_factory=list)  # words, source, where


class _Shards(Dataset[_Shard]):
    """The shards of all sources, each searched when it is asked for: in this process, or in a loader's."""

    def __init__(self, sources: Sequence[Source], index: HashIndex[Question], overlap: Overlap) -> None:
        self._places = [(source, shard) for source in sources for shard in range(len(source))]
        self._index = index
        self._overlap = overlap

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> _Shard:
        source, shard = self._places[number]
        found = _Shard()
        rows = source.read(shard)
        for row in range(len(rows)):
            found.rows += 1
            try:
                sample = parse_sample(rows[row])
            except SampleError as error:
                found.skipped[error.reason] += 1
                continue
            self._search(sample, source.name, source.where(shard, row), found)
        return found

    def _search(self, sample: Sample, source: str, where: str, found: _Shard) -> None:
        for encoded in sample.images:
            try:
                image = load_image(encoded)
            except ImageError:
                found.skipped["image"] += 1
                continue
            found.images += 1
            for (task, row), distance in self._index.near(perceptual_hash(image)):
                picture = thumbnail_url(image)
                found.image_matches.append(
                    Match("image", task, row, source, where, distance, picture=picture)
                )
        runs = {run for text in _turns(sample) for run in self._overlap.runs_in(text)}
        found.runs += [(run, source, where) for run in sorted(runs)]


def _as_it_is(shard: Any) -> Any:
    return shard


def _add(found: Contamination, match: Match, counts: dict[str, int]) -> None:
    counts[match.id] = counts.get(match.id, 0) + 1
    if counts[match.id] <= _LISTED:
        found.matches.append(match)


def _question_matches(texts: Mapping[str, Sequence[tuple[str, str]]], overlap: Overlap) -> Iterator[Match]:
    """One a question and place, with the first of the runs that they share."""
    seen: set[tuple[Question, str]] = set()
    for run, places in texts.items():
        if len(places) > COMMON:
            continue
        for source, where in places:
            for question in overlap.questions[run]:
                if (question, where) not in seen:
                    seen.add((question, where))
                    yield Match("question", *question, source, where, words=run)


def _image_hashes(
    benchmarks: Mapping[str, Rows], tasks: Mapping[str, TaskFindings]
) -> Iterable[tuple[int, Question]]:
    for task, rows in benchmarks.items():
        for number, row in enumerate(rows.ids):
            try:
                images = rows.images(number)
            except ImageError:
                tasks[task].unreadable_images += 1
                continue
            tasks[task].images += len(images)
            yield from ((perceptual_hash(image), (task, row)) for image in images)


def _question_text(row: Mapping[str, Any]) -> str:
    """The question with its context and its options."""
    return " ".join(str(part) for part in (row.get("hint") or "", row["question"], *options_of(row)))


def _turns(sample: Sample) -> Iterator[str]:
    for message in sample.messages:
        yield " ".join(part["text"] for part in message["content"] if part["type"] == "text")
