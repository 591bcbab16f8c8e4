"""What a run was made of, so that it can be repeated: recipe, versions, hardware, data."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from solo_vlm import __version__
from solo_vlm.data.sources import Source
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_file

# Those that results may depend on. Without OpenCV, images are resized by torch and differ by a level of 255.
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


def write_manifest(path: Path, recipe: Recipe, sources: list[Source], outcome: dict[str, Any]) -> None:
    """Write a run's manifest.

    Args:
        path: of the JSON file.
        recipe: as resolved.
        sources: of the mixture, for their fingerprints.
        outcome: what came of the run: steps done, tokens, counts of skipped samples by reason.
    """
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
    with new_file(path) as partial:
        partial.write_text(json.dumps(manifest, indent=2) + "\n")


def read_recipe(path: Path) -> Recipe:
    """The recipe of a manifest.

    Raises:
        SoloError: the file is no manifest.
    """
    try:
        return Recipe.parse(json.loads(path.read_text())["recipe"], origin=str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SoloError(f"{path} is not a manifest of a run: {error}") from error


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this package's source, where it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
