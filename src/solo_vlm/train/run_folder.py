"""Output directory of a run: ownership, inputs and resume point."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import IO, Any

import yaml

from solo_vlm.data.mixture import LOADER_SETTINGS
from solo_vlm.data.sources import open_source
from solo_vlm.train.agreement import changes, describe
from solo_vlm.train.checkpoint import latest_checkpoint
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_file, remove_partial

# What may change between two parts of one run: it says who works and what is noted, not what is learned.
_FREE = ("root", "parallel", "activation_checkpointing", "compile", "log_every", "trackers", "checkpoint")
_EXCLUDED: dict[str, Any] = {**dict.fromkeys(_FREE, True), "data": LOADER_SETTINGS}

_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".bin", ".gguf")
# Bytes of a block, and blocks of a large file, spread evenly: weights that were trained on differ everywhere.
_BLOCK, _BLOCKS = 1 << 16, 256


def lock(out: Path) -> IO[str] | None:
    """Keep other runs out of a folder as long as the returned file is open; None where that is not possible.

    Raises:
        SoloError: another run is at work there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    out.mkdir(parents=True, exist_ok=True)
    file = (out / ".lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by loader workers
    except BlockingIOError as error:
        file.close()
        raise SoloError(
            f"another run is writing to {out}: wait for it, or choose another with out=..."
        ) from error
    except OSError:  # a file system without locks
        file.close()
        return None
    return file


def claim(out: Path, recipe: Recipe, resume: bool) -> Path | None:
    """Make a folder that of this run; return the checkpoint to go on from, if the same run left one.

    Raises:
        SoloError: it holds a finished run or that of another recipe, the model it started from or its
            validation data have changed, or there is nothing to resume.
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
    inputs, recorded = _inputs(recipe), out / "inputs.json"
    if checkpoint and recorded.is_file():
        before = json.loads(recorded.read_text())
        differ = sorted(name for name in before | inputs if before.get(name) != inputs.get(name))
        if differ:
            raise SoloError(
                f"{', '.join(differ[:3])} changed since the run in {out} started: put back what was there, "
                "or start a new run with out=..."
            )
    with new_file(recorded) as partial:
        partial.write_text(json.dumps(inputs, indent=2))
    with new_file(theirs) as partial:
        partial.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    return checkpoint


def _inputs(recipe: Recipe) -> dict[str, str]:
    """Fingerprints of what a run starts from and is measured on; its training data are in the checkpoints."""
    inputs = {}
    model = recipe.model_source()
    if isinstance(model, Path) and model.is_dir():
        files = [file for file in model.iterdir() if file.suffix in _MODEL_FILES and file.is_file()]
        inputs = {f"{recipe.model}/{file.name}": _digest(file) for file in sorted(files)}
    for source in recipe.validation.sources if recipe.validation else ():
        inputs[source.path] = open_source(recipe.source_path(source.path)).fingerprint()
    return inputs


def _digest(file: Path) -> str:
    """Hash of a small file; of a large one, its size and blocks of it."""
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with file.open("rb") as content:
        if size <= _BLOCK * _BLOCKS:
            digest.update(content.read())
        else:
            for number in range(_BLOCKS):
                content.seek((size - _BLOCK) * number // (_BLOCKS - 1))
                digest.update(content.read(_BLOCK))
    return digest.hexdigest()


def learned(recipe: Recipe) -> dict[str, Any]:
    """The settings that decide what is learned, as far as they are not the default ones."""
    return recipe.model_dump(mode="json", exclude=_EXCLUDED, exclude_defaults=True)


def changes_in_learning(before: Recipe, now: Recipe) -> str:
    """Which settings that decide what is learned differ, with both values; nothing where none does."""
    if learned(before) == learned(now):
        return ""
    old, new = (recipe.model_dump(mode="json", exclude=_EXCLUDED) for recipe in (before, now))
    return describe(changes(old, new))
