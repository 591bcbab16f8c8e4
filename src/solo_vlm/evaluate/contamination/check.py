"""Search of a training mixture for images and questions of benchmarks, and the page of the matches."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader, Dataset

from solo_vlm.data.mixture import Mixture
from solo_vlm.data.sample import FilteredRow, Sample, SampleError, parse_sample
from solo_vlm.data.sources import Source
from solo_vlm.data.survey.reading import OnProgress, ShardProgress
from solo_vlm.data.workers import worker_errors
from solo_vlm.evaluate.contamination.matching import (
    MAX_OCCURRENCES,
    HashIndex,
    NgramIndex,
    Question,
    perceptual_hash,
)
from solo_vlm.evaluate.data import Rows
from solo_vlm.evaluate.held_out import text_of
from solo_vlm.evaluate.scoring.options import options_of
from solo_vlm.models.solo.image_loading_solo import ImageError, load_image
from solo_vlm.utils.files import write_text
from solo_vlm.utils.pages import render, thumbnail_url

DISTANCE = 4
"""Default Hamming distance of 64-bit hashes. For independent random bits, one pair of images in 3e13 is this
close: less than one match between 25 million training images and 25 thousand benchmark images."""

_LISTED = 10  # matches listed per benchmark row and kind; more are only counted
_SHOWN = 300  # matches per kind on the page; thousands of images would open slowly


@dataclass(frozen=True)
class Match:
    """Training sample that shares an image or an n-gram with a benchmark's row."""

    kind: Literal["image", "question"]
    task: str  # name of the benchmark
    id: str  # ID of the row
    source: str  # name of the training source
    where: str  # file and row in the source
    distance: int | None = None  # Hamming distance of the images' hashes
    words: str | None = None  # shared n-gram
    picture: str | None = field(default=None, repr=False)  # thumbnail of the training image as a data URL


@dataclass
class TaskFindings:
    """Counts of one benchmark."""

    rows: int = 0
    images: int = 0  # compared
    unreadable_images: int = 0  # rows with one
    questions: int = 0  # long enough to be compared
    run_length: int = 0  # words per n-gram
    image_matches: dict[str, int] = field(default_factory=dict)  # matching images by row
    question_matches: dict[str, int] = field(default_factory=dict)  # matching samples by row


@dataclass
class Contamination:
    """Matches between a mixture and benchmarks."""

    tasks: dict[str, TaskFindings]  # by benchmark
    matches: list[Match]  # at most ten per row and kind
    distance: int  # maximum Hamming distance of the images' hashes
    training_rows: int = 0  # read
    training_images: int = 0  # compared
    skipped: Counter[str] = field(default_factory=Counter)  # unusable training rows and images by reason

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without thumbnails."""
        return {
            **vars(self),
            "tasks": {task: vars(findings) for task, findings in self.tasks.items()},
            "matches": [{k: v for k, v in vars(m).items() if k != "picture"} for m in self.matches],
        }

    def _add(self, match: Match) -> None:
        findings = self.tasks[match.task]
        counts = findings.image_matches if match.kind == "image" else findings.question_matches
        counts[match.id] = counts.get(match.id, 0) + 1
        if counts[match.id] <= _LISTED:
            self.matches.append(match)


@worker_errors()
def check_mixture(
    benchmarks: Mapping[str, Rows],
    mixture: Mixture,
    distance: int = DISTANCE,
    workers: int = 0,
    on_progress: OnProgress = lambda done, total: None,
) -> Contamination:
    """Search a mixture, whose sources are read once, for images and questions of benchmarks.

    Args:
        benchmarks: Rows by benchmark.
        mixture: Training data.
        distance: Maximum Hamming distance of the 64-bit hashes of two images.
        workers: Number of worker processes; 0 reads in this process.
        on_progress: Called with the completed and the total number of shards.

    Raises:
        SoloError: A source is missing.
    """
    sources = mixture.open_sources()
    tasks = {task: TaskFindings(rows=len(rows)) for task, rows in benchmarks.items()}
    images = HashIndex(_image_hashes(benchmarks, tasks), distance)
    ngrams = NgramIndex.of(
        {
            (task, rows.ids[number]): _question_text(row)
            for task, rows in benchmarks.items()
            for number, row in enumerate(rows.columns)
        }
    )
    for task, findings in tasks.items():
        findings.questions, findings.run_length = ngrams.compared[task], ngrams.lengths[task]

    found = Contamination(tasks, [], distance)
    shards = _Shards(sources, images, ngrams)
    on_shard = ShardProgress(len(shards), on_progress)
    places: dict[str, list[tuple[str, str]]] = defaultdict(list)  # n-gram -> (source, where)
    for shard in DataLoader(shards, batch_size=None, num_workers=workers):
        found.training_rows += shard.rows
        found.training_images += shard.images
        found.skipped += shard.skipped
        for match in shard.image_matches:
            found._add(match)
        for ngram, source, where in shard.ngrams:
            if len(places[ngram]) <= MAX_OCCURRENCES:
                places[ngram].append((source, where))
        on_shard()
    for match in _question_matches(places, ngrams):
        found._add(match)
    return found


@dataclass
class _ShardFindings:
    """Findings in one shard of the training data."""

    rows: int = 0
    images: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    image_matches: list[Match] = field(default_factory=list)
    ngrams: list[tuple[str, str, str]] = field(default_factory=list)  # n-gram, source, where


class _Shards(Dataset[_ShardFindings]):
    """Findings of all shards of all sources, computed on access, possibly in a worker."""

    def __init__(self, sources: Sequence[Source], images: HashIndex[Question], ngrams: NgramIndex) -> None:
        self._shards = [(source, shard) for source in sources for shard in range(len(source))]
        self._images = images
        self._ngrams = ngrams

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: int) -> _ShardFindings:
        source, shard = self._shards[number]
        found = _ShardFindings()
        rows = source.read(shard)
        for row in range(len(rows)):
            try:
                sample = parse_sample(rows[row])
            except FilteredRow:
                continue
            except SampleError as error:
                found.rows += 1
                found.skipped[error.reason] += 1
                continue
            found.rows += 1
            self._search(sample, source.name, source.where(shard, row), found)
        return found

    def _search(self, sample: Sample, source: str, where: str, found: _ShardFindings) -> None:
        for encoded in sample.images:
            try:
                image = load_image(encoded)
            except ImageError:
                found.skipped["image"] += 1
                continue
            found.images += 1
            for (task, row), distance in self._images.near(perceptual_hash(image)):
                match = Match("image", task, row, source, where, distance, picture=thumbnail_url(image))
                found.image_matches.append(match)
        ngrams = {ngram for turn in sample.messages for ngram in self._ngrams.find(text_of(turn))}
        found.ngrams += [(ngram, source, where) for ngram in sorted(ngrams)]


def _question_matches(places: Mapping[str, Sequence[tuple[str, str]]], ngrams: NgramIndex) -> Iterator[Match]:
    """Yield one match per question and place, with the first n-gram that they share."""
    seen: set[tuple[Question, str]] = set()
    for ngram, found in places.items():
        if len(found) > MAX_OCCURRENCES:
            continue
        for source, where in found:
            for question in ngrams.questions[ngram]:
                if (question, where) not in seen:
                    seen.add((question, where))
                    yield Match("question", *question, source, where, words=ngram)


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
    """Return the question with its context and its options."""
    return " ".join(str(part) for part in (row.get("hint") or "", row["question"], *options_of(row)))


def write_page(path: Path, mixture: str, found: Contamination, benchmarks: Mapping[str, Rows]) -> None:
    """Write a self-contained page with pairs of images, nearest first, and shared words."""
    images = sorted((m for m in found.matches if m.kind == "image"), key=lambda match: match.distance or 0)
    questions = [match for match in found.matches if match.kind == "question"]
    numbers = {task: {row: n for n, row in enumerate(rows.ids)} for task, rows in benchmarks.items()}

    def benchmark_images(match: Match) -> list[str]:
        pictures = benchmarks[match.task].images(numbers[match.task][match.id])
        return [thumbnail_url(picture) for picture in pictures]

    html = render(
        "solo_vlm.evaluate.contamination",
        "page.html.jinja",
        mixture=mixture,
        found=found,
        images=images,
        questions=questions,
        shown=_SHOWN,
        benchmark_images=benchmark_images,
    )
    write_text(path, html)
