"""Where metrics go besides `metrics.jsonl`: TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_file


class Tracker(Protocol):
    """Somewhere to send the figures of a step to."""

    def log(self, figures: dict[str, float], step: int) -> None:
        """Send."""

    def finish(self) -> None:
        """Flush and close."""


def make_trackers(recipe: Recipe, folder: Path, done: int) -> list[Tracker]:
    """The trackers that a recipe asks for.

    Args:
        recipe: the run's; hosted trackers are given all of it.
        folder: of the run.
        done: steps that an earlier process has done; what it has sent after them is dropped, where one can.

    Raises:
        SoloError: the package of one is not installed.
    """
    return [
        _TensorBoard(folder, done) if name == "tensorboard" else _Hosted(name, recipe, folder)
        for name in recipe.trackers
    ]


class _TensorBoard:
    def __init__(self, folder: Path, done: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise SoloError("trackers: pip install tensorboard, or set trackers=[]") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done)

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


class _Hosted:
    """Weights & Biases, or Trackio, which speaks the same way."""

    def __init__(self, name: str, recipe: Recipe, folder: Path) -> None:
        try:
            self._module: Any = import_module(name)
        except ImportError as error:
            raise SoloError(f"trackers: {name} is not installed; pip install {name}") from error
        options: dict[str, Any] = {"project": "solo-vlm", "name": folder.name, "resume": "allow"}
        if name == "wandb":  # Trackio goes on with the run of that name
            options["id"] = _identity(folder / "wandb_id")
        self._module.init(config=recipe.model_dump(mode="json"), **options)

    def log(self, figures: dict[str, float], step: int) -> None:
        self._module.log(figures, step=step)

    def finish(self) -> None:
        self._module.finish()


def _identity(path: Path) -> str:
    """What a run is known by, made up when it starts and kept beside it."""
    if not path.is_file():
        with new_file(path) as partial:
            partial.write_text(uuid4().hex[:8])
    return path.read_text()
