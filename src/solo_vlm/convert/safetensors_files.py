"""safetensors files, read and written tensor by tensor.

The format: 8 bytes with the length of a JSON header (little endian), the header with dtype, shape and byte
range of each tensor, then the tensors. The safetensors package maps a file into memory or takes all tensors
at once; a checkpoint of 14 GB must convert in less memory than that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from solo_vlm.convert.tensors import PlannedTensor, StoredTensor, contiguous_strides
from solo_vlm.utils.errors import SoloError

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_SHARD_BYTES = 5 * 10**9


def open_safetensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name.

    Raises:
        SoloError: it is no safetensors file, or shorter than its header says (naming the first key cut off).
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise SoloError(f"{file} is no safetensors file, or truncated inside its header")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise SoloError(f"{file} is no safetensors file: its header is not JSON") from error
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in _DTYPES:
            raise SoloError(f"{file}: {key} is of type {entry['dtype']}, which no release uses")
        shape = tuple(entry["shape"])
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        tensor = StoredTensor(file, key, _DTYPES[entry["dtype"]], shape, start, contiguous_strides(shape))
        if end - start != tensor.span:
            raise SoloError(f"{file}: {key} of shape {list(shape)} has {end - start} bytes: a broken file")
        if end > size:
            raise SoloError(f"{file} is truncated: {key} is not all there; fetch it again")
        tensors[key] = tensor
    return tensors


def write_checkpoint(
    folder: Path, tensors: Sequence[PlannedTensor], max_shard_bytes: int = _MAX_SHARD_BYTES
) -> None:
    """Write tensors under transformers' names: one file, or shards with an index."""
    shards = _shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        _write(folder / "model.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Sequence[PlannedTensor], max_bytes: int) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _write(file: Path, tensors: Sequence[PlannedTensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            _write_values(stream, tensor)


def _write_values(stream: BinaryIO, tensor: PlannedTensor) -> None:
    values = tensor.read()
    if values.shape != tensor.shape or values.dtype != tensor.dtype:
        raise AssertionError(f"{tensor.name} became {values.dtype} {list(values.shape)}")
    if tensor.nbytes:
        stream.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
