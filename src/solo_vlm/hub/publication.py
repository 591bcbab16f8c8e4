"""A model with its card, ready for the world: written to a folder, or uploaded to the hub."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import ModelCard

from solo_vlm.hub.card import model_card
from solo_vlm.hub.evaluation import Evaluation
from solo_vlm.hub.folder import check_publishable, write_folder
from solo_vlm.hub.hub import check_repo_id, upload
from solo_vlm.hub.stage import Stage
from solo_vlm.utils.files import new_folder


@dataclass(frozen=True)
class Publication:
    """What shall be published.

    Attributes:
        model: folder of a SOLO model.
        repo_id: where to, `owner/name`.
        runs: folders of the training runs that led to it, in order.
        evaluation: folder of its evaluation.
        licence: the hub's id of the weights' licence.
        base_model: hub id of the LLM that it grew out of.
    """

    model: Path
    repo_id: str
    runs: Sequence[Path] = ()
    evaluation: Path | None = None
    licence: str | None = None
    base_model: str | None = None

    def write(self, out: Path) -> None:
        """Write the whole folder as it would be uploaded.

        Raises:
            SoloError: something of it cannot be read or does not belong together, or `out` is not new.
        """
        self._check()
        with new_folder(out) as folder:
            self._fill(folder)

    def upload(self, private: bool = False) -> str:
        """Upload it; see `hub.upload`.

        Returns:
            The repository's URL.

        Raises:
            SoloError: as `write`; or the hub cannot be reached, or refuses.
        """
        self._check()
        with TemporaryDirectory(prefix="solo-push-") as name:
            self._fill(Path(name), place_weights=_link)
            return upload(Path(name), self.repo_id, private)

    def _check(self) -> None:
        check_repo_id(self.repo_id)
        check_publishable(self.model)

    def _fill(self, folder: Path, place_weights: Callable[[Path, Path], Any] = shutil.copyfile) -> None:
        write_folder(folder, self.model, str(self._card()), place_weights)

    def _card(self) -> ModelCard:
        return model_card(
            self.repo_id,
            self.model,
            [Stage.read(run) for run in self.runs],
            Evaluation.read(self.evaluation, self.model) if self.evaluation else None,
            self.licence,
            self.base_model,
        )


def _link(file: Path, new: Path) -> None:
    new.symlink_to(file.resolve())
