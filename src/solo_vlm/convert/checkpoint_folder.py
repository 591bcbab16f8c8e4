"""A folder of weights as transformers writes it: safetensors or .bin, one file or shards with an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from solo_vlm.convert.pickles import open_state_dict
from solo_vlm.convert.safetensors_files import open_safetensors
from solo_vlm.convert.tensors import StoredTensor
from solo_vlm.utils.errors import SoloError

_CANDIDATES = ("model.safetensors", "pytorch_model.bin")


def open_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder by name; safetensors go before `.bin`.

    Raises:
        SoloError: naming the file or the key that is missing, truncated or unsafe.
    """
    for name in _CANDIDATES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _open_shards(folder, read_json(index))
        if (folder / name).is_file():
            return _open_file(folder / name)
    raise SoloError(f"{folder} has no weights: expected {' or '.join(_CANDIDATES)}, or shards with an index")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        SoloError: there is none.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise SoloError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise SoloError(f"{file} holds no JSON object")
    return content


def _open_shards(folder: Path, index: dict[str, Any]) -> dict[str, StoredTensor]:
    weight_map: dict[str, str] = index.get("weight_map", {})
    shards: dict[str, dict[str, StoredTensor]] = {}
    tensors = {}
    for key, name in weight_map.items():
        if name not in shards:
            if not (folder / name).is_file():
                raise SoloError(f"{folder / name} is missing: the index says that it has {key}")
            shards[name] = _open_file(folder / name)
        if key not in shards[name]:
            raise SoloError(f"{folder / name} lacks {key}, which the index says it has")
        tensors[key] = shards[name][key]
    return tensors


def _open_file(file: Path) -> dict[str, StoredTensor]:
    return open_safetensors(file) if file.suffix == ".safetensors" else open_state_dict(file)
