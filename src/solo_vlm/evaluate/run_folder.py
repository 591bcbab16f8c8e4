"""The folder of an evaluation run: predictions of each task, scores, and what was run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solo_vlm.evaluate.predictions import Prediction, read_predictions, write_predictions
from solo_vlm.evaluate.score import Score
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_file


@dataclass(frozen=True)
class RunFolder:
    """`predictions/TASK.jsonl`, `scores.json` and `run.json` below one folder."""

    path: Path

    @property
    def tasks(self) -> list[str]:
        """Tasks with predictions, in order of the alphabet."""
        return sorted(file.stem for file in self._predictions.glob("[!.]*.jsonl"))

    def predictions_file(self, task: str) -> Path:
        """Where the predictions of a task are."""
        return self._predictions / f"{task}.jsonl"

    def read_predictions(self, task: str) -> list[Prediction]:
        """Predictions of a task.

        Raises:
            SoloError: there are none, or they cannot be read.
        """
        return read_predictions(self.predictions_file(task))

    def write_predictions(self, task: str, predictions: Iterable[Prediction]) -> None:
        """Write predictions of a task."""
        write_predictions(self.predictions_file(task), predictions)

    def read_scores(self) -> list[Score]:
        """The scores of the run.

        Raises:
            SoloError: there are none, or they cannot be read.
        """
        try:
            return [Score.from_dict(score) for score in self._read("scores.json")]
        except (AttributeError, KeyError, TypeError) as error:
            raise SoloError(f"{self.path / 'scores.json'} does not hold scores: {error}") from error

    def write_scores(self, scores: Iterable[Score]) -> None:
        """Write the scores of the run."""
        self._write("scores.json", [score.as_dict() for score in scores])

    def read_facts(self) -> dict[str, Any]:
        """What was run: model and its hash, versions, prompts, settings.

        Raises:
            SoloError: there is no such file, or it cannot be read.
        """
        return self._read("run.json")

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Write what was run."""
        self._write("run.json", facts)

    @property
    def _predictions(self) -> Path:
        return self.path / "predictions"

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise SoloError(
                f"cannot read {self.path / name}: {error}; is this the folder of a run?"
            ) from error

    def _write(self, name: str, value: Any) -> None:
        with new_file(self.path / name) as partial:
            partial.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
