"""Scores of an evaluation run, for a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from solo_vlm.evaluate.benchmarks import get
from solo_vlm.evaluate.run_folder import RunFolder, weights_hash
from solo_vlm.evaluate.scoring.score import Score
from solo_vlm.utils.errors import SoloError


@dataclass(frozen=True)
class Evaluation:
    """Scores, and what was run for them.

    Attributes:
        scores: of the run.
        backend: what ran the model.
        versions: of the software, by name.
    """

    scores: Sequence[Score]
    backend: str
    versions: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path, model: Path) -> Evaluation:
        """The evaluation of a model.

        Raises:
            SoloError: no such run, or the run is of other weights.
        """
        run = RunFolder(folder)
        scores, metadata = run.read_scores(), run.read_metadata()
        try:
            about, versions = metadata["model"], metadata["versions"]
            sha256, backend = about["sha256"], about["backend"]
        except (KeyError, TypeError) as error:
            raise SoloError(f"{folder / 'run.json'} does not say what was run: {error}") from error
        if sha256 is None:
            raise SoloError(f"{folder} is of a model behind an API: nobody can say that it is {model}")
        if sha256 != weights_hash(model):
            raise SoloError(f"{folder} is the evaluation of another model than {model}: their weights differ")
        return cls(scores, backend, versions)

    def results(self) -> list[EvalResult]:
        """Metadata of a model card; partial scores, which it could not tell from whole ones, are left out."""
        return [_result(score) for score in self.scores if not score.partial]


def _result(score: Score) -> EvalResult:
    benchmark = get(score.task)
    settings: dict[str, Any] = {"dataset_config": benchmark.hub_config, "dataset_split": benchmark.split}
    return EvalResult(
        task_type="image-text-to-text",
        dataset_type=benchmark.hub_id,
        dataset_name=score.title,
        metric_type="accuracy" if score.maximum == 100 else "score",
        metric_name=score.metric,
        metric_value=round(score.score, 2),
        **settings,
    )
