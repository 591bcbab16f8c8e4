"""Recipe of a run, and fingerprints of what it starts from: its model and its validation data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from solo_vlm.data.sources import Source, is_same_data
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.storage import Folder
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import hash_blocks
from solo_vlm.utils.settings import parse_yaml

_RECIPE_FILE = "recipe.yaml"
_INPUTS_FILE = "inputs.json"
_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".bin", ".gguf")
# Large files are hashed by evenly spaced blocks: more training changes weights everywhere.
_BLOCK_SIZE, _BLOCKS = 1 << 16, 256


def load_recipe(folder: Folder) -> Recipe | None:
    """Read the recipe of the run that a folder belongs to; None if it belongs to none."""
    if (text := folder.find(_RECIPE_FILE)) is None:
        return None
    origin = f"{folder}/{_RECIPE_FILE}"
    return Recipe.parse(parse_yaml(text, f"recipe {origin}"), origin)


def write_recipe(folder: Folder, recipe: Recipe) -> None:
    """Write the recipe of a run into one of its folders."""
    folder.write(_RECIPE_FILE, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


def fingerprint_model(recipe: Recipe) -> dict[str, str]:
    """Fingerprint the files of the model that a run starts from, by name; empty for a model of the hub."""
    model = recipe.mixture.model_source()
    if not isinstance(model, Path) or not model.is_dir():
        return {}
    files = [file for file in model.iterdir() if file.suffix in _MODEL_FILES and file.is_file()]
    return {f"{recipe.model}/{file.name}": _hash_file(file) for file in sorted(files)}


def fingerprint_validation(recipe: Recipe, held_out: Sequence[Source]) -> dict[str, str]:
    """Fingerprint the validation data by source; checkpoints identify the training data.

    Args:
        held_out: Opened sources of the validation mixture, if there is one.
    """
    found = {}
    if validation := recipe.validation_mixture:
        found = dict(zip(validation.source_names(), held_out, strict=True))
    for name, source in recipe.open_questions().items():
        found[f"questions {name}"] = source
    return {name: source.fingerprint() for name, source in found.items()}


def write_inputs(folder: Folder, inputs: dict[str, str]) -> None:
    """Write the fingerprints into one of the folders of a run."""
    folder.write(_INPUTS_FILE, json.dumps(inputs, indent=2))


def check_inputs(folder: Folder, inputs: dict[str, str], prefix: str = "") -> None:
    """Compare fingerprints with those written into a folder when its run started, if any were.

    Args:
        prefix: Compare only names that start with it.

    Raises:
        SoloError: A file was changed, added or removed.
    """
    if (text := folder.find(_INPUTS_FILE)) is None:
        return
    try:
        before = {name: value for name, value in json.loads(text).items() if name.startswith(prefix)}
    except (ValueError, AttributeError) as error:
        raise SoloError(
            f"{folder}/{_INPUTS_FILE} is damaged ({error}): start a new run with out=..."
        ) from error
    names = sorted(before | inputs)
    changed = [name for name in names if not is_same_data(before.get(name, ""), inputs.get(name, ""))]
    if changed:
        raise SoloError(
            f"{', '.join(changed[:3])} changed since the run in {folder} started: restore the original, or "
            "start a new run with out=..."
        )


def _hash_file(file: Path) -> str:
    with file.open("rb") as content:
        return hash_blocks(content, file.stat().st_size, _BLOCK_SIZE, _BLOCKS)
