"""A checkpoint of Megatron-LLM becomes a folder of this project."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from solo_vlm.convert.megatron_folder import MegatronCheckpoint, open_megatron
from solo_vlm.convert.megatron_layout import FusedAttention, layer_cuts, model_cuts
from solo_vlm.convert.project_folder import Converted, expected_shapes, write_project_folder
from solo_vlm.convert.tensors import PlannedTensor
from solo_vlm.convert.tokenizer import (
    has_tokenizer,
    release_tokenizer,
    tokenizer_vision_ids,
    warn_without_tokenizer,
)
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.original_solo import config_from_original
from solo_vlm.models.solo.processing_solo import ImageLayout
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import check_new

Rotary = Literal["interleaved", "halves"]

_LAYER = re.compile(r"model\.language_model\.layers\.(\d+)\.(.*)")


def convert_megatron(
    source: Path,
    out: Path,
    tokenizer_folder: Path | None = None,
    vocabulary: int | None = None,
    iteration: int | None = None,
    layout: ImageLayout = "paper",
    rotary: Rotary = "interleaved",
) -> Converted:
    """Convert a checkpoint of any tensor- and pipeline-parallel size, one tensor in memory at a time.

    Args:
        source: the folder with `latest_checkpointed_iteration.txt`, or that of one iteration.
        out: new folder.
        tokenizer_folder: has the `tokenizer.model`. Default: `source`, if it has one.
        vocabulary: tokens without the rows that Megatron pads with. Default: as many as the tokenizer has,
            or without one, all rows.
        iteration: which, where `source` has several. Default: the latest.
        layout: of images in chats; Megatron checkpoints come from pre-training, hence "paper".
        rotary: "interleaved" as Megatron-LLM rotates queries and keys, or "halves" as transformers does.

    Raises:
        SoloError: naming the file, and the key in it, that is missing, truncated, unsafe or of the wrong
            shape. Nothing is left at `out`.
    """
    check_new(out)
    checkpoint = open_megatron(source, iteration)
    embeddings = checkpoint.parts("word_embeddings")
    rows = sum(part.shape[0] for part in embeddings)
    if vocabulary is not None and not 0 < vocabulary <= rows:
        raise SoloError(
            f"{checkpoint.folder} has {rows} rows of tokens: the vocabulary cannot be {vocabulary}"
        )
    if tokenizer_folder is not None and not has_tokenizer(tokenizer_folder):
        raise SoloError(f"{tokenizer_folder} has no tokenizer: name the folder with the tokenizer.model")
    tokenizer_folder = tokenizer_folder or source
    tokenizer = None
    if has_tokenizer(tokenizer_folder):
        tokenizer = release_tokenizer(tokenizer_folder, vocabulary, most_rows=rows)
    else:
        warn_without_tokenizer(tokenizer_folder)
    rows = vocabulary or (len(tokenizer) if tokenizer else rows)

    dtype = str(embeddings[0].dtype).removeprefix("torch.")
    config = _config(checkpoint, rows, dtype, tokenizer)
    weights = _plan(checkpoint, config, rotary)
    return write_project_folder(out, config, weights, tokenizer, layout, tokenizer_folder)


def _config(
    checkpoint: MegatronCheckpoint, rows: int, dtype: str, tokenizer: PreTrainedTokenizerFast | None
) -> SoloConfig:
    arguments = checkpoint.arguments

    def argument(name: str, default: Any = None) -> Any:
        value = arguments.get(name)
        if value is None and default is None:
            raise SoloError(f"{checkpoint.folder}: its arguments (args) do not say {name}")
        return default if value is None else value

    heads = argument("num_attention_heads")
    settings = config_from_original(
        {
            "vocab_size": rows,
            "hidden_size": argument("hidden_size"),
            "intermediate_size": argument("ffn_hidden_size"),
            "num_hidden_layers": argument("num_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": argument("num_attention_heads_kv", heads),
            "max_position_embeddings": argument("max_position_embeddings", argument("seq_length", 32768)),
            "rms_norm_eps": argument("layernorm_epsilon", 1e-5),
            "rope_theta": argument("rope_theta", 10000.0),
            "sliding_window": arguments.get("sliding_window_size"),
            "bos_token_id": 1,
            "eos_token_id": 2,
            "vision_patch_size": argument("vision_patch_size", 32),
            "torch_dtype": dtype,
        }
    )
    if tokenizer is not None:
        settings |= tokenizer_vision_ids(tokenizer)
    return SoloConfig(**settings)


def _plan(checkpoint: MegatronCheckpoint, config: SoloConfig, rotary: Rotary) -> dict[str, PlannedTensor]:
    text = config.text_config
    attention = FusedAttention(
        text.num_attention_heads, text.num_key_value_heads, text.head_dim, interleaved=rotary == "interleaved"
    )
    of_model, of_layer = model_cuts(), layer_cuts(attention, text.intermediate_size)
    weights = {}
    for name, shape in expected_shapes(config).items():
        if match := _LAYER.fullmatch(name):
            cut, prefix = of_layer[match[2]], f"layers.{match[1]}."
        else:
            cut, prefix = of_model[name], ""
        weights[name] = cut.plan(name, shape, checkpoint.parts(prefix + cut.name))
    return weights
