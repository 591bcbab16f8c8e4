"""Output directory of a run: resume point and manifest."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from solo_vlm import __version__
from solo_vlm.data.mixture import LOADER_SETTINGS
from solo_vlm.data.sources import Source
from solo_vlm.data.sources.hub import without_revision
from solo_vlm.train.inputs import (
    check_inputs,
    fingerprint_model,
    fingerprint_validation,
    load_recipe,
    write_inputs,
    write_recipe,
)
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.storage import CheckpointStore, Folder, step_of
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import remove_partial, write_text
from solo_vlm.utils.settings import describe_changes, find_changes

logger = logging.getLogger(__name__)

# Settings that may change on resume, because they do not affect the trained model.
_RESUMABLE = (
    "root",
    "parallel",
    "activation_checkpointing",
    "compile",
    "timeouts",
    "profile",
    "log_interval",
    "trackers",
    "checkpoint",
)
_EXCLUDED: dict[str, Any] = {**dict.fromkeys(_RESUMABLE, True), "data": LOADER_SETTINGS}

# Packages that affect results. Without OpenCV, torch resizes images, with values that differ by 1 of 255.
_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "pillow",
    "simplejpeg",
    "opencv-python-headless",
    "pyarrow",
    "safetensors",
    "peft",
)


def prepare_output_dir(
    out: Path, recipe: Recipe, held_out: list[Source], resume: bool, store: CheckpointStore
) -> Folder | None:
    """Write the recipe and input fingerprints; return the checkpoint to resume from, if there is one."""
    folders = run_folders(out, store)
    before = {folder: saved for folder in folders if (saved := load_recipe(folder))}
    for folder, saved in before.items():
        if changed := describe_recipe_changes(saved, recipe):
            setting = "out" if folder is folders[0] else "checkpoint.folder"
            raise SoloError(
                f"{folder} holds a run of another recipe ({changed}): undo the change, remove the folder, or "
                f"choose another with {setting}=..."
            )
    checkpoint = store.newest()
    if folders[0] in before:
        _check_not_moved(CheckpointStore.of(before[folders[0]], out), store)
    if resume and checkpoint is None:
        raise SoloError(f"nothing to resume: {store.folder} has no checkpoint")
    if checkpoint and store.is_separate and not before:
        raise SoloError(
            f"cannot resume from {checkpoint}: its folder has no recipe.yaml to compare with: copy it and "
            "inputs.json from the output directory of its run, or choose another with checkpoint.folder=..."
        )
    inputs = fingerprint_model(recipe) | fingerprint_validation(recipe, held_out)
    if checkpoint:
        for folder in folders:
            check_inputs(folder, inputs)
    store.claim()
    store.remove_partial()
    remove_partial(out)
    for folder in folders:
        write_inputs(folder, inputs)
        write_recipe(folder, recipe)
    return checkpoint


def run_folders(out: Path, store: CheckpointStore) -> list[Folder]:
    """Return the folders that describe a run: its output directory, and checkpoints that may outlive it."""
    return [Folder(out), store.folder] if store.is_separate else [Folder(out)]


def _check_not_moved(before: CheckpointStore, now: CheckpointStore) -> None:
    """Require the newest checkpoint to be in the store of the recipe, if that was changed."""
    if before.folder.at() == now.folder.at():
        return
    left, found = before.newest(), now.newest()
    if left and (found is None or step_of(found) < step_of(left)):
        raise SoloError(
            f"the newest checkpoint of this run is {left}, not in {now.folder}: copy it there, or undo the "
            "change of checkpoint.folder"
        )


def config_fingerprint(recipe: Recipe) -> dict[str, Any]:
    """Return the non-default settings that affect the trained model."""
    return recipe.model_dump(mode="json", exclude=_EXCLUDED, exclude_defaults=True)


def describe_recipe_changes(before: Recipe, now: Recipe) -> str:
    """Describe the changed settings that affect the trained model; empty if there are none.

    The folder may have been moved, and data may be read at the commit of the run: its contents are compared.
    """
    before, now = (_without_revisions(recipe).model_copy(update={"out": ""}) for recipe in (before, now))
    if config_fingerprint(before) == config_fingerprint(now):
        return ""
    old, new = (recipe.model_dump(mode="json", exclude=_EXCLUDED) for recipe in (before, now))
    return describe_changes(find_changes(old, new))


def _without_revisions(recipe: Recipe) -> Recipe:
    paths = [without_revision(source.path) for source in recipe.data.sources]
    sources = [
        source.model_copy(update={"path": path})
        for source, path in zip(recipe.data.sources, paths, strict=True)
    ]
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": sources})})


def write_manifest(path: Path, recipe: Recipe, sources: list[Source], outcome: dict[str, Any]) -> None:
    """Write the manifest of a finished run: recipe, versions, hardware, data, outcome."""
    manifest = {
        "recipe": recipe.model_dump(mode="json"),
        "data": {source.name: source.fingerprint() for source in sources},
        "solo_vlm": __version__,
        "commit": _commit(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "outcome": outcome,
    }
    write_text(path, json.dumps(manifest, indent=2) + "\n")


def read_manifest_recipe(path: Path) -> Recipe:
    """Read the recipe of a manifest."""
    try:
        return Recipe.parse(json.loads(path.read_text())["recipe"], origin=str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SoloError(f"{path} is not a manifest of a run: {error}") from error


def read_outcome(recipe: Recipe) -> dict[str, Any] | None:
    """Return the outcome of a run that is finished already, with a warning; None if it is not.

    A scheduler starts a job again that it stopped in its last seconds.

    Raises:
        SoloError: The output directory holds a finished run of another recipe.
    """
    out = recipe.output_dir
    if not (out / "model").exists():
        return None
    elsewhere = "remove it, or choose another folder with out=..."
    before = load_recipe(Folder(out))
    changed = describe_recipe_changes(before, recipe) if before else "it has no recipe.yaml"
    try:
        outcome: dict[str, Any] = json.loads((out / "manifest.json").read_text())["outcome"]
        reason = f", which ended early ({outcome['stopped']})" if outcome["stopped"] else ""
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SoloError(f"{out} holds a model without the manifest of its run: {elsewhere}") from error
    if changed:
        raise SoloError(f"{out} holds a finished run of another recipe ({changed}){reason}: {elsewhere}")
    logger.warning(
        "%s holds the finished run of this recipe%s: nothing is left to do; to train again, %s",
        out,
        reason,
        elsewhere,
    )
    return outcome


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the package's source, if it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
