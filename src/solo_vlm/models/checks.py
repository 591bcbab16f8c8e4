"""Checks of a model folder, which may be untrusted, before anything in it is loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from solo_vlm.utils.errors import SoloError, first_line
from solo_vlm.utils.files import is_inside

_READ_WHOLE = (".json", ".txt", ".model", ".tiktoken", ".spm", ".vocab", ".bpe")
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_GENERATION = "generation_config.json"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_MAX_FILE_BYTES = 2**26  # of tokenizers and settings; the largest known tokenizers have 35 MB
_ADDED_TOKENS = {"tokenizer.json": "added_tokens", "tokenizer_config.json": "added_tokens_decoder"}
_MAX_ADDED_TOKENS = 2**18  # speech models add 65,536
_MAX_ADDED_CHARACTERS = 2**22  # each takes about 120 bytes of memory
_MAX_HEADER_BYTES = 2**25
_MAX_NUMBER = 2**31
_MAX_SIDE = 2**13  # pixels
_SIDES = {"height", "width", "longest_edge", "shortest_edge", "patch_size", "vision_patch_size"}
_MAX_COUNT = 2**16
_COUNT = re.compile(r"(num|n)_(?!ctx|positions|vocab|embeddings)\w+")  # of layers, heads, experts, ...
_NO_SIZE = re.compile(r"\w*(seed|theta|base|param(eter)?s|tokens)|model_max_length")  # any number is harmless
_LAYERS = re.compile(r"(num_hidden_layers|num_layers|n_layers?|num_blocks)")
_OBSOLETE = "rotary_emb.inv_freq"
_GENERATION_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("max_length", "max_new_tokens"), (1, _MAX_NUMBER)),
    **dict.fromkeys(("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size"), (0, _MAX_NUMBER)),
    **dict.fromkeys(("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"), (0, 1)),
    **dict.fromkeys(("do_sample", "use_cache"), (False, True)),
    "temperature": (0, 100),
    "repetition_penalty": (0.01, 100),
}
_TOKEN_IDS = re.compile(r"(bos|eos|pad)_token_id|(begin_)?suppress_tokens")
_WITHOUT_EFFECT = re.compile(r"_\w+|transformers_version")
_ONES = {
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "length_penalty",
    "encoder_repetition_penalty",
}
_CHECKED_TOKENS = 16
_CHECKED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_COMPRESSION = 16  # parameters per stored number, of weights packed in a few bits

_INTEGER_METHODS = ("bitsandbytes", "compressed-tensors")
"""Quantization methods of transformers that store integers under the name and in the shape of the weight."""


def first_reason(path: str | Path, error: BaseException) -> str:
    """Return why a model or tokenizer cannot be read, in one line; if it is no path, the hub's reason."""
    line = first_line(error)
    return line if Path(path).exists() else f"no such folder, and from the hub: {line}"


def check_files(path: str | Path) -> None:
    """Check the files of a local model folder, or a `config.json`, without reading weights.

    Two environment variables relax the limits: SOLO_ALLOW_OUTSIDE_FILES=1 accepts links that lead out of the
    folder, and SOLO_MAX_FILE_BYTES is the largest size of a file of settings or of a tokenizer.

    Raises:
        SoloError: There is no such path, and it is no hub ID; the folder has an adapter, a link leads out of
            it, a file is a pipe or device, one that is read as a whole is too large, a file of
            settings is broken or has absurd sizes or NaN, or a shard that the index lists is missing or
            elsewhere.
    """
    folder = Path(path)
    if folder.is_file():
        _check_numbers(folder)
    if not folder.exists():
        try:
            validate_repo_id(str(path))
        except HFValidationError:
            raise SoloError(f"no model at {path}") from None
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").is_file():
        if (folder / "config.json").is_file():  # transformers would add the adapter to the model
            raise SoloError(
                f"{path} has an adapter beside the model: merge it with PEFT, or remove its files"
            )
        raise SoloError(
            f"{path} contains only an adapter: use the merged model that training wrote, "
            f"{folder.parent / 'model'}, or merge it with PEFT"
        )
    allows_outside = os.environ.get("SOLO_ALLOW_OUTSIDE_FILES") == "1"
    largest = int(os.environ.get("SOLO_MAX_FILE_BYTES", _MAX_FILE_BYTES))
    for file in sorted(folder.rglob("*")):
        if file.is_symlink() and not allows_outside and not is_inside(str(file), str(folder)):
            raise SoloError(
                f"{file} is a link to {file.readlink()}, outside of the model's folder: copy the file, or "
                "set SOLO_ALLOW_OUTSIDE_FILES=1"
            )
        if file.exists() and not (file.is_file() or file.is_dir()):  # reading a pipe may never end
            raise SoloError(f"{file} is not a regular file: remove it")
        is_read = file.suffix == ".jinja" or (file.parent == folder and file.suffix in _READ_WHOLE)
        if is_read and file.is_file() and file.stat().st_size > largest:
            raise SoloError(
                f"{file} has {file.stat().st_size:,} bytes, more than SOLO_MAX_FILE_BYTES = {largest:,}"
            )
    for name in _INDEXES:
        if (folder / name).is_file():
            _check_index(folder / name)
    for name in ("config.json", _GENERATION, *_PROCESSORS):
        if (folder / name).is_file():
            _check_numbers(folder / name)
    if (folder / _GENERATION).is_file():
        for key, value in _read_object(folder / _GENERATION).items():
            if key.endswith("token_id") or _TOKEN_IDS.fullmatch(key):
                _check_token_ids(f"{folder / _GENERATION}: {key}", value)


def check_weights(path: str | Path, make_model: Any) -> None:
    """Compare the configuration of a local folder with the headers of its safetensors files.

    Args:
        path: Model folder; hub IDs and other weights are left alone.
        make_model: Function without arguments that makes the model, called on the meta device.

    Raises:
        SoloError: A header is broken, or the configuration asks for a model of another size.
    """
    folder = Path(path)
    files = sorted(folder.glob("model*.safetensors")) if folder.is_dir() else []
    if not files:
        return
    dtypes, stored = {}, {}
    for file in files:
        for name, dtype, shape in _stored_tensors(file):
            dtypes[name], stored[name] = dtype, shape
    config = _read_object(folder / "config.json")
    layers = [value for key, value in _numbers(config) if _LAYERS.fullmatch(key) and value > len(stored)]
    if layers:
        raise SoloError(
            f"{folder}: config.json asks for {layers[0]:,} layers, but has {len(stored):,} tensors"
        )
    try:
        with torch.device("meta"):
            model: nn.Module = make_model()
    except Exception as error:  # any type, from any model family
        raise SoloError(f"cannot load {folder}: {first_line(error)}") from error
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    asked, found = (sum(map(prod, shapes.values())) for shapes in (expected, stored))
    if asked > _MAX_COMPRESSION * found:
        raise SoloError(
            f"{folder}: config.json asks for {asked:,} parameters, but the weights have {found:,}"
        )
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    for name in stored.keys() & expected.keys():
        if stored[name] != expected[name]:
            if method:  # weights are packed
                continue
            raise SoloError(
                f"{folder}: {name} has the shape {list(stored[name])}, but config.json implies "
                f"{list(expected[name])}"
            )
        if "F" not in dtypes[name] and method not in _INTEGER_METHODS:
            raise SoloError(f"{folder}: {name} has the dtype {dtypes[name]}, but weights are floating point")


def check_tokenizer(path: str | Path) -> None:
    """Check the added tokens of a local folder, which take far more memory than their file.

    Raises:
        SoloError: A file of the tokenizer is no JSON object, or it adds too many tokens or too much text.
    """
    for name, key in _ADDED_TOKENS.items():
        file = Path(path, name)
        if not file.is_file():
            continue
        added = _read_object(file).get(key) or []
        if not isinstance(added, dict | list):
            raise SoloError(f"{file}: {key} is no list of tokens")
        entries = added.values() if isinstance(added, dict) else added
        characters = sum(len(str(entry.get("content"))) for entry in entries if isinstance(entry, dict))
        if len(entries) > _MAX_ADDED_TOKENS or characters > _MAX_ADDED_CHARACTERS:
            raise SoloError(
                f"{file} adds {len(entries):,} tokens of {characters:,} characters: at most "
                f"{_MAX_ADDED_TOKENS:,} and {_MAX_ADDED_CHARACTERS:,} are accepted"
            )


def check_vocabulary(path: str | Path, tokenizer: Any) -> None:
    """Check that a loaded tokenizer knows text: without its files, some classes have special tokens alone.

    Raises:
        SoloError: It does not.
    """
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    if special.issuperset(tokenizer.get_vocab()):
        raise SoloError(f"{path} has no vocabulary of a tokenizer: copy the LLM's tokenizer.json into it")


def check_loaded(
    path: str | Path, model: PreTrainedModel, info: Mapping[str, Any], left_out: Container[str] = ()
) -> None:
    """Check that a model got all of its weights from the files, and that they and its buffers are finite.

    Args:
        path: Folder or hub ID, for messages.
        model: Loaded model.
        info: Loading info of transformers.
        left_out: Names of parts of the files that the model does not have.

    Raises:
        SoloError: A weight is missing, belongs to a layer that the model does not have, or is not finite, or
            settings imply such a buffer, outputs without names, or a head that is the token embedding, but
            the files have another.
    """
    if not model.config.get_text_config().return_dict:
        raise SoloError(f"{path}: config.json says return_dict = false, without which outputs have no names")
    if missing := sorted(info["missing_keys"]):
        raise SoloError(
            f"{path} lacks the weight {missing[0]}, one of {len(missing)} that config.json implies"
        )
    unexpected = sorted(
        key
        for key in info["unexpected_keys"]
        if not key.endswith(_OBSOLETE) and not any(part in left_out for part in key.split(".")[:2])
    )
    if unexpected:
        raise SoloError(f"{path}: {unexpected[0]} is no weight of the model that config.json describes")
    # transformers keeps both with a warning; a model made anew from this configuration would tie them.
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)  # Inkling has no setting
    if model._tied_weights_keys and is_tied:
        head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
        if head is not None and head.weight is not tokens.weight:
            raise SoloError(
                f"{path}: config.json says tie_word_embeddings, but the weights have a head of their own: "
                "set it to false"
            )
    for name, parameter in model.named_parameters():
        if not _is_finite(parameter):
            raise SoloError(f"{path}: the weight {name} is not finite (NaN or infinite): the file is damaged")
    for name, buffer in model.named_buffers():
        # Masks may hold -inf.
        if buffer.is_floating_point() and not buffer.is_meta and not (buffer < torch.inf).all():
            raise SoloError(f"{path}: {name} is not finite (NaN or infinite), as config.json implies it")


@torch.no_grad()
def check_image_attention(model: PreTrainedModel) -> None:
    """Check that a SOLO model with bidirectional images lets patches see later ones, and text see no more.

    Raises:
        SoloError: The decoder takes no masks, none of its layers follows them, or text changes by them.
    """
    if model.config.image_attention != "bidirectional":
        return
    family, (patch, start, _, end) = model.config.text_config.model_type, model.config.vision_token_ids
    ids = torch.tensor([[start, patch, patch, end]], device=model.device)
    images = torch.zeros(2, 2, model.config.patch_dim, dtype=torch.uint8, device=model.device)
    images[1, 1] = 255  # the second patch
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    try:
        one, other = (model.model(**inputs, pixel_values=image).last_hidden_state for image in images)
    except Exception as error:  # of any type, from the code of any family
        raise SoloError(
            f"image_attention=bidirectional: {family} takes no masks of images "
            f"({first_line(error)}): use causal"
        ) from error
    if one[0, 1].equal(other[0, 1]):
        raise SoloError(
            f"image_attention=bidirectional: no layer of {family} lets patches see later ones: use causal"
        )
    known = [token for token in range(_CHECKED_TOKENS) if token not in model.config.vision_token_ids]
    text = torch.tensor([known], device=model.device)
    decoder_inputs = {"inputs_embeds": model.model.embed_tokens(text), **model.model._token_inputs(text)}
    own = model.model.language_model(**decoder_inputs, use_cache=False).last_hidden_state.float()
    masked = model.model(input_ids=text, use_cache=False).last_hidden_state.float()
    if (masked - own).abs().max() > torch.finfo(model.dtype).eps ** 0.5 * own.abs().max():
        raise SoloError(
            f"image_attention=bidirectional: masks of images change the text outputs of {family}: use causal"
        )


def check_processor(config: PreTrainedConfig, processor: Any) -> None:
    """Check that a SOLO model and its processor agree about patches, their tokens and their normalization.

    Raises:
        SoloError: A setting differs.
    """
    names = ("image_token", "vision_start_token", "vision_row_token", "vision_end_token")
    tokens = [getattr(processor, name) for name in names]
    images = processor.image_processor
    for what, own, others in (
        ("vision_token_ids", config.vision_token_ids, processor.tokenizer.convert_tokens_to_ids(tokens)),
        ("vision_patch_size", [config.vision_patch_size], [images.patch_size]),
        ("image_mean", config.image_mean, images.image_mean),
        ("image_std", config.image_std, images.image_std),
    ):
        if list(own) != list(others):
            raise SoloError(f"{what}: {list(own)} in config.json, {list(others)} in the processor's files")


def check_generation(path: str | Path, settings: GenerationConfig, vocabulary: int) -> None:
    """Check the generation settings of a SOLO model.

    Args:
        path: Folder or hub ID, for messages.
        settings: Loaded settings.
        vocabulary: Number of token IDs.

    Raises:
        SoloError: A value is impossible, or a setting is not one of greedy decoding and sampling.
    """
    for key, value in settings.to_dict().items():
        if value is None or _WITHOUT_EFFECT.fullmatch(key):
            continue
        if _TOKEN_IDS.fullmatch(key):
            _check_token_ids(f"{path}: {key}", value, vocabulary)
        elif key in _GENERATION_RANGES:
            low, high = _GENERATION_RANGES[key]
            kinds = (type(low),) if isinstance(low, bool) else (int, float)
            if type(value) not in kinds or not low <= value <= high:
                raise SoloError(f"{path}: {key} = {value} of {_GENERATION} is not from {low} to {high}")
        elif value is not False and (key not in _ONES or value != 1):
            raise SoloError(
                f"{path}: {key} = {value} of {_GENERATION} is neither of greedy decoding nor of sampling: "
                "remove it"
            )


def _check_token_ids(name: str, value: Any, vocabulary: int | None = None) -> None:
    for one in value if isinstance(value, list) else [] if value is None else [value]:
        if type(one) is not int:
            raise SoloError(f"{name} = {one} is no token ID or list of them")
        if vocabulary is not None and not 0 <= one < vocabulary:
            raise SoloError(f"{name} = {one} is not in the vocabulary of {vocabulary:,} tokens")


def _is_finite(parameter: nn.Parameter) -> bool:
    if parameter.is_meta or not parameter.numel() or parameter.dtype not in _CHECKED_DTYPES:
        return True
    low, high = torch.aminmax(parameter.detach())  # without a mask as large as the parameter
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _check_index(index: Path) -> None:
    names = _read_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise SoloError(f"{index} has no weight_map of file names")
    for key, name in names.items():
        if Path(name).name != name:
            raise SoloError(f"{index} lists {name!r}, which is not a file of the model's folder")
        if not (index.parent / name).is_file():
            raise SoloError(f"{index.parent / name} is missing: the index lists {key} in it")


def _check_numbers(config: Path) -> None:
    for key, value in _numbers(_read_object(config)):
        if _NO_SIZE.fullmatch(key):
            continue
        limit = _MAX_SIDE if key in _SIDES else _MAX_COUNT if _COUNT.fullmatch(key) else _MAX_NUMBER
        if abs(value) > limit:
            raise SoloError(f"{config}: {key} = {value:,} is absurd: at most {limit:,} is accepted")
        if key == "max_position_embeddings" and value < 1:
            raise SoloError(f"{config}: {key} = {value} is not positive")


def _numbers(settings: Any) -> Iterator[tuple[str, int]]:
    """Yield every (key, integer) of nested settings."""
    waiting = [settings]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield from ((key, value) for key, value in one.items() if type(value) is int)
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=_parse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise SoloError(f"{file} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise SoloError(f"{file} holds no JSON object")
    return content


def _parse_constant(name: str) -> float:
    if name == "NaN":  # a model would compute NaN and answer with it; some limits are infinite
        raise ValueError("a number is NaN")
    return float(name)


def _stored_tensors(file: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield name, dtype and shape of each tensor of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if length > min(_MAX_HEADER_BYTES, file.stat().st_size - 8):
        raise SoloError(f"{file} is truncated, or no safetensors file: its header claims {length:,} bytes")
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it cannot be iterated
                tensor = tensors.get_slice(name)
                yield name, tensor.get_dtype(), tuple(tensor.get_shape())
    except (SafetensorError, OSError, ValueError) as error:
        raise SoloError(f"{file} is damaged: {first_line(error)}") from error
