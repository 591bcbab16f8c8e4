"""Convert folders of the original SOLO code, such as SOLO-7B, to model folders, and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from solo_vlm.convert.checkpoint_files import (
    PlannedTensor,
    open_checkpoint,
    read_json,
    write_checkpoint,
    write_json,
)
from solo_vlm.convert.model_folder import Converted, plan_weights, write_model_folder
from solo_vlm.models.checks import check_files
from solo_vlm.models.original import (
    copy_sentencepiece,
    has_tokenizer,
    original_tokenizer,
    tokenizer_vision_ids,
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

_TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": True,
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "padding_side": "left",
}


def convert_original(source: Path, out: Path, layout: ImageLayout = "original") -> Converted:
    """Convert an original checkpoint to a model folder.

    Args:
        source: Folder with `config.json`, weights (safetensors or `.bin`, one file or shards) and tokenizer.
        out: New folder. Tensors are renamed; their bytes stay the same.
        layout: Image layout of SOLO-7B's fine-tuning ("original") or of its pre-training ("paper").

    Raises:
        SoloError: A file or key is missing, truncated, unsafe or of the wrong shape; the message names it.
            Nothing is left at `out`.
    """
    check_new(out)
    check_files(source)
    settings = read_json(source / "config.json")
    if not is_original(settings):
        raise SoloError(
            f"{source} is not a checkpoint of the original SOLO code: its architecture is not "
            f"{ORIGINAL_ARCHITECTURE}"
        )
    found = {_own_name(key): tensor for key, tensor in open_checkpoint(source).items()}
    embedding = found.get("model.language_model.embed_tokens.weight")
    if embedding is None:
        raise SoloError(f"{source} lacks the weight model.embed_tokens.weight")
    rows = embedding.shape[0]
    config_settings = config_from_original({**settings, "vocab_size": rows})
    config_settings["dtype"] = str(embedding.dtype).removeprefix("torch.")
    tokenizer = original_tokenizer(source, rows) if has_tokenizer(source) else None
    if tokenizer is not None:
        config_settings |= tokenizer_vision_ids(tokenizer)
    config = SoloConfig(**config_settings)
    return write_model_folder(out, config, plan_weights(config, found), tokenizer, layout, source)


def convert_to_original(source: Path, out: Path) -> dict[str, Any]:
    """Convert a model folder to the names, `config.json` and tokenizer of the original code.

    Args:
        source: Model folder with a Mistral decoder, in safetensors.
        out: New folder. Tensors are renamed; their bytes stay the same.

    Returns:
        `out`, and the numbers of `tensors` and `bytes`.

    Raises:
        SoloError: The model is not a SOLO model with a Mistral decoder and causal attention throughout, or a
            file is missing or broken.
    """
    check_new(out)
    check_files(source)
    settings = read_json(source / "config.json")
    if settings.get("model_type") != "solo":
        raise SoloError(f"{source} is not a SOLO model: its model_type is {settings.get('model_type')!r}")
    config = SoloConfig.from_pretrained(source)
    family = config.text_config.model_type
    if family != "mistral":
        raise SoloError(f"the original code supports Mistral only, but the decoder of {source} is {family!r}")
    if not config.is_paper_design:
        raise SoloError(
            f"the original code has the paper's design only, but {source} has image_attention="
            f"{config.image_attention}, image_positions={config.image_positions}, "
            f"patch_embedding={config.patch_embedding}"
        )
    weights = [
        PlannedTensor(
            name.replace("model.language_model.", "model.", 1), weight.dtype, weight.shape, weight.read
        )
        for name, weight in plan_weights(config, open_checkpoint(source)).items()
    ]
    dtype = str(weights[0].dtype).removeprefix("torch.")
    with new_folder(out) as folder:
        write_checkpoint(folder, weights)
        write_json(folder / "config.json", config_to_original(config, dtype))
        if copy_sentencepiece(source, folder):
            write_json(folder / "tokenizer_config.json", _TOKENIZER_CONFIG)
        elif has_tokenizer(source):
            original_tokenizer(source).save_pretrained(folder)
    return {"out": str(out), "tensors": len(weights), "bytes": sum(weight.nbytes for weight in weights)}


def _own_name(key: str) -> str:
    for pattern, name in ORIGINAL_KEYS.items():
        key = re.sub(pattern, name, key)
    return key
