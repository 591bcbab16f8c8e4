"""Runs of the training engine as jobs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import yaml

from solo_vlm.experiments.launcher.job import Engine, Job, finish_jobs
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.run_folder import describe_recipe_changes
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_file


@dataclass(frozen=True)
class TrainingRun:
    """A run of the training engine, one of many below the same root.

    Attributes:
        name: its own below that root.
        recipe: of the run.
    """

    name: str
    recipe: Recipe

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.recipe.output_dir

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end.

        Raises:
            SoloError: with another recipe.
        """
        if not (self.folder / "manifest.json").is_file():
            return False
        if changed := describe_recipe_changes(Recipe.load(self.folder / "recipe.yaml"), self.recipe):
            raise SoloError(
                f"{self.folder} was trained with another recipe ({changed}): remove it, or choose another "
                "root"
            )
        return True

    def job(self) -> Job:
        """`solo train`, with the recipe and the log in files below the root."""
        root = Path(self.recipe.root)
        recipe = root / "recipes" / f"{self.name}.yaml"
        with new_file(recipe) as partial:
            partial.write_text(yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False))
        command = [sys.executable, "-m", "solo_vlm", "train", str(recipe), "--json"]
        return Job(self.name, command, root / "logs" / f"{self.name}.log")


Run = TypeVar("Run", bound=TrainingRun)


def train_runs(
    runs: Sequence[Run], processes: int, engine: Engine, on_wait: Callable[[], None] = lambda: None
) -> Iterator[Run]:
    """Train those that are not finished, the longest first; yield each when it is.

    Interrupted ones go on from their newest checkpoints.

    Args:
        runs: of different names.
        processes: see `job.run_jobs`, as for `engine` and `on_wait`.

    Raises:
        SoloError: as `TrainingRun.finished` and `job.finish_jobs`.
        Stopped: by a signal; what ran is saved.
    """
    # The longest first: the last ones to end are then short.
    waiting = {run.name: run for run in sorted(runs, key=_steps, reverse=True) if not run.finished}
    for job in finish_jobs([run.job() for run in waiting.values()], processes, engine, on_wait):
        yield waiting[job.name]


def _steps(run: TrainingRun) -> int:
    return run.recipe.steps or 0
