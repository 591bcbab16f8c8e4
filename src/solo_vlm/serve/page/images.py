"""Images that visitors of the page have uploaded. They are held in memory alone; nothing is written."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from dataclasses import dataclass
from io import BytesIO
from threading import Lock

from solo_vlm.data.encode import encode
from solo_vlm.data.sample import Sample, SampleError
from solo_vlm.data.survey.view import seen_images
from solo_vlm.models.inspect_image import ImageLayout
from solo_vlm.models.solo.image_loading_solo import ImageError, load_image
from solo_vlm.models.solo.processing_solo import SoloProcessor
from solo_vlm.utils.errors import SoloError


@dataclass(frozen=True)
class HeldImage:
    """An uploaded image.

    Attributes:
        data: the file as it came.
        seen: PNG of the pixels that the model gets.
        layout: its sizes and tokens.
    """

    data: bytes
    seen: bytes
    layout: ImageLayout

    @property
    def bytes(self) -> int:
        return len(self.data) + len(self.seen)


class ImageStore:
    """Images by a name that cannot be guessed. Several threads may use it.

    Args:
        max_bytes: of all images; beyond it those that were not used for longest go.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._images: OrderedDict[str, HeldImage] = OrderedDict()
        self._lock = Lock()

    def add(self, image: HeldImage) -> str:
        """Hold an image; returns its name."""
        name = secrets.token_urlsafe(16)
        with self._lock:
            self._images[name] = image
            while len(self._images) > 1 and self.bytes > self.max_bytes:
                self._images.popitem(last=False)
        return name

    def get(self, name: str) -> HeldImage:
        """An image by its name.

        Raises:
            SoloError: it is not, or no longer, held.
        """
        with self._lock:
            if name not in self._images:
                raise SoloError("an image of this chat is no longer held: add it again in a new chat")
            self._images.move_to_end(name)
            return self._images[name]

    def remove(self, name: str) -> None:
        """Forget an image; one that is not held is no error."""
        with self._lock:
            self._images.pop(name, None)

    @property
    def bytes(self) -> int:
        return sum(image.bytes for image in self._images.values())


def read_upload(data: bytes, processor: SoloProcessor, max_pixels: int) -> HeldImage:
    """Check an uploaded file and see it as the model does.

    Raises:
        SoloError: it is no image that can be used, or too large.
    """
    try:
        image = load_image(data, max_pixels=max_pixels, name="this file")
        turn = {"role": "user", "content": [{"type": "image"}]}
        document = encode(Sample([turn], [data]), processor)
    except (ImageError, SampleError) as error:
        raise SoloError(str(error)) from error
    ((seen, rows, columns),) = seen_images(document)
    file = BytesIO()
    seen.save(file, format="PNG", compress_level=1)
    return HeldImage(data, file.getvalue(), ImageLayout(image.size, seen.size, rows, columns))
