"""Published folder: weights, settings, code and card, loadable with `trust_remote_code=True` anywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

import solo_vlm.models.solo
from solo_vlm.models.checks import check_files
from solo_vlm.models.load import load_processor
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.original_solo import is_original
from solo_vlm.models.stops import check_stops, complete_generation
from solo_vlm.utils.errors import SoloError

# Nothing else in a model folder (optimizer states, logs, notes) is published.
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
_LICENSES = ("LICENSE*", "NOTICE*")

# transformers' `auto_map`: the class that each Auto class loads.
_MODEL_MAP = {
    "AutoConfig": "configuration_solo.SoloConfig",
    "AutoModel": "modeling_solo.SoloModel",
    "AutoModelForImageTextToText": "modeling_solo.SoloForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_solo.SoloForConditionalGeneration",
}
_PROCESSOR_MAP = {"AutoProcessor": "processing_solo.SoloProcessor"}
_IMAGE_PROCESSOR_MAP = {"AutoImageProcessor": "image_processing_solo.SoloImageProcessor"}


def check_publishable(model: Path) -> None:
    """Check that a folder contains a complete SOLO model in this project's format.

    Raises:
        SoloError: It does not; the message states the reason and what to do.
    """
    check_files(model)
    config = model / "config.json"
    if not config.is_file():
        raise SoloError(f"{model} is not a model folder: it has no config.json")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SoloError(f"{config} is not JSON: {error}") from error
    if is_original(settings):
        raise SoloError(
            f"{model} has the format of the original SOLO code: first run "
            f"`solo convert release {model} NEW_FOLDER`"
        )
    if settings.get("model_type") != SoloConfig.model_type:
        raise SoloError(f"{model} contains a {settings.get('model_type')} model, not a SOLO model")
    if not (model / "processor_config.json").is_file():
        raise SoloError(f"{model} has no processor_config.json: a model cannot be used without its processor")
    if not weight_files(model):
        raise SoloError(f"{model} has no weights ({_WEIGHTS})")


def weight_files(model: Path) -> list[Path]:
    """Return the files with a model's weights."""
    return sorted(model.glob(_WEIGHTS))


def write_folder(
    folder: Path, model: Path, card: str, place_weights: Callable[[Path, Path], Any] = shutil.copyfile
) -> None:
    """Fill a folder that loads anywhere with `trust_remote_code=True`.

    Args:
        folder: Empty folder.
        model: Folder of a SOLO model; it is not changed.
        card: Content of `README.md`.
        place_weights: Called with (file, new file) to copy or link a file of weights.
    """
    for file in weight_files(model):
        place_weights(file, folder / file.name)
    for file in _matching(model, (_INDEX, *_SETTINGS, *_TOKENIZER, *_LICENSES)):
        shutil.copyfile(file, folder / file.name)
    for file in _matching(folder, (*_SETTINGS, "tokenizer_config.json")):
        _edit_json(file, _drop_origins)
    _set_generation(folder, model)
    _add_code(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def code_files() -> list[Path]:
    """Return the modules of a published folder: those of the mapped classes, and their imports."""
    from transformers.dynamic_module_utils import get_relative_import_files

    package = Path(solo_vlm.models.solo.__path__[0])
    classes = {**_MODEL_MAP, **_PROCESSOR_MAP, **_IMAGE_PROCESSOR_MAP}.values()
    mapped = {package / f"{name.partition('.')[0]}.py" for name in classes}
    imported = {Path(file) for module in mapped for file in get_relative_import_files(module)}
    return sorted(mapped | imported)


def _add_code(folder: Path) -> None:
    # `register_for_auto_class` would also change every later `save_pretrained` of this process, and it leaves
    # out AutoModel.
    def map_processors(config: dict[str, Any]) -> None:
        config["auto_map"] = _PROCESSOR_MAP
        config["image_processor"]["auto_map"] = _IMAGE_PROCESSOR_MAP

    _edit_json(folder / "config.json", lambda config: config.update(auto_map=_MODEL_MAP))
    _edit_json(folder / "processor_config.json", map_processors)
    for file in code_files():
        shutil.copyfile(file, folder / file.name)


def _set_generation(folder: Path, model: Path) -> None:
    """Make transformers pad on the left and stop at the end of an answer; old folders may not.

    Raises:
        SoloError: See `check_stops`.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        file.write_text("{}", encoding="utf-8")
    settings, processor = GenerationConfig.from_pretrained(folder), load_processor(model)
    check_stops(model, settings, processor)
    complete_generation(settings, SoloConfig.from_pretrained(folder), processor)
    tokens = {name: getattr(settings, name) for name in ("eos_token_id", "suppress_tokens")}
    _edit_json(file, lambda config: config.update(tokens))
    _edit_json(folder / "tokenizer_config.json", lambda config: config.update(padding_side="left"))


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())


def _drop_origins(settings: Any) -> None:
    """Drop the source of a model or tokenizer, which is often a path of this machine."""
    if not isinstance(settings, dict):
        return
    for name in ("_name_or_path", "name_or_path"):
        settings.pop(name, None)
    for value in settings.values():
        _drop_origins(value)


def _edit_json(file: Path, edit: Callable[[Any], Any]) -> None:
    value = json.loads(file.read_text(encoding="utf-8"))
    edit(value)
    file.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
