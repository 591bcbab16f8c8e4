"""SOLO's image processor: an image becomes rows of raw pixel patches.

No crop, and no fixed square unless asked for: the aspect ratio stays, both sides become multiples of the
patch size, and the patches of all images of a batch are concatenated, so nothing is ever padded.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

from .enlarge_solo import enlarge_to_patches
from .image_loading_solo import ChannelOrder, ImageError, load_image, load_pixels

try:
    import cv2
except ImportError:  # a checkpoint's copy of this file runs without it, see `resize`
    cv2 = None  # type: ignore[assignment]

ResizeRule = Literal["release", "figure2"]
_BILINEAR = (None, PILImageResampling.BILINEAR)


def patch_grid(
    height: int,
    width: int,
    patch_size: int = 32,
    longest_edge: int = 1024,
    rule: ResizeRule = "release",
) -> tuple[int, int]:
    """How many patches an image is resized to: (rows, columns).

    "release" is what SOLO-7B was trained with: the long side is rounded up to a multiple of `patch_size`, at
    most `longest_edge`; the short side follows in proportion and is rounded up too, so neither exceeds
    `longest_edge`. "figure2" is the code printed in the paper's Figure 2, which adds a patch where a side is
    already a multiple: there the short side can exceed `longest_edge` by one patch (1024 x 1024 pixels give
    33 rows of 32). Of a square, the height counts as the short side.

    The release gives a side of 0 beyond an aspect ratio of `longest_edge`:1; here one patch is the least.

    Args:
        height, width: the image's size in pixels.
        patch_size: side of a square patch in pixels.
        longest_edge: largest long side in pixels, a multiple of `patch_size`.
        rule: "release" or "figure2".

    Raises:
        ValueError: a size is not positive, `longest_edge` is no multiple of `patch_size`, unknown rule.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image has at least one pixel, not {height} x {width}")
    if patch_size < 1 or longest_edge < patch_size or longest_edge % patch_size:
        raise ValueError(
            f"the longest edge must be a multiple of the patch size, not {longest_edge} of {patch_size}"
        )
    if rule not in ("release", "figure2"):
        raise ValueError(f'the resize rule is "release" or "figure2", not {rule!r}')

    def to_patches(pixels: int) -> int:
        return pixels // patch_size + 1 if rule == "figure2" else -(-pixels // patch_size)

    short, long = sorted((height, width))
    long_patches = min(to_patches(long), longest_edge // patch_size)
    # The release's int(new_long * short / long), in integers.
    short_patches = max(1, to_patches(long_patches * patch_size * short // long))
    return (long_patches, short_patches) if height > width else (short_patches, long_patches)


def resize(
    pixels: np.ndarray, height: int, width: int, resample: int | None = PILImageResampling.BILINEAR
) -> np.ndarray:
    """Resize as Pillow does, several times faster where bilinear.

    OpenCV enlarges bilinearly. Where a side shrinks it would leave pixels out, so torch does that, with
    antialias; and both where OpenCV is not installed. Their rounding differs from Pillow's by one level of
    255 in places (torch: in few places, but by two where a few pixels become many). Other filters are
    Pillow's own.

    Args:
        pixels: uint8 (rows, columns, 3).
        height, width: the new size in pixels.
        resample: Pillow's filter; None: bilinear.

    Returns:
        uint8 (height, width, 3).
    """
    old_height, old_width = pixels.shape[:2]
    if (old_height, old_width) == (height, width):
        return pixels
    if resample not in _BILINEAR:
        return np.asarray(Image.fromarray(pixels).resize((width, height), resample))
    if cv2 is not None and old_height <= height and old_width <= width:
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    # By its strides this batch of one is "channels last", for which torch has its fastest kernel.
    batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # (1, 3, rows, columns)
    batch = F.interpolate(batch, (height, width), mode="bilinear", antialias=True)
    return batch[0].permute(1, 2, 0).numpy()


def image_to_patches(image: Image.Image | np.ndarray, patch_size: int) -> np.ndarray:
    """Cut an RGB image, both sides multiples of `patch_size`, into patches.

    Args:
        image: `PIL.Image`, or uint8 (height, width, 3).
        patch_size: side of a patch in pixels.

    Returns:
        uint8 (rows * columns, 3 * patch_size * patch_size): patches in raster order, each flattened channel
        first (all red values, row by row, then green, then blue).
    """
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    # What lies between has no name, so that its memory is used again while the cache still holds it.
    planes = _planes(_by_patch(pixels, rows, columns, patch_size))
    return planes.reshape(3, rows * columns, -1).swapaxes(0, 1).reshape(rows * columns, -1)


def _by_patch(pixels: np.ndarray, rows: int, columns: int, patch_size: int) -> np.ndarray:
    """The pixels of (height, width, 3) patch after patch: (pixels, 3)."""
    line = np.dtype((np.void, 3 * patch_size))  # gathered a line of a patch at a time
    patches = np.empty((rows, columns, patch_size), line)
    patches[:] = pixels.reshape(rows, patch_size, -1).view(line).swapaxes(1, 2)
    return patches.view(np.uint8).reshape(-1, 3)


def _planes(pixels: np.ndarray) -> np.ndarray:
    """(3, pixels) of (pixels, 3)."""
    if cv2 is None:
        return pixels.T
    # The odd length sets the planes apart: OpenCV writes planes that lie alike past the processor's cache.
    planes = np.empty((3, len(pixels) | 1), np.uint8)[:, : len(pixels)]
    cv2.split(pixels[None], list(planes[:, None]))
    return planes


def _cut(
    pixels: np.ndarray,
    rows: int,
    columns: int,
    patch_size: int,
    resample: int | None,
    max_aspect_ratio: int | None,
) -> np.ndarray:
    """(rows * columns, 3 * patch_size**2) patches of an image of any size."""
    short, long = sorted(pixels.shape[:2])
    if max_aspect_ratio is not None and long > max_aspect_ratio * short:
        raise ImageError(f"an image of {long} x {short} pixels is more of a line than a picture")
    size = rows * patch_size, columns * patch_size
    if resample in _BILINEAR and pixels.shape[:2] != size:
        patches = enlarge_to_patches(pixels, rows, columns, patch_size)
        if patches is not None:
            return patches
    return image_to_patches(resize(pixels, *size, resample), patch_size)


class SoloImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """What `SoloImageProcessor` takes beside the usual arguments of image processors.

    patch_size (`int`, *optional*, defaults to 32):
        Side of a square patch in pixels.
    resize_rule (`str`, *optional*, defaults to `"release"`):
        How the size in patches is found, `"release"` or `"figure2"`, see `patch_grid`.
    max_aspect_ratio (`int`, *optional*):
        Refuse images with a side longer than this many times the other. By default a strip of pixels is
        stretched to one patch.
    """

    patch_size: int
    resize_rule: ResizeRule
    max_aspect_ratio: int | None


class SoloImageProcessor(PilBackend):
    """Turns images into the raw pixel patches that SOLO reads.

    Patches are uint8 unless asked otherwise: a quarter of float32's memory, and the model normalises them on
    its own device. `do_rescale=True, do_normalize=True` gives them in float32, normalised with ImageNet's
    mean and standard deviation, as the release does.

    Args (all can also be given in a call):
        patch_size: side of a square patch in pixels.
        size: `{"longest_edge": pixels}`, a multiple of `patch_size`: native resolution, the paper's way; or
            `{"height": pixels, "width": pixels}`, to which every image is stretched, as encoders do it.
        resize_rule: "release" or "figure2", see `patch_grid`.
        max_aspect_ratio: of images that are not refused; None: whatever their shape.
        do_resize: if False, both sides of every image must be multiples of `patch_size` already.
        resample: Pillow's filter. The release was trained with bilinear, which antialiases when it shrinks;
            see `resize` for who computes it.
        do_rescale, rescale_factor, do_normalize, image_mean, image_std: as everywhere in transformers.

    Images always become RGB (`load_image` says how), whatever `do_convert_rgb` says.
    """

    patch_size = 32
    resize_rule: ResizeRule = "release"
    max_aspect_ratio: int | None = None
    size = {"longest_edge": 1024}
    default_to_square = False
    do_convert_rgb = True
    do_resize = True
    resample = PILImageResampling.BILINEAR
    do_rescale = False
    do_normalize = False
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    valid_kwargs = SoloImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]

    def __init__(self, **kwargs: Unpack[SoloImageProcessorKwargs]):
        super().__init__(**kwargs)
        self.get_patch_grid(self.patch_size, self.patch_size)  # a setting that makes no sense fails here

    def preprocess(self, images: ImageInput, **kwargs: Unpack[SoloImageProcessorKwargs]) -> BatchFeature:
        """Turn images into patches.

        Args:
            images: one image or a list (of lists) of images, each anything that `load_image` reads. An array
                of four dimensions is a batch.
            kwargs: override the processor's settings for this call. `input_data_format`
                ("channels_first" or "channels_last") settles the axis order of arrays.

        Returns:
            `pixel_values`: (patches, 3 * patch_size**2), uint8, or float32 if rescaled or normalised; the
            patches of all images one after the other. `image_grid_thw`: int64 (images, 3), each
            (1, rows, columns).

        Raises:
            ImageError: an image cannot be read or used (a `ValueError`).
            ValueError: a setting makes no sense.
        """
        return super().preprocess(images, **kwargs)

    def encode(self, image: Any, max_aspect_ratio: int | None = None) -> tuple[np.ndarray, tuple[int, int]]:
        """One image by the processor's own settings: `preprocess` without its checks, which take time.

        Args:
            image: anything that `load_image` reads.
            max_aspect_ratio: see the class.

        Returns:
            uint8 (rows * columns, 3 * patch_size**2), and (rows, columns).

        Raises:
            ImageError: the image cannot be read or used.
        """
        pixels = load_pixels(image)
        rows, columns = self.get_patch_grid(*pixels.shape[:2])
        return _cut(pixels, rows, columns, self.patch_size, self.resample, max_aspect_ratio), (rows, columns)

    def get_patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches that an image of `height` x `width` pixels becomes."""
        return self._grid(height, width, self.patch_size, self.size, self.resize_rule, self.do_resize)

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: dict[str, Any] | None = None
    ) -> int:
        """How many patches an image of `height` x `width` pixels becomes (vLLM asks this without an image).

        Args:
            images_kwargs: settings that override the processor's own.
        """
        settings = {name: getattr(self, name) for name in ("patch_size", "size", "resize_rule", "do_resize")}
        settings |= {key: value for key, value in (images_kwargs or {}).items() if key in settings}
        rows, columns = self._grid(height, width, **settings)
        return rows * columns

    def fetch_images(self, image_url_or_urls: Any, input_data_format: ChannelOrder | None = None) -> Any:
        """Load an image, or a list (of lists) of images, into RGB `PIL.Image`s, nested as given."""
        source = image_url_or_urls
        if _is_batch(source):
            return [self.fetch_images(item, input_data_format) for item in source]
        return load_image(source, input_data_format=input_data_format)

    def process_image(
        self, image: Any, input_data_format: ChannelOrder | None = None, **kwargs: Any
    ) -> Image.Image:
        """Load one image into an RGB `PIL.Image`, which Pillow can resize (arrays come after)."""
        return load_image(image, input_data_format=input_data_format)

    def _prepare_image_like_inputs(
        self, images: Any, *args: Any, input_data_format: ChannelOrder | None = None, **kwargs: Any
    ) -> list[np.ndarray]:
        return [load_pixels(image, input_data_format=input_data_format) for image in _flatten(images)]

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | int | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        patch_size: int,
        resize_rule: ResizeRule,
        return_tensors: str | TensorType | None,
        max_aspect_ratio: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        patches, grids = [np.empty((0, 3 * patch_size**2), np.uint8)], []
        for image in images:
            height, width = image.shape[:2]
            rows, columns = self._grid(height, width, patch_size, size, resize_rule, do_resize)
            patches.append(_cut(image, rows, columns, patch_size, resample, max_aspect_ratio))
            grids.append((1, rows, columns))

        # One image is the usual case of a data loader: nothing to concatenate, so nothing to copy.
        pixel_values = patches[1] if len(images) == 1 else np.concatenate(patches)
        if do_rescale or do_normalize:
            levels = np.arange(256)[None] * (rescale_factor if do_rescale else 1)  # (1, 256)
            if do_normalize:
                levels = (levels - np.reshape(image_mean, (-1, 1))) / np.reshape(image_std, (-1, 1))
            table = np.broadcast_to(levels, (3, 256)).astype(np.float32)
            by_channel = pixel_values.reshape(-1, 3, patch_size**2)
            pixel_values = np.stack([table[c][by_channel[:, c]] for c in range(3)], axis=1)
            pixel_values = pixel_values.reshape(-1, 3 * patch_size**2)  # (patches, 3 * patch_size**2)
        image_grid_thw = np.array(grids, dtype=np.int64).reshape(-1, 3)
        return BatchFeature(
            data={"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}, tensor_type=return_tensors
        )

    @staticmethod
    def _grid(
        height: int,
        width: int,
        patch_size: int,
        size: dict[str, int] | SizeDict,
        resize_rule: ResizeRule,
        do_resize: bool,
    ) -> tuple[int, int]:
        if not do_resize:
            if height % patch_size or width % patch_size or not height or not width:
                raise ValueError(
                    f"without do_resize, sides must be multiples of {patch_size} pixels, "
                    f"not {height} x {width}"
                )
            return height // patch_size, width // patch_size
        given = {side: pixels for side, pixels in dict(size).items() if pixels is not None}
        if set(given) == {"height", "width"}:
            if any(pixels < patch_size or pixels % patch_size for pixels in given.values()):
                raise ValueError(f"a fixed size must be multiples of {patch_size} pixels, not {given}")
            return given["height"] // patch_size, given["width"] // patch_size
        if set(given) != {"longest_edge"}:
            raise ValueError(
                'size must be {"longest_edge": pixels} or {"height": pixels, "width": pixels}, '
                f"not {given}"
            )
        return patch_grid(height, width, patch_size, given["longest_edge"], resize_rule)


def _is_batch(images: Any) -> bool:
    return isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4


def _flatten(images: Any) -> Iterator[Any]:
    if _is_batch(images):
        for item in images:
            yield from _flatten(item)
    else:
        yield images


__all__ = ["SoloImageProcessor", "SoloImageProcessorKwargs", "image_to_patches", "patch_grid"]
