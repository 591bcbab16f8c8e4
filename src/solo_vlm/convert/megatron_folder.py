"""A checkpoint of Megatron-LLM on disk: a grid of pickles, one a pipeline stage and tensor-parallel rank."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from solo_vlm.convert.pickles import open_pickle, stored
from solo_vlm.convert.tensors import StoredTensor
from solo_vlm.utils.errors import SoloError

_RANK_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?")
# The second is written beside a distributed optimizer, whose own state is in other folders.
_RANK_FILES = ("model_optim_rng.pt", "model_rng.pt")
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class MegatronCheckpoint:
    """What the pickles hold.

    Attributes:
        folder: of the iteration.
        arguments: that the model was trained with.
        stages: for each pipeline stage, for each tensor-parallel rank: its tensors by Megatron's name.
            Layers are numbered through all stages.
    """

    folder: Path
    arguments: dict[str, Any]
    stages: list[list[dict[str, StoredTensor]]]

    def parts(self, name: str) -> list[StoredTensor]:
        """The parts of a tensor, a tensor-parallel rank each, from the first stage that has it.

        Raises:
            SoloError: no stage has it, or not all ranks of one do.
        """
        for ranks in self.stages:
            found = [tensors[name] for tensors in ranks if name in tensors]
            if len(found) == len(ranks):
                return found
            if found:
                raise SoloError(f"{self.folder}: {name} is in {len(found)} of {len(ranks)} parts only")
        raise SoloError(f"{self.folder} lacks {name}")


def open_megatron(source: Path, iteration: int | None = None) -> MegatronCheckpoint:
    """Open the pickles of one iteration, without running or reading more than their structure.

    Args:
        source: the folder with `latest_checkpointed_iteration.txt`, or that of one iteration.
        iteration: which. Default: the latest.

    Raises:
        SoloError: naming the file that is missing, truncated or unsafe.
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
    """[stage][rank]; complete, or an error that names the file that is missing."""
    grid: dict[tuple[int, int], Path] = {}
    for child in folder.iterdir():
        match = _RANK_FOLDER.fullmatch(child.name)
        files = [child / name for name in _RANK_FILES if (child / name).is_file()]
        if match and files:
            grid[int(match[2] or 0), int(match[1])] = files[0]
    if not grid:
        raise SoloError(f"{folder} is no checkpoint of Megatron: it has no mp_rank_*/{_RANK_FILES[0]}")
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
    raise SoloError(f"{file} does not hold the arguments (args) that the model was trained with")


def _tensors(content: Any, file: Path, first_layer: int) -> Iterator[tuple[str, StoredTensor]]:
    if "model0" in content:
        raise SoloError(f"{file} has an interleaved pipeline schedule, which cannot be converted")
    try:
        model = content["model"]["language_model"]
    except (KeyError, TypeError):
        raise SoloError(f"{file} has no language model (model.language_model)") from None
    for name, tensor in _flatten(model, ""):
        key = f"model.language_model.{name}"
        yield _uniform(name, first_layer), stored(file, key, tensor)


def _flatten(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")


def _uniform(name: str, first_layer: int) -> str:
    """One spelling for what was called differently before and after a first training step."""
    for old in ("encoder.", "transformer.", "embedding."):
        name = name.removeprefix(old)
    name = name.removesuffix(".weight").replace(".attention.", ".self_attention.")
    return _LAYER.sub(lambda match: f"layers.{int(match[1]) + first_layer}.", name, count=1)
