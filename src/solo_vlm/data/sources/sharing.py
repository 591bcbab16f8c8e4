"""Opened sources for other processes, which then need neither list files nor read footers and contents."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from solo_vlm.data.sources import Source
from solo_vlm.data.sources.files import DataFile, hash_content
from solo_vlm.utils.errors import SoloError


def pack_sources(sources: Sequence[Source], root: str) -> bytes:
    """Return opened sources as bytes, with files relative to a root and hashes of local ones."""
    packed = BytesIO()
    _Pickler(packed, root).dump(list(sources))
    return packed.getvalue()


def unpack_sources(packed: bytes, root: str, part: int = 0, parts: int = 1) -> list[Source]:
    """Return the sources of `pack_sources`, with files below this process's own root.

    Args:
        packed: Result of `pack_sources`.
        root: Folder that has the files here.
        part: Part of the files whose contents are compared; all processes together compare all.
        parts: Number of parts.

    Raises:
        SoloError: A file is missing here, or is another one.
    """
    sources: list[Source] = _Unpickler(BytesIO(packed), root, part, parts).load()
    return sources


class _Pickler(pickle.Pickler):
    def __init__(self, packed: BytesIO, root: str) -> None:
        super().__init__(packed, protocol=pickle.HIGHEST_PROTOCOL)
        self._root = f"{os.path.abspath(root)}/"  # noqa: PTH100 - as fsspec writes paths, with links

    def persistent_id(self, file: Any) -> dict[str, Any] | None:
        """Return the facts of a file."""
        if not isinstance(file, DataFile):
            return None
        facts = {each.name: getattr(file, each.name) for each in fields(file)}
        if file.modified is not None:
            facts["content"] = file.content or hash_content(file)
        for place in ("url", "root", "images"):
            if f"{facts[place]}/".startswith(self._root):
                facts[place] = (facts[place][len(self._root) :],)
        return facts


class _Unpickler(pickle.Unpickler):
    def __init__(self, packed: BytesIO, root: str, part: int, parts: int) -> None:
        super().__init__(packed)
        self._root = os.path.abspath(root)  # noqa: PTH100
        self._part, self._parts = part, parts
        self._files = 0

    def persistent_load(self, facts: dict[str, Any]) -> DataFile:
        """Find a file here."""
        for place in ("url", "root", "images"):
            if isinstance(facts[place], tuple):
                facts[place] = f"{self._root}/{facts[place][0]}".rstrip("/")
        file = DataFile(**facts)
        if file.modified is None:
            return file
        try:
            state = Path(file.url).stat()
        except FileNotFoundError as error:
            raise _differs(file) from error
        file = replace(file, modified=state.st_mtime_ns)
        self._files += 1
        compared = self._files % self._parts == self._part
        if state.st_size != file.size or (
            compared and hash_content(replace(file, content="")) != file.content
        ):
            raise _differs(file)
        return file


def _differs(file: DataFile) -> SoloError:
    return SoloError(
        f"{file.url} is missing or another file than for process 0: make the files of all machines identical"
    )
