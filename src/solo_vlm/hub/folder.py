"""The folder that is published: weights, settings, code and card, and nothing else of a model's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from solo_vlm.hub.remote_code import add_remote_code, edit_json
from solo_vlm.models.load import load_processor
from solo_vlm.models.saving import stop_ids
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.original_solo import is_original
from solo_vlm.utils.errors import SoloError

# What else lies in a model's folder (optimizer states, logs, notes) does not leave this machine.
_WEIGHTS = "model*.safetensors"
_INDEX = "model.safetensors.index.json"
_SETTINGS = ("config.json", "generation_config.json", "processor_config.json")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_LICENCES = ("LICENSE*", "NOTICE*")


def check_publishable(model: Path) -> None:
    """Make sure that a folder holds a whole SOLO model in this project's format.

    Raises:
        SoloError: it does not; the message says what it holds, and what to do.
    """
    config = model / "config.json"
    if not config.is_file():
        if (model / "adapter_config.json").is_file():
            raise SoloError(
                f"{model} holds an adapter alone: push the model that training merged it into, "
                f"{model.parent / 'model'}"
            )
        raise SoloError(f"{model} is not a model folder: it has no config.json")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SoloError(f"{config} is not JSON: {error}") from error
    if is_original(settings):
        raise SoloError(f"{model} is in the release's format: first solo convert release {model} NEW_FOLDER")
    if settings.get("model_type") != SoloConfig.model_type:
        raise SoloError(f"{model} holds a {settings.get('model_type')}, not a SOLO model")
    if not (model / "processor_config.json").is_file():
        raise SoloError(
            f"{model} has no processor_config.json: without its processor nobody can use the model"
        )
    if not weights(model):
        raise SoloError(f"{model} has no weights ({_WEIGHTS})")


def weights(model: Path) -> list[Path]:
    """The files with a model's weights."""
    return sorted(model.glob(_WEIGHTS))


def write_folder(
    folder: Path, model: Path, card: str, place_weights: Callable[[Path, Path], Any] = shutil.copyfile
) -> None:
    """Fill a folder that loads anywhere with `trust_remote_code=True`.

    Args:
        folder: an empty one.
        model: folder of a SOLO model; it stays as it is.
        card: becomes `README.md`.
        place_weights: called with (file, new file), to copy large files or to link them.
    """
    for file in weights(model):
        place_weights(file, folder / file.name)
    for file in _matching(model, (_INDEX, *_SETTINGS, *_TOKENIZER, *_LICENCES)):
        shutil.copyfile(file, folder / file.name)
    for file in _matching(folder, (*_SETTINGS, "tokenizer_config.json")):
        edit_json(file, _without_origins)
    _set_generation(folder, model)
    add_remote_code(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _set_generation(folder: Path, model: Path) -> None:
    """Let transformers pad prompts on the left and stop where answers end: older folders do not say so."""
    file = folder / "generation_config.json"
    if not file.is_file():
        file.write_text("{}", encoding="utf-8")
    ends = stop_ids(GenerationConfig.from_pretrained(folder), load_processor(model))
    edit_json(file, lambda config: config.update(eos_token_id=ends))
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(padding_side="left"))


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())


def _without_origins(settings: Any) -> None:
    """Drop where transformers read a model or tokenizer from: often a path of this machine."""
    if not isinstance(settings, dict):
        return
    for name in ("_name_or_path", "name_or_path"):
        settings.pop(name, None)
    for value in settings.values():
        _without_origins(value)
