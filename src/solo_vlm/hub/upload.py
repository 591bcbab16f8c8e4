"""Publication of a model with its card: write the folder, or upload it to the Hugging Face Hub."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from solo_vlm import __version__
from solo_vlm.hub.card import Evaluation, TrainingRun, model_card
from solo_vlm.hub.folder import check_publishable, write_folder
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_folder


@dataclass(frozen=True)
class Publication:
    """Model to publish, with the inputs of its card.

    Attributes:
        model: Folder of a SOLO model.
        repo_id: Repository on the hub, `owner/name`.
        runs: Folders of the training runs that led to the model, in order.
        evaluation: Folder of the model's evaluation.
        license: Hub ID of the license of the weights.
        base_model: Hub ID of the LLM the model was made from.
    """

    model: Path
    repo_id: str
    runs: Sequence[Path] = ()
    evaluation: Path | None = None
    license: str | None = None
    base_model: str | None = None

    def write(self, out: Path) -> None:
        """Write the folder exactly as `upload` would upload it.

        Raises:
            SoloError: An input cannot be read or belongs to another model, or `out` exists.
        """
        self._check()
        with new_folder(out) as folder:
            self._fill(folder, shutil.copyfile)

    def upload(self, private: bool = False) -> str:
        """Upload the model; files that only the repository has are kept.

        Args:
            private: Make a new repository private.

        Returns:
            URL of the repository.

        Raises:
            SoloError: The hub is unreachable, denies access or rejects the content, or as for `write`.
        """
        self._check()
        with TemporaryDirectory(prefix="solo-push-") as name:
            self._fill(Path(name), lambda file, new: new.symlink_to(file.resolve()))
            return _upload(Path(name), self.repo_id, private)

    def _check(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise SoloError(f"{self.repo_id!r} is not a valid repository name: {error}") from error
        if "/" not in self.repo_id:
            raise SoloError(f"{self.repo_id!r} has no owner: use owner/name")
        check_publishable(self.model)

    def _fill(self, folder: Path, place_weights: Callable[[Path, Path], Any]) -> None:
        runs = [TrainingRun.read(run) for run in self.runs]
        evaluation = Evaluation.read(self.evaluation, self.model) if self.evaluation else None
        card = model_card(self.repo_id, self.model, runs, evaluation, self.license, self.base_model)
        write_folder(folder, self.model, str(card), place_weights)


def _upload(folder: Path, repo_id: str, private: bool) -> str:
    api = HfApi(library_name="solo-vlm", library_version=__version__)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=f"Upload with solo-vlm {__version__}"
        )
    except OfflineModeIsEnabled as error:
        raise SoloError("the hub is switched off: unset HF_HUB_OFFLINE to upload") from error
    except Exception as error:  # the HTTP and upload libraries below huggingface_hub raise their own types
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            reason = "no write access: run `hf auth login`, or set HF_TOKEN to a token with write access"
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
        raise SoloError(f"cannot upload to {api.endpoint}/{repo_id}: {reason}") from error
    return str(repository.url)
