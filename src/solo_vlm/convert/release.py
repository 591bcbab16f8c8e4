"""SOLO-7B's folder becomes a folder of this project, and a folder of this project becomes one like it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solo_vlm.convert.checkpoint_folder import open_checkpoint, read_json
from solo_vlm.convert.project_folder import Converted, plan, write_project_folder
from solo_vlm.convert.safetensors_files import write_checkpoint
from solo_vlm.convert.tensors import PlannedTensor, StoredTensor
from solo_vlm.convert.tokenizer import (
    copy_sentencepiece,
    has_tokenizer,
    release_tokenizer,
    tokenizer_vision_ids,
    warn_without_tokenizer,
)
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.original_solo import (
    ORIGINAL_ARCHITECTURE,
    ORIGINAL_KEYS,
    config_from_original,
    config_to_original,
    is_original,
)
from solo_vlm.models.solo.processing_solo import ImageLayout
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import check_new, new_folder

_RELEASE_TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": True,
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "padding_side": "left",
}


def convert_release(source: Path, out: Path, layout: ImageLayout = "original") -> Converted:
    """Convert a folder of the release, one tensor in memory at a time.

    Args:
        source: `config.json`, weights (safetensors or `.bin`, one file or shards), and the tokenizer.
        out: new folder; tensors keep their bytes and get this project's names.
        layout: what SOLO-7B was fine-tuned with ("original"), or what it was pre-trained with ("paper").

    Raises:
        SoloError: naming the file, and the key in it, that is missing, truncated, unsafe or of the wrong
            shape. Nothing is left at `out`.
    """
    check_new(out)
    settings = read_json(source / "config.json")
    if not is_original(settings):
        raise SoloError(
            f"{source} is no checkpoint of the release: its architecture is not {ORIGINAL_ARCHITECTURE}"
        )
    found = {_own_name(key): tensor for key, tensor in open_checkpoint(source).items()}
    embedding = _embedding(found, source)
    rows = embedding.shape[0]
    config_settings = config_from_original({**settings, "vocab_size": rows})
    config_settings["dtype"] = str(embedding.dtype).removeprefix("torch.")
    tokenizer = None
    if has_tokenizer(source):
        tokenizer = release_tokenizer(source, rows)
        config_settings |= tokenizer_vision_ids(tokenizer)
    else:
        warn_without_tokenizer(source)
    config = SoloConfig(**config_settings)
    return write_project_folder(out, config, plan(config, found), tokenizer, layout, source)


def convert_to_release(source: Path, out: Path) -> dict[str, Any]:
    """Write a folder of this project as the release would have: its names, `config.json` and tokenizer.

    Args:
        source: a model over Mistral, in safetensors.
        out: new folder; tensors keep their bytes.

    Returns:
        `out`, and the numbers of `tensors` and `bytes`.

    Raises:
        SoloError: it is no SOLO model over Mistral, not causal throughout, or a file is missing or broken.
    """
    check_new(out)
    settings = read_json(source / "config.json")
    if settings.get("model_type") != "solo":
        raise SoloError(f"{source} is no SOLO model: its model_type is {settings.get('model_type')!r}")
    config = SoloConfig.from_pretrained(source)
    family = config.text_config.model_type
    if family != "mistral":
        raise SoloError(f"the release knows models over Mistral only; {source} is over {family!r}")
    if config.bidirectional_images:
        raise SoloError(f"patches of {source} see each other in both directions; the release is causal alone")
    weights = [
        PlannedTensor(_release_name(name), weight.dtype, weight.shape, weight.read)
        for name, weight in plan(config, open_checkpoint(source)).items()
    ]
    dtype = str(weights[0].dtype).removeprefix("torch.")
    with new_folder(out) as folder:
        write_checkpoint(folder, weights)
        _write_json(folder / "config.json", config_to_original(config, dtype))
        _write_tokenizer(source, folder)
    return {"out": str(out), "tensors": len(weights), "bytes": sum(weight.nbytes for weight in weights)}


def _own_name(release_name: str) -> str:
    for pattern, name in ORIGINAL_KEYS.items():
        release_name = re.sub(pattern, name, release_name)
    return release_name


def _release_name(own_name: str) -> str:
    return own_name.replace("model.language_model.", "model.", 1)


def _embedding(found: Mapping[str, StoredTensor], source: Path) -> StoredTensor:
    try:
        return found["model.language_model.embed_tokens.weight"]
    except KeyError:
        raise SoloError(f"{source} lacks the weight model.embed_tokens.weight") from None


def _write_tokenizer(source: Path, folder: Path) -> None:
    if copy_sentencepiece(source, folder):
        _write_json(folder / "tokenizer_config.json", _RELEASE_TOKENIZER_CONFIG)
    elif has_tokenizer(source):
        release_tokenizer(source).save_pretrained(folder)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
