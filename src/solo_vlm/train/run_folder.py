"""Output directory of a run: lock, resume point, input fingerprints and manifest."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from solo_vlm import __version__
from solo_vlm.data.mixture import LOADER_SETTINGS
from solo_vlm.data.sources import Source
from solo_vlm.train.checkpoint import latest_checkpoint
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import remove_partial, write_text
from solo_vlm.utils.settings import describe_changes, find_changes

# Settings that may change on resume, because they do not affect what is learned.
_RESUMABLE = (
    "root",
    "parallel",
    "activation_checkpointing",
    "compile",
    "log_interval",
    "trackers",
    "checkpoint",
)
_EXCLUDED: dict[str, Any] = {**dict.fromkeys(_RESUMABLE, True), "data": LOADER_SETTINGS}

_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".bin", ".gguf")
# Large files are hashed by evenly spaced blocks: more training changes weights everywhere.
_BLOCK_SIZE, _BLOCKS = 1 << 16, 256

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


def lock_output_dir(out: Path) -> IO[str] | None:
    """Lock the directory against other runs until the returned file is closed; None if unsupported."""
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
    except OSError:  # file system without locks
        file.close()
        return None
    return file


def prepare_output_dir(out: Path, recipe: Recipe, resume: bool) -> Path | None:
    """Write the recipe and input fingerprints; return the checkpoint to resume from, if there is one."""
    if (out / "model").exists():
        raise SoloError(f"{out} holds a finished run: remove it, or choose another folder with out=...")
    saved_recipe = out / "recipe.yaml"
    if saved_recipe.is_file() and (changed := describe_recipe_changes(Recipe.load(saved_recipe), recipe)):
        raise SoloError(
            f"{out} holds a run of another recipe ({changed}): undo the change, remove the folder, or choose "
            "another with out=..."
        )
    remove_partial(out / "checkpoints")  # left by a crash
    checkpoint = latest_checkpoint(out / "checkpoints")
    if resume and checkpoint is None:
        raise SoloError(f"nothing to resume: {out} has no checkpoint")
    inputs, saved_inputs = _fingerprint_inputs(recipe), out / "inputs.json"
    if checkpoint and saved_inputs.is_file():
        before = json.loads(saved_inputs.read_text())
        changed_inputs = sorted(name for name in before | inputs if before.get(name) != inputs.get(name))
        if changed_inputs:
            raise SoloError(
                f"{', '.join(changed_inputs[:3])} changed since the run in {out} started: restore the "
                "original, or start a new run with out=..."
            )
    write_text(saved_inputs, json.dumps(inputs, indent=2))
    write_text(saved_recipe, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    return checkpoint


def config_fingerprint(recipe: Recipe) -> dict[str, Any]:
    """Return the non-default settings that affect what is learned."""
    return recipe.model_dump(mode="json", exclude=_EXCLUDED, exclude_defaults=True)


def describe_recipe_changes(before: Recipe, now: Recipe) -> str:
    """Describe the changed settings that affect what is learned; empty if there are none."""
    if config_fingerprint(before) == config_fingerprint(now):
        return ""
    old, new = (recipe.model_dump(mode="json", exclude=_EXCLUDED) for recipe in (before, now))
    return describe_changes(find_changes(old, new))


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


def _fingerprint_inputs(recipe: Recipe) -> dict[str, str]:
    """Fingerprint the base model and the validation data; checkpoints identify the training data."""
    inputs = {}
    model = recipe.mixture.model_source()
    if isinstance(model, Path) and model.is_dir():
        files = [file for file in model.iterdir() if file.suffix in _MODEL_FILES and file.is_file()]
        inputs = {f"{recipe.model}/{file.name}": _hash_file(file) for file in sorted(files)}
    if validation := recipe.validation_mixture:
        for name, source in zip(validation.source_names(), validation.open_sources(), strict=True):
            inputs[name] = source.fingerprint()
    return inputs


def _hash_file(file: Path) -> str:
    """Hash the size and content of a small file, or the size and some blocks of a large one."""
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with file.open("rb") as content:
        if size <= _BLOCK_SIZE * _BLOCKS:
            digest.update(content.read())
        else:
            for number in range(_BLOCKS):
                content.seek((size - _BLOCK_SIZE) * number // (_BLOCKS - 1))
                digest.update(content.read(_BLOCK_SIZE))
    return digest.hexdigest()


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
