"""Measurement of models on held-out data: accuracy of generated answers, and loss.

One job per model runs `python -m solo_vlm.experiments.ablations.measure RUN TASK`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from solo_vlm.data.mixture import SourceSettings
from solo_vlm.data.sources import open_source
from solo_vlm.experiments.ablations.pipeline import Pipeline, Stage
from solo_vlm.experiments.ablations.settings import AblationSettings, HeldOutSettings
from solo_vlm.experiments.launcher import Job
from solo_vlm.train.recipe import Recipe, ValidationSettings
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import write_text
from solo_vlm.utils.json_lines import LinesFile

if TYPE_CHECKING:
    from solo_vlm.generate import GenerationPipeline

Kind = Literal["accuracy", "loss"]

_ALL = 10**9  # sequences


class Result(NamedTuple):
    """Result of a measurement.

    Attributes:
        value: Share of correct answers, or nats per supervised token.
        n: Number of held-out samples.
    """

    value: float
    n: int


@dataclass(frozen=True)
class Measurement:
    """Measurement of a model on held-out data.

    Attributes:
        kind: "accuracy" (share of correct generated answers) or "loss" (nats per supervised token).
        file: Result file, in the folder of the stage; its name contains a digest of the data.
    """

    kind: Kind
    stage: Stage
    data: Path
    file: Path

    @property
    def answers(self) -> Path:
        """JSON Lines file of the generated answers."""
        return answers_file(self.file)

    def result(self) -> Result | None:
        """Return the result, or None if there is none yet."""
        return Result(**json.loads(self.file.read_text())) if self.file.is_file() else None


def plan_measurements(
    settings: AblationSettings, pipelines: Iterable[Pipeline]
) -> list[dict[str, Measurement]]:
    """Return the measurements of each pipeline, by metric."""
    root = Path(settings.root).resolve()
    files = {held_out.data for held_out in settings.metrics.values()}
    identities = {data: f"{data} {open_source(root / data).fingerprint()}" for data in files}
    digests = {data: hashlib.sha256(text.encode()).hexdigest()[:10] for data, text in identities.items()}

    def measurement(pipeline: Pipeline, metric: str, held_out: HeldOutSettings) -> Measurement:
        stage = pipeline.after(held_out.after)
        if stage is None or stage.run is None:
            raise SoloError(
                f"{pipeline.variant}: no stage trains before {metric} is measured; set its `after` to a "
                "later stage"
            )
        path = root / held_out.data
        kind: Kind = "accuracy" if metric in settings.scores else "loss"
        file = stage.folder / "held_out" / f"{path.stem}-{kind}-{digests[held_out.data]}.json"
        return Measurement(kind, stage, path, file)

    return [
        {metric: measurement(pipeline, metric, held_out) for metric, held_out in settings.metrics.items()}
        for pipeline in pipelines
    ]


def measuring_jobs(missing: Iterable[Measurement]) -> Iterator[Job]:
    """Yield one job per model, which makes all of its missing measurements."""
    by_model: dict[str, list[Measurement]] = {}
    for measurement in missing:
        by_model.setdefault(measurement.stage.run_name, []).append(measurement)
    for name, wanted in by_model.items():
        stage = wanted[0].stage
        task = json.dumps([[m.kind, str(m.data), str(m.file)] for m in wanted])
        command = [sys.executable, "-m", "solo_vlm.experiments.ablations.measure", str(stage.folder), task]
        yield Job(name, command, stage.root / "logs" / f"{name}-held-out.log")


def answers_file(result: Path) -> Path:
    """Return the path of the answers that belong to a result file."""
    return result.with_suffix(".jsonl")


def count_samples(path: str | Path) -> int:
    """Count the rows of a file or folder."""
    source = open_source(path)
    return sum(len(source.read(shard)) for shard in range(len(source)))


def measure(run: Path, task: str) -> None:
    """Measure the model of a run, and write each result to its file; `task` is JSON of (kind, data, file)."""
    from solo_vlm.generate import GenerationPipeline

    generator = cache(lambda: GenerationPipeline.from_pretrained(run / "model"))
    for kind, data, file in json.loads(task):
        if kind == "accuracy":
            result = measure_accuracy(generator(), data, answers_file(Path(file)))
        else:
            result = measure_loss(run, data)
        write_text(Path(file), json.dumps(result._asdict()) + "\n")


def measure_accuracy(generator: GenerationPipeline, data: str | Path, answers: Path) -> Result:
    """Return the share of correct answers to held-out questions; those already in `answers` are skipped."""
    from solo_vlm.evaluate.held_out import answer_questions, read_questions

    questions = read_questions(data)
    with LinesFile(answers) as file:
        correct = [record["correct"] for record in file.records]
        for batch in answer_questions(questions[len(correct) :], generator):
            file.append(
                {name: getattr(answer, name) for name in ("question", "reference", "answer", "correct")}
                for answer in batch
            )
            correct += [answer.correct for answer in batch]
    return Result(sum(correct) / len(correct), len(correct))


def measure_loss(run: Path, data: str | Path) -> Result:
    """Return the loss of a run's model on the supervised text tokens of held-out samples.

    The run's recipe sets the packing; vision tokens are never supervised, even if it has `vision_loss`.
    """
    from solo_vlm.train.model import make_model
    from solo_vlm.train.parallel.context import init_distributed
    from solo_vlm.train.validation import LossValidator

    recipe = Recipe.load(run / "recipe.yaml")
    validation = ValidationSettings(sources=[SourceSettings(path=str(data))], sequences=_ALL)
    model_settings = {"model": str(run / "model"), "lora": None, "quantize": None, "trainable": "all"}
    packing = recipe.data.model_copy(update={"vision_loss": False})
    recipe = recipe.model_copy(update={**model_settings, "validation": validation, "data": packing})
    with init_distributed(recipe) as context:
        model, processor = make_model(recipe, context)
        assert recipe.validation_mixture is not None
        held_out = context.open_sources(recipe.validation_mixture)
        return Result(LossValidator(recipe, held_out, processor, context).loss(model), count_samples(data))


if __name__ == "__main__":
    measure(Path(sys.argv[1]), sys.argv[2])
