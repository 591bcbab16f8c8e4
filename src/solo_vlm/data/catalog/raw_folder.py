"""The folder of a raw data set: where rows find the images that they name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solo_vlm.data.sample import SampleError
from solo_vlm.data.values import data_url, image_source, is_base64_image, local_path

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
            value: bytes, a struct with `bytes` and `path`, a path below the folder, base64, or an http(s),
                data or file URL. The bytes of a file are taken in as they are; other URLs stay.

        Raises:
            SampleError: there is no image ("image-missing"), or its path leaves the folder ("image-path").
        """
        try:
            source = image_source(value)
        except ValueError as error:
            raise SampleError("image-path", str(error)) from error
        if source is None:
            raise SampleError("image-missing", "the row has no image")
        if isinstance(source, bytes):
            return {"bytes": source, "path": None}
        if source.startswith(("http://", "https://", "data:")):
            return {"bytes": None, "path": source}
        if is_base64_image(source):
            return {"bytes": None, "path": data_url(source)}
        value = local_path(source)
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
