"""What is to be measured: models of chains on held-out data, a job for each model."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from solo_vlm.data.sources import open_source
from solo_vlm.experiments.ablations.chain import Chain, Link
from solo_vlm.experiments.ablations.settings import AblationSettings, HeldOutSettings
from solo_vlm.experiments.launcher.job import Job
from solo_vlm.utils.errors import SoloError

Kind = Literal["accuracy", "loss"]


class Result(NamedTuple):
    """What came of a measurement.

    Attributes:
        value: share of right answers, or nats a supervised token.
        n: held-out samples.
    """

    value: float
    n: int


@dataclass(frozen=True)
class Measurement:
    """A model on held-out data.

    Attributes:
        kind: "accuracy", the share of generated answers that are right; "loss", nats a supervised token.
        link: the model.
        data: path of the samples.
        file: of the result, beside the model; its name has a digest of the data.
    """

    kind: Kind
    link: Link
    data: Path
    file: Path

    @property
    def answers(self) -> Path:
        """What the model says, as it comes: JSON lines."""
        return answers_file(self.file)

    def result(self) -> Result | None:
        """None where it has not been measured."""
        return Result(**json.loads(self.file.read_text())) if self.file.is_file() else None


def measurements(settings: AblationSettings, chains: Iterable[Chain]) -> list[dict[str, Measurement]]:
    """What is measured of each chain, by metric.

    Raises:
        SoloError: the data are not there, or the chain has trained nothing where it is to be measured.
    """
    root = Path(settings.root).resolve()
    files = {held_out.data for held_out in settings.metrics.values()}
    digests = {data: _digest(root, data) for data in files}

    def measurement(chain: Chain, metric: str, held_out: HeldOutSettings) -> Measurement:
        link = chain.after(held_out.after)
        if link is None or link.run is None:
            raise SoloError(f"{chain.arm}: no stage has trained anything where {metric} is to be measured")
        path = root / held_out.data
        kind: Kind = "accuracy" if metric in settings.scores else "loss"
        file = link.folder / "held_out" / f"{path.stem}-{kind}-{digests[held_out.data]}.json"
        return Measurement(kind, link, path, file)

    return [
        {metric: measurement(chain, metric, held_out) for metric, held_out in settings.metrics.items()}
        for chain in chains
    ]


def measuring_jobs(missing: Iterable[Measurement]) -> Iterator[Job]:
    """One a model, for whatever of it is to be measured."""
    by_model: dict[str, list[Measurement]] = {}
    for measurement in missing:
        by_model.setdefault(measurement.link.name, []).append(measurement)
    for name, wanted in by_model.items():
        link = wanted[0].link
        task = json.dumps([[m.kind, str(m.data), str(m.file)] for m in wanted])
        command = [sys.executable, "-m", "solo_vlm.experiments.ablations.worker", str(link.folder), task]
        yield Job(name, command, link.root / "logs" / f"{name}-held-out.log")


def answers_file(result: Path) -> Path:
    """Where the answers are that a result is about."""
    return result.with_suffix(".jsonl")


def count_samples(path: str | Path) -> int:
    """Rows of a file or folder."""
    source = open_source(path)
    return sum(len(source.read(unit)) for unit in range(len(source)))


def _digest(root: Path, data: str) -> str:
    return hashlib.sha256(f"{data} {open_source(root / data).fingerprint()}".encode()).hexdigest()[:10]
