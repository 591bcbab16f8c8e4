"""Folder of images, whose captions are in .txt files beside them, or else the names of their folders."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from solo_vlm.data.formats.rows import RawRow
from solo_vlm.data.sample import SampleError
from solo_vlm.data.sources.files import (
    DataFile,
    Limits,
    RawSource,
    file_system,
    is_directory,
    read_each,
    read_url,
    stated_content,
)
from solo_vlm.data.sources.foreign import check_split_names
from solo_vlm.data.sources.retries import retried
from solo_vlm.utils.errors import SoloError

_IMAGES_PER_SHARD = 256
_METADATA = re.compile(r"(^|/)metadata\.(jsonl|csv|parquet)$")  # captions as `datasets` reads them


class ImageFolderSource(RawSource):
    """Images at any depth below a folder; a shard is a range of them, in the order of their paths.

    A row has `image`, its path; `label`, the name of its folder unless that is the source's own; and `text`,
    the caption in the .txt file of the same name, or else the label with spaces for underscores.

    Args:
        name: Name of the source.
        folder: Path or URL of the folder.
        limits: Limits for reading the images.

    Raises:
        SoloError: A folder below is a link or has a file of captions, and its images or captions would be
            missed; or the folders below are splits.
    """

    own_format = "captions"

    def __init__(self, name: str, folder: str, limits: Limits) -> None:
        self.name = name
        self._folder = DataFile(folder, 0, folder, limits, images=folder)
        found = _list(folder)
        sizes = {path: entry["size"] for path, entry in found.items()}
        if captions_file := next(filter(_METADATA.search, sizes), None):
            raise SoloError(
                f"{name}: captions in {captions_file} would be missed: set path to "
                f"{name.rstrip('/')}/**/{captions_file.rpartition('/')[2]} and format to captions"
            )
        suffixes = _image_suffixes()
        check_split_names(name, sorted({path.partition("/")[0] for path in sizes if "/" in path}))
        self._names = sorted(path for path in sizes if path.lower().endswith(suffixes))
        stems = {path.rpartition(".")[0] for path in self._names}
        captions = [path for path in sizes if path.lower().endswith(".txt") and path[:-4] in stems]
        self._captions = {path[:-4]: (path, sizes[path]) for path in captions}
        self._fingerprint = _fingerprint(self._folder, self._names, captions, found)

    def __len__(self) -> int:
        return -(-len(self._names) // _IMAGES_PER_SHARD)

    def read(self, shard: int) -> Sequence[RawRow]:
        """Return the rows of a range of images; accessing one without a caption raises SampleError."""
        return _Rows(self._names_of(shard), self._folder, self._captions)

    def file(self, shard: int) -> DataFile:
        """Return the folder, which image paths refer to."""
        return self._folder

    def memory(self, shard: int) -> int:
        """Return the size of the names of a range of images."""
        return sum(map(len, self._names_of(shard)))

    def where(self, shard: int, row: int) -> str:
        """Name the image."""
        return f"{self._folder.url}/{self._names_of(shard)[row]}"

    def fingerprint(self) -> str:
        """Return a hash of the paths and sizes of images and captions, and one of contents.

        Of local images, which may be many, the contents are not read.
        """
        return self._fingerprint

    def _names_of(self, shard: int) -> list[str]:
        return self._names[shard * _IMAGES_PER_SHARD : (shard + 1) * _IMAGES_PER_SHARD]


class _Rows(Sequence[RawRow]):
    """Rows whose captions are read when they are accessed."""

    def __init__(self, names: list[str], folder: DataFile, captions: dict[str, tuple[str, int]]) -> None:
        self._names = names
        self._folder = folder
        self._captions = captions

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Any) -> Any:
        name = self._names[index]
        parent, _, file = name.rpartition("/")
        stem = name.rpartition(".")[0]
        row = {"image": name, "id": name}
        if parent:
            row["label"] = parent.rpartition("/")[2]
            row["text"] = row["label"].replace("_", " ")
        if stem in self._captions:
            path, size = self._captions[stem]
            self._folder.limits.check_row(size)
            row["text"] = _caption(f"{self._folder.url}/{path}")
        if "text" not in row:
            raise SampleError("no-caption", f"no {file.rpartition('.')[0]}.txt beside {name}, and no folder")
        return row


@retried
def _list(folder: str) -> dict[str, dict[str, Any]]:
    """Return the entry of every file below a folder by its relative path, without hidden ones."""
    system, root = file_system(folder)
    found = system.find(root, detail=True)
    if link := next((path for path, entry in found.items() if is_directory(system, entry)), None):
        raise SoloError(
            f"{link} is a link to a folder, whose images would be missed: make it a separate source, or move "
            "it away"
        )
    below = {path[len(root) :].lstrip("/"): entry for path, entry in found.items()}
    return {
        path: entry
        for path, entry in below.items()
        if not any(part.startswith(".") for part in path.split("/"))
    }


def _fingerprint(
    folder: DataFile, images: list[str], captions: list[str], found: dict[str, dict[str, Any]]
) -> str:
    paths = sorted([*images, *captions])
    names = hashlib.sha256("".join(f"{path} {found[path]['size']}\n" for path in paths).encode())
    stated = {path: stated_content(found[path]) for path in paths}
    unread = [path for path in captions if not stated[path]]
    texts = read_each(retried(read_url), [f"{folder.url}/{path}" for path in unread])
    stated |= {path: hashlib.sha256(text).hexdigest() for path, text in zip(unread, texts, strict=True)}
    contents = hashlib.sha256("".join(f"{stated[path]}\n" for path in paths).encode())
    return f"{names.hexdigest()[:16]}-{contents.hexdigest()[:16]}"


@retried
def _caption(url: str) -> str:
    try:
        return read_url(url).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise SampleError("no-caption", f"{url} is not UTF-8: {error}") from error


def _image_suffixes() -> tuple[str, ...]:
    from solo_vlm.models.solo.image_loading_solo import image_suffixes

    return tuple(image_suffixes())
