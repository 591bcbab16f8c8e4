"""Folders of other programs: splits, files that are no data, and formats that are not read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from typing import Any

from solo_vlm.data.sources.files import DataFile, file_system, read_url
from solo_vlm.data.sources.retries import retried_at_start
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.settings import parse_yaml

_WRITE_ROWS = "write its rows as parquet or JSON lines"
_UNPACK = "unpack it, or write tars"
_FOREIGN = {
    "*.mds*": ("a shard of MosaicML Streaming (MDS)", _WRITE_ROWS),
    "chunk-*.bin*": ("a chunk of litdata", _WRITE_ROWS),
    "*.lance": ("data of Lance", _WRITE_ROWS),
    "_versions": ("data of Lance", _WRITE_ROWS),
    "*.tfrecord*": ("a TFRecord", _WRITE_ROWS),
    "*.beton": ("data of FFCV", _WRITE_ROWS),
    **dict.fromkeys(("*.h5", "*.hdf5"), ("an HDF5 file", _WRITE_ROWS)),
    **dict.fromkeys(("*.npy", "*.npz"), ("an array of NumPy", _WRITE_ROWS)),
    **dict.fromkeys(("*.pt", "*.pth", "*.pkl", "*.pickle"), ("a pickle", _WRITE_ROWS)),
    **dict.fromkeys(("*.xlsx", "*.xls"), ("a spreadsheet", "save it as CSV")),
    **dict.fromkeys(("*.zip", "*.7z", "*.rar"), ("an archive", _UNPACK)),
    **dict.fromkeys(("*.tgz", "*.tar.*"), ("a compressed tar", "decompress it: rows are read by position")),
    "*.txt": ("a text", 'write rows {"text": ...} as JSON lines'),
}
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "testmini", "eval", "evaluation"),
}
_SPLIT = re.compile(rf"(?i)(?:^|[-_. ])({'|'.join(sum(_SPLITS.values(), ()))})(?=[-_. ]|$)")
_SHOWN = 8  # names listed in a message
_DICT, _STATE = "dataset_dict.json", "state.json"  # of `datasets`
_ENERGON = ".nv-meta/split.yaml"


def check_splits(path: str) -> None:
    """Reject a folder with several splits: training would also read those that are kept for evaluation.

    Raises:
        SoloError: It is a DatasetDict of `datasets`, or data of Megatron-Energon with several splits.
    """
    folder = path.rstrip("/")
    if (content := _read(folder, _DICT)) is not None:
        splits = json.loads(content)["splits"]
        raise SoloError(
            f"{path} is a DatasetDict with {', '.join(splits)}: set path to one, {folder}/{splits[0]}"
        )
    if (content := _read(folder, _ENERGON)) is not None:
        notes: Any = parse_yaml(content.decode(), f"{folder}/{_ENERGON}") or {}
        filled = [name for name, shards in (notes.get("split_parts") or {}).items() if shards]
        if len(filled) > 1 or notes.get("exclude"):
            apart = "excludes shards" if notes.get("exclude") else f"has the splits {', '.join(filled)}"
            raise SoloError(
                f"{folder}/{_ENERGON} {apart}: name the shards to read by a pattern, such as {folder}/*.tar"
            )


def check_split_names(path: str, names: Iterable[str]) -> None:
    """Reject names of several splits, such as train-0.parquet and test-0.parquet, in one folder.

    Raises:
        SoloError: There are files, or folders of images, of several splits.
    """
    found: dict[str, str] = {}
    for name in names:
        if match := _SPLIT.search(name):
            split = next(split for split, words in _SPLITS.items() if match[1].lower() in words)
            found.setdefault(split, name)
    if len(found) > 1:
        first, *others = found.values()
        raise SoloError(
            f"{path} has several splits, such as {first} and {', '.join(others)}: make each a source of its "
            "own, by a pattern or its folder"
        )


def saved_files(path: str, files: Sequence[DataFile]) -> list[DataFile]:
    """Return the .arrow files of a folder that are data: `datasets` writes caches of `map` beside them.

    Raises:
        SoloError: A file is missing, or rows are chosen by a file of indices, as `datasets` before 2.0 saved
            them.
    """
    state = json.loads(_read(path.rstrip("/"), _STATE) or "{}")
    if state.get("_indices_data_files"):
        raise SoloError(f"{path} has a file of indices: load it with datasets, and save it again")
    if "_data_files" not in state:
        return [file for file in files if not file.name.startswith("cache-")] or list(files)
    by_name = {file.name: file for file in files}
    names = [entry["filename"] for entry in state["_data_files"]]
    if missing := [name for name in names if name not in by_name]:
        raise SoloError(f"{path} has no {missing[0]}, which its {_STATE} names: put it back")
    return [by_name[name] for name in names]


def is_index_of_shards(path: str, files: Sequence[DataFile]) -> bool:
    """Return whether the only file is the index of shards in a format that is not read."""
    return [file.name for file in files] == ["index.json"] and _known(_names(path)) is not None


def explained(path: str) -> str:
    """Return the end of a message that says what a path has; empty if there is nothing."""
    names = _names(path)
    if (known := _known(names)) is not None:
        name, (what, advice) = known
        return f": {name} is {what}, which is not read: {advice} (docs/data.md, Splits and other formats)"
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f": it has {', '.join(names[:_SHOWN])}{more}" if names else ""


def _known(names: Sequence[str]) -> tuple[str, tuple[str, str]] | None:
    found = ((name, facts) for pattern, facts in _FOREIGN.items() for name in names if fnmatch(name, pattern))
    return next(found, None)


@retried_at_start
def _names(path: str) -> list[str]:
    """Return the names in a folder, without hidden ones, or that of a file."""
    system, place = file_system(path)
    try:
        names = [name.rstrip("/").rpartition("/")[2] for name in system.ls(place, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if name and not name.startswith("."))


@retried_at_start
def _read(folder: str, name: str) -> bytes | None:
    """Return a file of a folder; None if there is none, or on a web server, which has no folders."""
    system, place = file_system(f"{folder}/{name}")
    if folder.startswith(("http://", "https://")) or not system.isfile(place):
        return None
    return read_url(f"{folder}/{name}")
