"""Images of raw data, found in its folder and stored in sample files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from solo_vlm.data.formats.rows import SampleRow, image
from solo_vlm.data.sample import SampleError
from solo_vlm.data.values import data_url, is_base64_image, local_path
from solo_vlm.utils.errors import SoloError

StoredImage = dict[str, Any]

# Image archives are often unpacked into a folder `images` that the rows do not mention.
_IMAGE_FOLDERS = ("", "images")
_MAX_NAME_LENGTH = 255


@dataclass(frozen=True)
class RawFolder:
    """Folder of the raw data, or the one of the raw file: where rows find the images that they name."""

    root: Path

    def embed(self, row: SampleRow) -> SampleRow:
        """Return a sample row with its images in the form of a sample file.

        Raises:
            SampleError: As for `image`.
        """
        return row | {"images": [self.image(source) for source in row["images"]]}

    def class_names(self, file: str) -> Mapping[str, str]:
        """Read a file of lines of a class ID and its comma-separated names, of which the first is used.

        Raises:
            SoloError: The file is missing.
        """
        return _class_names(self.root / file)

    def image(self, value: Any) -> StoredImage:
        """Convert an image of a raw row to the form of a sample file.

        Args:
            value: Bytes, a struct with `bytes` and `path`, a path below the folder, base64, or an http(s),
                data or file URL. The bytes of a file are stored unchanged; other URLs are kept as URLs.

        Returns:
            A dictionary of `bytes` and `path`, one of which is None.

        Raises:
            SampleError: There is no image ("image-missing"), or its path leaves the folder ("image-path").
        """
        source = image(value)
        if isinstance(source, bytes):
            return {"bytes": source, "path": None}
        if source.startswith(("http://", "https://", "data:")):
            return {"bytes": None, "path": source}
        if is_base64_image(source):
            return {"bytes": None, "path": data_url(source)}
        value = local_path(source)
        if max(map(len, value.split("/"))) > _MAX_NAME_LENGTH:
            raise SampleError("image-path", f"{value[:80]}... is not a file name")
        return {"bytes": self._read(value), "path": None}

    def _read(self, name: str) -> bytes:
        # An absolute path is that of the machine that made the data: only its last part is useful.
        relative = Path(name).name if Path(name).is_absolute() else name
        for folder in _IMAGE_FOLDERS:
            base = self.root.absolute() / folder
            path = Path(os.path.normpath(base / relative))
            if not path.is_relative_to(base):
                raise SampleError("image-path", f"{name} is outside {self.root}")
            if path.is_file():
                return path.read_bytes() or self._raise_missing(name)
        return self._raise_missing(name)

    def _raise_missing(self, name: str) -> bytes:
        raise SampleError("image-missing", f"{name} is empty or not in {self.root}")


@lru_cache(maxsize=1)
def _class_names(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise SoloError(
            f"{path} is missing: write lines of a WordNet ID and a name, such as 'n01440764 tench'"
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if len(line.split(maxsplit=1)) == 2]
    return {id: name.split(",")[0].replace("_", " ").replace("-", " ") for id, name in pairs}
