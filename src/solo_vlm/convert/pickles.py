"""PyTorch's pickled checkpoints, read without running anything that they hold, and without their tensors.

`torch.load` on the "meta" device restores the structure alone and notes where in the file each tensor is.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from solo_vlm.convert.tensors import StoredTensor
from solo_vlm.utils.errors import SoloError

# A Megatron checkpoint keeps its arguments (with members of Megatron's enumerations) and the states of
# random generators (numpy arrays) beside the weights. Only the arguments are of use.
_INERT_PACKAGES = ("megatron.", "numpy.")


def open_state_dict(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a `.bin` file by name.

    Raises:
        SoloError: the file holds code, is truncated, or is something else.
    """
    content = open_pickle(file)
    if not isinstance(content, Mapping):
        raise SoloError(f"{file} holds no tensors by name")
    return {key: stored(file, key, value) for key, value in content.items() if isinstance(value, Tensor)}


def open_pickle(file: Path, of_megatron: bool = False) -> Any:
    """The content of a pickled checkpoint, its tensors on the "meta" device; see `stored` to read them.

    Args:
        file: written by `torch.save`.
        of_megatron: read an `argparse.Namespace` too, and let Megatron's and numpy's own objects become
            stand-ins that hold what they were made of and can do nothing.

    Raises:
        SoloError: the file holds code, is truncated, or is something else. Nothing in it was run.
    """
    try:
        allowed: list[Any] = [Namespace, *_stand_ins(file)] if of_megatron else []
        with torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location="meta", weights_only=True)
    except UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f"code ({code[1]})" if code else "something else than tensors"
        raise SoloError(
            f"{file} holds {found}: refused, and nothing in it was run; get the weights as safetensors"
        ) from error
    except Exception as error:  # torch raises whatever a broken file leads to
        raise SoloError(f"{file} cannot be read: truncated, or no checkpoint of PyTorch") from error


def stored(file: Path, key: str, tensor: Tensor) -> StoredTensor:
    """Where in `file` a tensor from `open_pickle` lies.

    Raises:
        SoloError: the file is of PyTorch's format before 1.6, which does not tell.
    """
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise SoloError(f"{file} is in PyTorch's format of before 2020: load it and save it again")
    offset = start + tensor.storage_offset() * tensor.dtype.itemsize
    return StoredTensor(file, key, tensor.dtype, tuple(tensor.shape), offset, tuple(tensor.stride()))


class _Inert:
    """Stands for an object of a package that need not be here."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _stand_ins(file: Path) -> list[tuple[Any, str]]:
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    return [(_Inert, name) for name in names if name.startswith(_INERT_PACKAGES)]
