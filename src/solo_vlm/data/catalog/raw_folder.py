"""The folder of a raw data set: where rows find the images that they name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solo_vlm.data.schema import SampleError

StoredImage = dict[str, Any]

# Archives of images are often unpacked into a folder of this name, which the rows do not mention.
_IMAGE_FOLDERS = ("", "images")
_LONGEST_NAME = 255


@dataclass(frozen=True)
class RawFolder:
    """The folder that was given as raw data, or the one that holds the raw file."""

    root: Path

    def image(self, value: Any) -> StoredImage:
        """Bring an image of a raw row into the form of a sample file.

        Args:
            value: bytes, a struct with `bytes` and `path`, a path below the folder, or an http(s) or data
                URL. The bytes of a file are taken in as they are; a URL stays one.

        Raises:
            SampleError: there is no image ("image-missing"), or its path leaves the folder ("image-path").
        """
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not value:
            raise SampleError("image-missing", "the row has no image")
        if isinstance(value, bytes):
            return {"bytes": value, "path": None}
        if not isinstance(value, str):
            raise SampleError("image-path", f"expected bytes or a path, found {type(value).__name__}")
        if value.startswith(("http://", "https://", "data:")):
            return {"bytes": None, "path": value}
        if max(map(len, value.split("/"))) > _LONGEST_NAME:
            raise SampleError("image-path", f"{value[:80]}... is no name of a file")
        return {"bytes": self._read(value), "path": None}

    def _read(self, name: str) -> bytes:
        # An absolute path is one of the machine where the data were made: only its last part means anything.
        relative = Path(name).name if Path(name).is_absolute() else name
        for folder in _IMAGE_FOLDERS:
            base = self.root.absolute() / folder
            path = Path(os.path.normpath(base / relative))
            if not path.is_relative_to(base):
                raise SampleError("image-path", f"{name} lies outside of {self.root}")
            if path.is_file():
                return path.read_bytes() or self._refuse(name)
        return self._refuse(name)

    def _refuse(self, name: str) -> bytes:
        raise SampleError("image-missing", f"{name} is empty or not in {self.root}")
