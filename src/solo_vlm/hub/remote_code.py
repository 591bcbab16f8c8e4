"""A model folder carries the code that reads it: `trust_remote_code=True` then does without solo-vlm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import solo_vlm.models.solo

_MODEL = {
    "AutoConfig": "configuration_solo.SoloConfig",
    "AutoModel": "modeling_solo.SoloModel",
    "AutoModelForImageTextToText": "modeling_solo.SoloForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_solo.SoloForConditionalGeneration",
}
_PROCESSOR = {"AutoProcessor": "processing_solo.SoloProcessor"}
_IMAGE_PROCESSOR = {"AutoImageProcessor": "image_processing_solo.SoloImageProcessor"}


def add_remote_code(folder: Path) -> None:
    """Copy the model's code into a folder, and tell transformers' Auto classes what is where.

    The classes' own `register_for_auto_class` would do so at every later `save_pretrained` of this process,
    and leaves out `AutoModel`.

    Args:
        folder: of a model, with `config.json` and `processor_config.json`; they are changed.
    """
    edit_json(folder / "config.json", lambda config: config.update(auto_map=_MODEL))
    edit_json(folder / "processor_config.json", _map_processors)
    for file in code_files():
        shutil.copyfile(file, folder / file.name)


def code_files() -> list[Path]:
    """The modules that a model folder needs: those of the mapped classes, and what they import of ours."""
    from transformers.dynamic_module_utils import get_relative_import_files

    package = Path(solo_vlm.models.solo.__path__[0])
    classes = {**_MODEL, **_PROCESSOR, **_IMAGE_PROCESSOR}.values()
    mapped = {package / f"{name.partition('.')[0]}.py" for name in classes}
    imported = {Path(file) for module in mapped for file in get_relative_import_files(module)}
    return sorted(mapped | imported)


def edit_json(file: Path, edit: Callable[[Any], Any]) -> None:
    """Change the value in a JSON file in place."""
    value = json.loads(file.read_text(encoding="utf-8"))
    edit(value)
    file.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _map_processors(config: dict[str, Any]) -> None:
    config["auto_map"] = _PROCESSOR
    config["image_processor"]["auto_map"] = _IMAGE_PROCESSOR
