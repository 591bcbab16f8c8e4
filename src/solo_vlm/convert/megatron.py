"""Convert checkpoints of Megatron-LLM to model folders.

A checkpoint is a grid of pickles, one per pipeline stage and tensor-parallel rank:

- Ranks hold consecutive rows of some weights and consecutive columns of others.
- `query_key_value` holds per key-value head: its query heads, the key head, the value head.
- Rows within a query or key head are interleaved (0, d/2, 1, d/2 + 1, ...): Megatron-LLM rotates adjacent
  pairs, transformers the two halves.
- `dense_h_to_4h` of a rank is its rows of the up projection, then its rows of the gate.
- The vocabulary is padded to divide evenly among the ranks.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from solo_vlm.convert.checkpoint_files import PlannedTensor, StoredTensor, locate, open_pickle
from solo_vlm.convert.model_folder import Converted, expected_shapes, write_model_folder
from solo_vlm.models.original import has_tokenizer, original_tokenizer, tokenizer_vision_ids
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.original_solo import config_from_original
from solo_vlm.models.solo.processing_solo import ImageLayout
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import check_new

Rotary = Literal["interleaved", "halves"]

_OWN_LAYER = re.compile(r"model\.language_model\.layers\.(\d+)\.(.*)")
_LAYER = re.compile(r"layers\.(\d+)\.")
_RANK_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
# The second is written with a distributed optimizer, whose state is in other folders.
_RANK_FILES = ("model_optim_rng.pt", "model_rng.pt")


def convert_megatron(
    source: Path,
    out: Path,
    tokenizer_folder: Path | None = None,
    vocabulary: int | None = None,
    iteration: int | None = None,
    layout: ImageLayout = "paper",
    rotary: Rotary = "interleaved",
) -> Converted:
    """Convert a checkpoint of any tensor- and pipeline-parallel size.

    Args:
        source: Folder with `latest_checkpointed_iteration.txt`, or folder of one iteration.
        out: New folder.
        tokenizer_folder: Folder with the `tokenizer.model`. Default: `source`, if it has one.
        vocabulary: Number of tokens without Megatron's padding rows. Default: the size of the tokenizer, or
            all rows if there is none.
        iteration: Iteration to convert. Default: the latest.
        layout: Image layout in chats. Megatron checkpoints come from pre-training, so it is "paper".
        rotary: Row order of queries and keys: "interleaved" as in Megatron-LLM, "halves" as in transformers.

    Raises:
        SoloError: A file or key is missing, truncated, unsafe or of the wrong shape; the message names it.
            Nothing is left at `out`.
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
        tokenizer = original_tokenizer(tokenizer_folder, vocabulary, max_rows=rows)
    rows = vocabulary or (len(tokenizer) if tokenizer else rows)

    dtype = str(embeddings[0].dtype).removeprefix("torch.")
    config = _config(checkpoint, rows, dtype, tokenizer)
    weights = _plan(checkpoint, config, rotary)
    return write_model_folder(out, config, weights, tokenizer, layout, tokenizer_folder)


@dataclass(frozen=True)
class MegatronCheckpoint:
    """Content of the pickles.

    Attributes:
        folder: Folder of the iteration.
        arguments: Training arguments.
        stages: Tensors by Megatron's name, per pipeline stage and tensor-parallel rank. Layers are numbered
            across all stages.
    """

    folder: Path
    arguments: dict[str, Any]
    stages: list[list[dict[str, StoredTensor]]]

    def parts(self, name: str) -> list[StoredTensor]:
        """Return a tensor's part of each tensor-parallel rank, from the first stage that has it.

        Raises:
            SoloError: No stage has the tensor, or some ranks of a stage lack it.
        """
        for ranks in self.stages:
            found = [tensors[name] for tensors in ranks if name in tensors]
            if len(found) == len(ranks):
                return found
            if found:
                raise SoloError(f"{self.folder}: {name} is in {len(found)} of {len(ranks)} parts only")
        raise SoloError(f"{self.folder} lacks {name}")


def open_megatron(source: Path, iteration: int | None = None) -> MegatronCheckpoint:
    """Open the pickles of one iteration; only their structure is read, and no code in them is executed.

    Args:
        source: Folder with `latest_checkpointed_iteration.txt`, or folder of one iteration.
        iteration: Iteration to open. Default: the latest.

    Raises:
        SoloError: A file is missing, truncated or unsafe; the message names it.
    """
    folder = _iteration_folder(source, iteration)
    arguments: dict[str, Any] = {}
    stages = []
    layers = 0
    for ranks in _rank_files(folder):
        opened = []
        for file in ranks:
            content = open_pickle(file, of_megatron=True)
            arguments = arguments or _arguments(content, file)
            opened.append(dict(_tensors(content, file, first_layer=layers)))
        stages.append(opened)
        layers += len({match[1] for name in opened[0] if (match := _LAYER.match(name))})
    return MegatronCheckpoint(folder, arguments, stages)


def _iteration_folder(source: Path, iteration: int | None) -> Path:
    if iteration is not None:
        folder = source / f"iter_{iteration:07d}"
    elif (tracker := source / "latest_checkpointed_iteration.txt").is_file():
        latest = tracker.read_text().strip()
        folder = source / (f"iter_{int(latest):07d}" if latest.isdigit() else latest)
    else:
        folder = source
        iterations = sorted(p for p in source.glob("iter_*") if p.is_dir())
        if len(iterations) == 1:
            folder = iterations[0]
    if not folder.is_dir():
        raise SoloError(f"{folder} is missing")
    return folder


def _rank_files(folder: Path) -> list[list[Path]]:
    """Return the files as [stage][rank]; raise if one is missing."""
    grid: dict[tuple[int, int], Path] = {}
    for child in folder.iterdir():
        match = _RANK_FOLDER.fullmatch(child.name)
        files = [child / name for name in _RANK_FILES if (child / name).is_file()]
        if match and files:
            grid[int(match[2] or 0), int(match[1])] = files[0]
    if not grid:
        raise SoloError(f"{folder} is not a Megatron checkpoint: it has no mp_rank_*/{_RANK_FILES[0]}")
    stages, ranks = (max(place[axis] for place in grid) + 1 for axis in (0, 1))
    for stage in range(stages):
        for rank in range(ranks):
            if (stage, rank) not in grid:
                name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")
                raise SoloError(f"{folder / name / _RANK_FILES[0]} is missing")
    return [[grid[stage, rank] for rank in range(ranks)] for stage in range(stages)]


def _arguments(content: Any, file: Path) -> dict[str, Any]:
    arguments = content.get("args") if isinstance(content, Mapping) else None
    if isinstance(arguments, Namespace):
        return vars(arguments)
    if isinstance(arguments, Mapping):
        return dict(arguments)
    raise SoloError(f"{file} has no training arguments (args)")


def _tensors(content: Any, file: Path, first_layer: int) -> Iterator[tuple[str, StoredTensor]]:
    if "model0" in content:
        raise SoloError(f"{file} has an interleaved pipeline schedule, which cannot be converted")
    try:
        model = content["model"]["language_model"]
    except (KeyError, TypeError):
        raise SoloError(f"{file} has no language model (model.language_model)") from None
    for name, tensor in _flatten(model, ""):
        key = f"model.language_model.{name}"
        yield _canonical_name(name, first_layer), locate(file, key, tensor)


def _flatten(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")


def _canonical_name(name: str, first_layer: int) -> str:
    """Unify the names of checkpoints from before and after the first training step."""
    for old in ("encoder.", "transformer.", "embedding."):
        name = name.removeprefix(old)
    name = name.removesuffix(".weight").replace(".attention.", ".self_attention.")
    return _LAYER.sub(lambda match: f"layers.{int(match[1]) + first_layer}.", name, count=1)


def _config(
    checkpoint: MegatronCheckpoint, rows: int, dtype: str, tokenizer: PreTrainedTokenizerFast | None
) -> SoloConfig:
    arguments = checkpoint.arguments

    def argument(name: str, default: Any = None) -> Any:
        value = arguments.get(name)
        if value is None and default is None:
            raise SoloError(f"{checkpoint.folder}: the training arguments (args) lack {name}")
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
    attention = _FusedAttention(
        text.num_attention_heads, text.num_key_value_heads, text.head_dim, interleaved=rotary == "interleaved"
    )
    slices = _weight_slices(attention, text.intermediate_size)
    weights = {}
    for name, shape in expected_shapes(config).items():
        if match := _OWN_LAYER.fullmatch(name):
            source, prefix = slices[match[2]], f"layers.{match[1]}."
        else:
            source, prefix = slices[name], ""
        weights[name] = source.plan(name, shape, checkpoint.parts(prefix + source.name))
    return weights


@dataclass(frozen=True)
class _WeightSlice:
    """Location of one weight of a decoder in Megatron's tensors.

    Attributes:
        name: Megatron's name, without "layers.N.".
        axis: Axis along which ranks hold parts: 0 (rows), 1 (columns), or None (every rank holds the whole).
        fused_rows: Rows of Megatron's whole tensor if it holds more than this weight. None: as many as the
            weight has, or more (padding at the end).
        select: Function that returns this weight's share of one rank's part.
    """

    name: str
    axis: int | None = 0
    fused_rows: int | None = None
    select: Callable[[Tensor], Tensor] = lambda part: part

    def plan(self, name: str, shape: tuple[int, ...], parts: Sequence[StoredTensor]) -> PlannedTensor:
        """Return the weight `name` of this shape; its parts are checked now and joined when it is written."""
        for part in parts:
            if not self._fits(part, shape, len(parts)) or part.dtype != parts[0].dtype:
                raise SoloError(
                    f"{part.file}: {part.key} is {part.dtype} {list(part.shape)}, which cannot be one of "
                    f"{len(parts)} parts of {name} with the shape {list(shape)}"
                )
        return PlannedTensor(name, parts[0].dtype, shape, lambda: self._join(parts, shape))

    def _fits(self, part: StoredTensor, shape: tuple[int, ...], ranks: int) -> bool:
        if self.axis is None:
            return part.shape == shape
        if len(part.shape) != 2 or part.shape[1] * (ranks if self.axis == 1 else 1) != shape[1]:
            return False
        rows = part.shape[0] * (ranks if self.axis == 0 else 1)
        return rows >= shape[0] if self.fused_rows is None else rows == self.fused_rows

    def _join(self, parts: Sequence[StoredTensor], shape: tuple[int, ...]) -> Tensor:
        if self.axis is None:
            return parts[0].read()
        joined = torch.empty(shape, dtype=parts[0].dtype)
        done = 0
        for part in parts:  # one in memory at a time
            share = self.select(part.read())
            size = min(share.shape[self.axis], shape[self.axis] - done)  # drops padding
            joined.narrow(self.axis, done, size).copy_(share.narrow(self.axis, 0, size))
            done += size
        return joined


@dataclass(frozen=True)
class _FusedAttention:
    """Grouped queries, keys and values in one weight."""

    heads: int
    key_value_heads: int
    head_dim: int
    interleaved: bool

    @property
    def rows(self) -> int:
        """Rows of the whole fused weight."""
        return (self.heads + 2 * self.key_value_heads) * self.head_dim

    def query(self, part: Tensor) -> Tensor:
        """Return the query rows of a rank's part, (fused rows, hidden)."""
        return self._reorder(self._groups(part)[:, :-2])

    def key(self, part: Tensor) -> Tensor:
        """Return the key rows of a rank's part, (fused rows, hidden)."""
        return self._reorder(self._groups(part)[:, -2:-1])

    def value(self, part: Tensor) -> Tensor:
        """Return the value rows of a rank's part, (fused rows, hidden)."""
        return self._groups(part)[:, -1].flatten(0, 1)

    def _groups(self, part: Tensor) -> Tensor:
        per_group = self.heads // self.key_value_heads + 2
        return part.unflatten(0, (-1, per_group, self.head_dim))  # (groups, per_group, head_dim, hidden)

    def _reorder(self, heads: Tensor) -> Tensor:
        """Flatten (groups, n, head_dim, hidden) to rows, each head in transformers' order."""
        if self.interleaved:
            pairs = heads.unflatten(2, (self.head_dim // 2, 2))  # (groups, n, head_dim / 2, 2, hidden)
            heads = pairs.transpose(2, 3).flatten(2, 3)
        return heads.flatten(0, 2)


def _weight_slices(attention: _FusedAttention, intermediate_size: int) -> dict[str, _WeightSlice]:
    """Return the location of each weight, by its name in the model, or by its name within a layer."""
    fused = "self_attention.query_key_value"
    mlp = "mlp.dense_h_to_4h"
    return {
        "model.language_model.embed_tokens.weight": _WeightSlice("word_embeddings"),
        "model.embed_vision_patch.weight": _WeightSlice("embed_vision_patch"),
        "model.language_model.norm.weight": _WeightSlice("final_layernorm", axis=None),
        "lm_head.weight": _WeightSlice("lm_head"),
        "input_layernorm.weight": _WeightSlice("input_layernorm", axis=None),
        "post_attention_layernorm.weight": _WeightSlice("post_attention_layernorm", axis=None),
        "self_attn.q_proj.weight": _WeightSlice(fused, 0, attention.rows, attention.query),
        "self_attn.k_proj.weight": _WeightSlice(fused, 0, attention.rows, attention.key),
        "self_attn.v_proj.weight": _WeightSlice(fused, 0, attention.rows, attention.value),
        "self_attn.o_proj.weight": _WeightSlice("self_attention.dense", axis=1),
        "mlp.up_proj.weight": _WeightSlice(mlp, 0, 2 * intermediate_size, lambda part: part.chunk(2)[0]),
        "mlp.gate_proj.weight": _WeightSlice(mlp, 0, 2 * intermediate_size, lambda part: part.chunk(2)[1]),
        "mlp.down_proj.weight": _WeightSlice("mlp.dense_4h_to_h", axis=1),
    }
