"""Files of an evaluation run: answers as they arrive, predictions, scores, metadata; hash of the weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from solo_vlm.evaluate.predictions import Prediction, read_predictions, write_predictions
from solo_vlm.evaluate.scoring.score import Score
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import write_text
from solo_vlm.utils.json_lines import LinesFile


@dataclass(frozen=True)
class SavedAnswer:
    """Response to one row."""

    row: int  # index into the benchmark's rows
    request: str  # hash of prompt and settings; a response to another request is not reused
    response: str | None  # generated text; None if the row failed
    error: str | None = None  # why the row failed


class AnswerFile(LinesFile):
    """Append-only file of answers, from which an interrupted run resumes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._saved = {record["row"]: SavedAnswer(**record) for record in self.records}
        except (KeyError, TypeError) as error:
            raise SoloError(f"{path} is not a file of answers ({error}): remove it to start over") from error

    def get(self, row: int, request: str) -> SavedAnswer | None:
        """Return the response to exactly this request, if there is one; failed rows are retried."""
        saved = self._saved.get(row)
        return saved if saved and saved.request == request and saved.error is None else None

    def save(self, responses: Iterable[SavedAnswer]) -> None:
        """Append responses; they are on disk when this returns."""
        new = {response.row: response for response in responses}
        self.append(map(asdict, new.values()))
        self._saved |= new


@dataclass(frozen=True)
class RunFolder:
    """Folder of a run with `predictions/TASK.jsonl`, `scores.json` and `run.json`."""

    path: Path

    @property
    def tasks(self) -> list[str]:
        """Tasks with predictions, sorted by name."""
        return sorted(file.stem for file in (self.path / "predictions").glob("[!.]*.jsonl"))

    def predictions_file(self, task: str) -> Path:
        """Return the path of a task's predictions."""
        return self.path / "predictions" / f"{task}.jsonl"

    def read_predictions(self, task: str) -> list[Prediction]:
        """Read the predictions of a task; see `predictions.read_predictions`."""
        return read_predictions(self.predictions_file(task))

    def write_predictions(self, task: str, predictions: Iterable[Prediction]) -> None:
        """Write the predictions of a task."""
        write_predictions(self.predictions_file(task), predictions)

    def read_scores(self) -> list[Score]:
        """Read the scores.

        Raises:
            SoloError: The file is missing, unreadable or not a file of scores.
        """
        try:
            return [Score.from_dict(score) for score in self._read("scores.json")]
        except (AttributeError, KeyError, TypeError) as error:
            raise SoloError(f"{self.path / 'scores.json'} is not a file of scores: {error}") from error

    def write_scores(self, scores: Iterable[Score]) -> None:
        """Write the scores."""
        self._write("scores.json", [score.as_dict() for score in scores])

    def read_metadata(self) -> dict[str, Any]:
        """Read the metadata of the run: model and hash of its weights, versions, prompts, settings.

        Raises:
            SoloError: The file is missing or unreadable.
        """
        return self._read("run.json")

    def write_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Write the metadata of the run."""
        self._write("run.json", metadata)

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise SoloError(
                f"cannot read {self.path / name}: {error}; is this the folder of a run?"
            ) from error

    def _write(self, name: str, value: Any) -> None:
        write_text(self.path / name, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def weights_hash(model: str | Path) -> str:
    """Return the SHA-256 of the weight files, in order of their names, of a folder or downloaded model.

    Raises:
        SoloError: There are no weights.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(model), local_files_only=True))
        except (LocalEntryNotFoundError, ValueError) as error:
            raise SoloError(f"{model} is neither a folder nor a downloaded model") from error
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise SoloError(f"{model} has no weights (.safetensors)")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()
