"""Checkpoint files, read and written one tensor at a time: safetensors and PyTorch pickles.

A 14 GB checkpoint must convert in far less memory. The safetensors package maps whole files into memory or
takes all tensors at once, so its format is read and written here: 8 bytes with the length of a JSON header
(little endian), the header with dtype, shape and byte range of each tensor, then the tensors.

Pickles are read without executing anything in them: `torch.load` on the "meta" device restores only their
structure and records the location of each tensor in the file.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
_CANDIDATES = ("model.safetensors", "pytorch_model.bin")
# A Megatron checkpoint stores its arguments (with members of Megatron's enums) and RNG states (numpy arrays)
# next to the weights. Only the arguments are needed.
_INERT_PACKAGES = ("megatron.", "numpy.")


@dataclass(frozen=True)
class StoredTensor:
    """Location of a tensor in a file.

    Attributes:
        key: Name of the tensor in the file.
        offset: Bytes from the start of the file to the first element.
        strides: Strides in elements.
    """

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last."""
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Read the tensor; not memory-mapped, because mapped pages count as the process's memory.

        Raises:
            SoloError: The file ends before the tensor does.
        """
        if not self.span:
            return torch.empty(self.shape, dtype=self.dtype)
        data = np.fromfile(self.file, np.uint8, self.span, offset=self.offset)
        if len(data) < self.span:
            raise SoloError(f"{self.file} is truncated: it ends inside {self.key}; fetch it again")
        return torch.from_numpy(data).view(self.dtype).as_strided(self.shape, self.strides)


@dataclass(frozen=True)
class PlannedTensor:
    """Tensor to write: name, dtype and shape are known, `read` returns the values on demand."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def open_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a folder by name: safetensors or `.bin`, one file or shards with an index.

    safetensors take precedence.

    Raises:
        SoloError: A file or key is missing, truncated or unsafe; the message names it.
    """
    for name in _CANDIDATES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _open_shards(folder, read_json(index))
        if (folder / name).is_file():
            return _open_file(folder / name)
    raise SoloError(f"{folder} has no weights: expected {' or '.join(_CANDIDATES)}, or shards with an index")


def open_safetensors(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        SoloError: The file is truncated or not a safetensors file; the message names the first affected key.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise SoloError(f"{file} is not a safetensors file, or is truncated inside its header")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise SoloError(f"{file} is not a safetensors file: its header is not JSON") from error
    try:
        return _locate_tensors(file, header, 8 + length, size)
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise SoloError(f"{file} is corrupt: its header is malformed ({error})") from error


def _locate_tensors(file: Path, header: Any, begin: int, size: int) -> dict[str, StoredTensor]:
    """Return the tensors that a header lists; `begin` is the position behind it, `size` the file's size."""
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in _DTYPES:
            raise SoloError(f"{file}: {key} has the dtype {entry['dtype']}, expected {', '.join(_DTYPES)}")
        shape = tuple(entry["shape"])
        strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        start, end = (begin + offset for offset in entry["data_offsets"])
        if start < begin or not all(isinstance(axis, int) and axis >= 0 for axis in shape):
            raise ValueError(f"{key} has the offset {start - begin} and the shape {list(shape)}")
        tensor = StoredTensor(file, key, _DTYPES[entry["dtype"]], shape, start, strides)
        if end - start != tensor.span:
            raise SoloError(f"{file} is corrupt: {key} of shape {list(shape)} has {end - start} bytes")
        if end > size:
            raise SoloError(f"{file} is truncated: {key} is incomplete; fetch it again")
        tensors[key] = tensor
    return tensors


def open_pickle(file: Path, of_megatron: bool = False) -> Any:
    """Return the content of a pickled checkpoint with its tensors on the "meta" device.

    `locate` returns the location of such a tensor's values.

    Args:
        file: File written by `torch.save`.
        of_megatron: Also accept `argparse.Namespace`, and replace Megatron's and numpy's objects by inert
            placeholders.

    Raises:
        SoloError: The file contains code, is truncated, or is not a checkpoint. Nothing in it was executed.
    """
    try:
        allowed: list[Any] = []
        if of_megatron:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            inert = [(_Placeholder, name) for name in names if name.startswith(_INERT_PACKAGES)]
            allowed = [Namespace, *inert]
        with torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location="meta", weights_only=True)
    except UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f"code ({code[1]})" if code else "objects other than tensors"
        raise SoloError(
            f"{file} contains {found}: rejected, and nothing in it was run; get the weights as safetensors"
        ) from error
    except Exception as error:  # torch raises any type on a broken file
        raise SoloError(f"{file} cannot be read: truncated, or not a PyTorch checkpoint") from error


def locate(file: Path, key: str, tensor: Tensor) -> StoredTensor:
    """Return the location in `file` of a tensor from `open_pickle`.

    Raises:
        SoloError: The file has the format of PyTorch before 1.6, which does not record it.
    """
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise SoloError(f"{file} has the format of PyTorch before 1.6: load it and save it again")
    offset = start + tensor.storage_offset() * tensor.dtype.itemsize
    return StoredTensor(file, key, tensor.dtype, tuple(tensor.shape), offset, tuple(tensor.stride()))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SoloError: The file cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise SoloError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise SoloError(f"{file} is not a JSON object")
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write an indented JSON object."""
    file.write_text(json.dumps(content, indent=2) + "\n")


def write_checkpoint(
    folder: Path, tensors: Sequence[PlannedTensor], max_shard_bytes: int = _MAX_SHARD_BYTES
) -> None:
    """Write tensors as safetensors: one file, or shards with an index, named as transformers names them."""
    shards: list[list[PlannedTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(one.nbytes for one in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        _write_safetensors(folder / "model.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def _open_shards(folder: Path, index: dict[str, Any]) -> dict[str, StoredTensor]:
    weight_map: dict[str, str] = index.get("weight_map", {})
    shards: dict[str, dict[str, StoredTensor]] = {}
    tensors = {}
    for key, name in weight_map.items():
        if name not in shards:
            if not (folder / name).is_file():
                raise SoloError(f"{folder / name} is missing: the index lists {key} in it")
            shards[name] = _open_file(folder / name)
        if key not in shards[name]:
            raise SoloError(f"{folder / name} lacks {key}, which the index lists in it")
        tensors[key] = shards[name][key]
    return tensors


def _open_file(file: Path) -> dict[str, StoredTensor]:
    if file.suffix == ".safetensors":
        return open_safetensors(file)
    content = open_pickle(file)
    if not isinstance(content, Mapping):
        raise SoloError(f"{file} contains no tensors by name")
    return {key: locate(file, key, value) for key, value in content.items() if isinstance(value, Tensor)}


class _Placeholder:
    """Inert replacement for an object of a package that may not be installed."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _write_safetensors(file: Path, tensors: Sequence[PlannedTensor]) -> None:
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
    encoded += b" " * (-len(encoded) % 8)  # aligns the tensors to 8 bytes
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            values = tensor.read()
            if values.shape != tensor.shape or values.dtype != tensor.dtype:
                raise AssertionError(f"{tensor.name} became {values.dtype} {list(values.shape)}")
            if tensor.nbytes:
                stream.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
