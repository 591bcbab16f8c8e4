"""The folder of a run: whose it is, and where it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from solo_vlm.data.mixture import LOADER_SETTINGS
from solo_vlm.errors import SoloError
from solo_vlm.files import new_file, remove_partial
from solo_vlm.train.agreement import changes, describe
from solo_vlm.train.checkpoint import latest_checkpoint
from solo_vlm.train.recipe import Recipe

# What may change between two parts of one run: it says who works and what is noted, not what is learned.
_FREE = ("root", "parallel", "activation_checkpointing", "compile", "log_every", "trackers", "checkpoint")
_EXCLUDED: dict[str, Any] = {**dict.fromkeys(_FREE, True), "data": LOADER_SETTINGS}


def claim(out: Path, recipe: Recipe, resume: bool) -> Path | None:
    """Make a folder that of this run; return the checkpoint to go on from, if the same run left one.

    Raises:
        SoloError: it holds a finished run or that of another recipe; or there is nothing to resume.
    """
    if (out / "model").exists():
        raise SoloError(f"{out} holds a finished run: remove it, or choose another folder with out=...")
    theirs = out / "recipe.yaml"
    if theirs.is_file() and (changed := changes_in_learning(Recipe.load(theirs), recipe)):
        raise SoloError(
            f"{out} holds a run of another recipe ({changed}): set that back, remove the folder, or choose "
            "another with out=..."
        )
    remove_partial(out / "checkpoints")  # what a crash has left
    checkpoint = latest_checkpoint(out / "checkpoints")
    if resume and checkpoint is None:
        raise SoloError(f"nothing to resume: {out} has no checkpoint")
    with new_file(theirs) as partial:
        partial.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    return checkpoint


def learned(recipe: Recipe) -> dict[str, Any]:
    """The settings that decide what is learned, as far as they are not the default ones."""
    return recipe.model_dump(mode="json", exclude=_EXCLUDED, exclude_defaults=True)


def changes_in_learning(before: Recipe, now: Recipe) -> str:
    """Which settings that decide what is learned differ, with both values; nothing where none does."""
    if learned(before) == learned(now):
        return ""
    old, new = (recipe.model_dump(mode="json", exclude=_EXCLUDED) for recipe in (before, now))
    return describe(changes(old, new))
