"""SOLO's image processor, which converts images to raw pixel patches.

Images keep their aspect ratio (unless a fixed size is set): both sides are resized to multiples of the
patch size, nothing is cropped, and the patches of all images are concatenated, so nothing is padded.
"""

import ctypes
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
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

from .image_colors_solo import ChannelOrder
from .image_limits_solo import MAX_ASPECT_RATIO, LimitError, check_aspect_ratio
from .image_loading_solo import (
    ImageError,
    LoadOptions,
    image_size,
    load_image,
    load_pixels,
)

try:
    import cv2
except ImportError:  # optional in a published folder; `resize` falls back to torch
    cv2 = None  # type: ignore[assignment]

ResizeRule = Literal["original", "figure2"]
_GRID_SETTINGS = ("patch_size", "size", "resize_rule", "do_resize", "max_patches")
_BILINEAR = (None, PILImageResampling.BILINEAR)

LIBRARY = Path(__file__).with_name("enlarge.so")
"""Compiled from `enlarge.c` at installation, on x86-64 with a C compiler."""


def patch_grid(
    height: int,
    width: int,
    patch_size: int = 32,
    longest_edge: int = 1024,
    rule: ResizeRule = "original",
    max_patches: int | None = None,
) -> tuple[int, int]:
    """Return the size in patches, (rows, columns), that an image is resized to.

    The rule "original" is the one SOLO-7B was trained with: the long side is rounded up to a multiple of
    `patch_size`, at most `longest_edge`; the short side is scaled in proportion and rounded up too, so
    neither exceeds `longest_edge`. The rule "figure2" is the code printed in the paper's Figure 2, which adds
    a patch where a side is already a multiple, so the short side can exceed `longest_edge` by one patch
    (1024 x 1024 pixels give 33 rows of 32). For a square image, the height is the short side.

    Beyond an aspect ratio of `longest_edge`:1, the original code computes a side of 0; here the minimum is
    one patch.

    Args:
        height, width: Size of the image in pixels.
        patch_size: Side of a square patch in pixels.
        longest_edge: Maximum length of the long side in pixels, a multiple of `patch_size`.
        rule: "original" or "figure2".
        max_patches: Budget of an image. The long side shrinks, patch by patch, until it is kept.

    Raises:
        ValueError: A size or the budget is not positive, `longest_edge` is not a multiple of `patch_size`,
            or the rule is unknown.
    """
    if height < 1 or width < 1:
        raise ValueError(f"image size {height} x {width} is not positive")
    if patch_size < 1 or longest_edge < patch_size or longest_edge % patch_size:
        raise ValueError(f"longest_edge={longest_edge} is not a multiple of patch_size={patch_size}")
    if rule not in ("original", "figure2"):
        raise ValueError(f'resize_rule must be "original" or "figure2", not {rule!r}')
    if max_patches is not None and max_patches < 1:
        raise ValueError(f"max_patches={max_patches} is not positive")

    def to_patches(pixels: int) -> int:
        return pixels // patch_size + 1 if rule == "figure2" else -(-pixels // patch_size)

    short, long = sorted((height, width))
    long_patches = min(to_patches(long), longest_edge // patch_size)
    while True:
        # The original code's int(new_long * short / long), in integer arithmetic.
        short_patches = max(1, to_patches(long_patches * patch_size * short // long))
        if max_patches is None or long_patches * short_patches <= max_patches or long_patches == 1:
            break
        long_patches -= 1
    return (long_patches, short_patches) if height > width else (short_patches, long_patches)


def resize(
    pixels: np.ndarray, height: int, width: int, resample: int | None = PILImageResampling.BILINEAR
) -> np.ndarray:
    """Resize like Pillow; bilinear resizing is several times faster.

    OpenCV computes bilinear enlargement. It would skip pixels when a side shrinks, so torch computes that
    case with antialiasing, and every bilinear case where OpenCV is not installed. Results differ from
    Pillow's by rounding: at most one level of 255 in places (torch: in few places, but by two at extreme
    enlargement). Pillow itself computes the other filters.

    Args:
        pixels: (rows, columns, 3) uint8.
        height, width: New size in pixels.
        resample: Pillow filter; None means bilinear.

    Returns:
        (height, width, 3) uint8.
    """
    old_height, old_width = pixels.shape[:2]
    if (old_height, old_width) == (height, width):
        return pixels
    if resample not in _BILINEAR:
        return np.asarray(Image.fromarray(pixels).resize((width, height), resample))
    if cv2 is not None and old_height <= height and old_width <= width:
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    # By its strides this batch of one is in channels_last layout, for which torch has its fastest kernel.
    batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # (1, 3, rows, columns)
    batch = F.interpolate(batch, (height, width), mode="bilinear", antialias=True)
    return batch[0].permute(1, 2, 0).numpy()


def image_to_patches(image: Image.Image | np.ndarray, patch_size: int) -> NDArray[np.uint8]:
    """Cut an RGB image whose sides are multiples of `patch_size` into patches.

    Args:
        image: `PIL.Image`, or (height, width, 3) uint8.
        patch_size: Side of a patch in pixels.

    Returns:
        (num_patches, 3 * patch_size**2) uint8: patches in raster order, each flattened channel first (all red
        values row by row, then green, then blue).
    """
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    # The intermediate array has no name, so its memory is freed and reused while still in the cache.
    planes = _planes(_by_patch(pixels, rows, columns, patch_size))
    return planes.reshape(3, rows * columns, -1).swapaxes(0, 1).reshape(rows * columns, -1)


def patches_to_image(pixel_values: NDArray[np.uint8], rows: int, columns: int) -> Image.Image:
    """Reassemble the resized image from its (rows * columns, 3 * patch_size**2) uint8 patches."""
    side = round((pixel_values.shape[1] // 3) ** 0.5)
    grid = pixel_values.reshape(rows, columns, 3, side, side)
    pixels = grid.transpose(0, 3, 1, 4, 2)  # (rows, side, columns, side, 3)
    return Image.fromarray(pixels.reshape(rows * side, columns * side, 3))


def _by_patch(pixels: np.ndarray, rows: int, columns: int, patch_size: int) -> np.ndarray:
    """Reorder (height, width, 3) pixels patch by patch: (height * width, 3)."""
    line = np.dtype((np.void, 3 * patch_size))  # copies one patch row at a time
    patches = np.empty((rows, columns, patch_size), line)
    patches[:] = pixels.reshape(rows, patch_size, -1).view(line).swapaxes(1, 2)
    return patches.view(np.uint8).reshape(-1, 3)


def _planes(pixels: np.ndarray) -> np.ndarray:
    """Split (n, 3) pixels into (3, n) color planes."""
    if cv2 is None:
        return pixels.T
    # Odd plane stride: OpenCV bypasses the cache when it writes to planes of equal alignment.
    planes = np.empty((3, len(pixels) | 1), np.uint8)[:, : len(pixels)]
    cv2.split(pixels[None], list(planes[:, None]))
    return planes


_library: Any
try:
    _library = ctypes.CDLL(str(LIBRARY))
    _library.solo_can_enlarge.argtypes = [ctypes.c_int] * 5
    _library.solo_enlarge.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 5, ctypes.c_void_p]
except OSError:
    _library = None


def enlarge_to_patches(
    pixels: np.ndarray, rows: int, columns: int, patch_size: int
) -> NDArray[np.uint8] | None:
    """Enlarge an image bilinearly and cut it into patches in one pass (`enlarge.c`).

    The result equals OpenCV's to the bit and takes a third of its time.

    Args:
        pixels: (height, width, 3) uint8.
        rows, columns: New size in patches.
        patch_size: Side of a patch in pixels.

    Returns:
        (rows * columns, 3 * patch_size**2) uint8, each patch channel first; None for unsupported sizes (image
        at most five pixels wide, a side that shrinks, patches not a multiple of 32 pixels wide) and where the
        library is not compiled or the processor lacks AVX2: the caller falls back to `resize`.

    Raises:
        MemoryError: Out of memory for the lookup tables.
    """
    height, width = pixels.shape[:2]
    if _library is None or not _library.solo_can_enlarge(height, width, rows, columns, patch_size):
        return None
    pixels = np.ascontiguousarray(pixels)
    patches = np.empty((rows * columns, 3 * patch_size**2), np.uint8)
    sizes = (height, width, rows, columns, patch_size)
    if _library.solo_enlarge(pixels.ctypes.data, *sizes, patches.ctypes.data):
        raise MemoryError(f"out of memory while enlarging an image of {height} x {width} pixels")
    return patches


def _resize_to_patches(
    pixels: np.ndarray,
    rows: int,
    columns: int,
    patch_size: int,
    resample: int | None,
) -> NDArray[np.uint8]:
    """Resize an image of any size and cut it: (rows * columns, 3 * patch_size**2) uint8."""
    size = rows * patch_size, columns * patch_size
    if resample in _BILINEAR and pixels.shape[:2] != size:
        patches = enlarge_to_patches(pixels, rows, columns, patch_size)
        if patches is not None:
            return patches
    return image_to_patches(resize(pixels, *size, resample), patch_size)


def _check_aspect_ratio(pixels: np.ndarray, max_aspect_ratio: float | None) -> None:
    try:
        check_aspect_ratio(pixels.shape[0], pixels.shape[1], max_aspect_ratio)
    except LimitError as error:
        raise ImageError(str(error)) from error


def _normalize(
    pixel_values: NDArray[np.uint8],
    do_rescale: bool,
    factor: float,
    do_normalize: bool,
    mean: float | Sequence[float],
    std: float | Sequence[float],
) -> NDArray[Any]:
    """Return (pixel * factor - mean) / std of (num_patches, dim) uint8 patches, by channel, in float32.

    Either step can be omitted; without both, the patches are returned unchanged.
    """
    if not (do_rescale or do_normalize):
        return pixel_values
    factor = factor if do_rescale else 1
    mean, std = (mean, std) if do_normalize else (0, 1)
    levels = (np.arange(256)[None] * factor - np.reshape(mean, (-1, 1))) / np.reshape(std, (-1, 1))
    table = np.broadcast_to(levels, (3, 256)).astype(np.float32)
    channels = pixel_values.reshape(len(pixel_values), 3, pixel_values.shape[1] // 3)
    return np.stack([table[c][channels[:, c]] for c in range(3)], axis=1).reshape(pixel_values.shape)


class SoloImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of `SoloImageProcessor` beyond those of every image processor.

    patch_size (`int`, *optional*, defaults to 32):
        Side of a square patch in pixels.
    resize_rule (`str`, *optional*, defaults to `"original"`):
        Rule for the size in patches, `"original"` or `"figure2"`; see `patch_grid`.
    max_patches (`int`, *optional*):
        Budget of patches per image; larger images shrink, and keep their aspect ratio.
    max_aspect_ratio (`int`, *optional*):
        Reject images whose long side exceeds the short one by more than this factor. By default, a strip of
        pixels is stretched to one patch.
    """

    patch_size: int
    resize_rule: ResizeRule
    max_patches: int | None
    max_aspect_ratio: int | None


class SoloImageProcessor(PilBackend):
    """Image processor that returns raw pixel patches, SOLO's only visual input.

    Patches are uint8 by default: a quarter of float32's memory; the model normalizes them on its device.
    With `do_rescale=True, do_normalize=True` they are float32, normalized with ImageNet's mean and standard
    deviation, as in the original SOLO code.

    Args (each can be overridden per call):
        patch_size: Side of a square patch in pixels.
        size: `{"longest_edge": pixels}`, a multiple of `patch_size`, for native resolution as in the paper;
            or `{"height": pixels, "width": pixels}`, to which every image is stretched, as vision encoders
            do.
        resize_rule: "original" or "figure2"; see `patch_grid`.
        max_patches: Budget of patches per image, for images of native resolution; None is no limit.
        max_aspect_ratio: Maximum aspect ratio of an accepted image; None accepts any.
        do_resize: If False, both sides of every image must already be multiples of `patch_size`.
        resample: Pillow filter. SOLO-7B was trained with bilinear, which antialiases when it shrinks; see
            `resize` for the implementation.
        do_rescale, rescale_factor, do_normalize, image_mean, image_std: As in transformers.

    Images are always converted to RGB (see `load_image`), regardless of `do_convert_rgb`.
    """

    patch_size = 32
    resize_rule: ResizeRule = "original"
    max_patches: int | None = None
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
        self.get_patch_grid(self.patch_size, self.patch_size)  # rejects invalid settings here
        if self.resample not in (None, *Image.Resampling):
            raise ValueError(f"resample={self.resample} is no filter of Pillow")
        if self.image_std is not None and not all(0 < one < math.inf for one in np.ravel(self.image_std)):
            raise ValueError(f"image_std={self.image_std} is not positive and finite")

    def preprocess(self, images: ImageInput, **kwargs: Unpack[SoloImageProcessorKwargs]) -> BatchFeature:
        """Convert images to patches.

        Args:
            images: One image or a (nested) list of images, each in any form that `load_image` reads. A
                four-dimensional array is a batch.
            kwargs: Overrides of the processor's settings for this call. `input_data_format`
                ("channels_first" or "channels_last") fixes the axis order of arrays.

        Returns:
            `pixel_values`, (num_patches, 3 * patch_size**2), uint8, or float32 if rescaled or normalized: the
            concatenated patches of all images. `image_grid_thw`, (num_images, 3) int64: (1, rows, columns)
            per image.

        Raises:
            ImageError: An image cannot be read or used (a `ValueError`).
            ValueError: A setting is invalid.
        """
        return super().preprocess(images, **kwargs)

    def encode_image(
        self, source: Any, **options: Unpack[LoadOptions]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Read one image and convert it to model inputs, by the processor's own settings.

        Training, evaluation, serving and the page all encode images here. The result equals `preprocess`
        without rescaling, minus the overhead of validating the settings of every call.

        Args:
            source: Bytes of an image file, path, URL, base64, `PIL.Image`, array or tensor; see `load_image`.
            **options: Limits on what may be read, as for `load_image`. `max_aspect_ratio` is by default the
                processor's own, or else `load_image`'s.

        Returns:
            `pixel_values`, (num_patches, 3 * patch_size**2) uint8, and `image_grid_thw`, (3,) int64:
            (1, rows, columns).

        Raises:
            ImageError: The image cannot be read or used.
        """
        return self.encode_pixels(self.load_pixels(source, **options))

    def read_grid(self, source: Any, **options: Unpack[LoadOptions]) -> NDArray[np.int64]:
        """Return the grid that `encode_image` returns for an image file, from its header if that tells."""
        options.setdefault("max_aspect_ratio", self.max_aspect_ratio or MAX_ASPECT_RATIO)
        return np.array([1, *self.get_patch_grid(*image_size(source, **options))], np.int64)

    def load_pixels(self, source: Any, **options: Unpack[LoadOptions]) -> NDArray[np.uint8]:
        """Read one image into (height, width, 3) uint8 pixels, by the rules of `encode_image`."""
        max_aspect_ratio = options.setdefault("max_aspect_ratio", self.max_aspect_ratio or MAX_ASPECT_RATIO)
        pixels = load_pixels(source, **options)
        _check_aspect_ratio(pixels, max_aspect_ratio)  # an array has no header to check
        return pixels

    def encode_pixels(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Convert (height, width, 3) uint8 pixels of any size to model inputs; see `encode_image`."""
        rows, columns = self.get_patch_grid(*pixels.shape[:2])
        patches = _resize_to_patches(pixels, rows, columns, self.patch_size, self.resample)
        return patches, np.array([1, rows, columns], np.int64)

    def normalize_patches(self, pixel_values: NDArray[np.uint8]) -> NDArray[Any]:
        """Apply the processor's `do_rescale` and `do_normalize` to (num_patches, dim) uint8 patches."""
        mean, std = self.image_mean, self.image_std
        return _normalize(pixel_values, self.do_rescale, self.rescale_factor, self.do_normalize, mean, std)

    def get_patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return (rows, columns) of the patches of an image of `height` x `width` pixels."""
        return self._grid(height, width, **{name: getattr(self, name) for name in _GRID_SETTINGS})

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: dict[str, Any] | None = None
    ) -> int:
        """Return the number of patches of an image of `height` x `width` pixels (part of vLLM's interface).

        `images_kwargs` override the processor's settings.
        """
        settings = {name: getattr(self, name) for name in _GRID_SETTINGS}
        settings |= {key: value for key, value in (images_kwargs or {}).items() if key in settings}
        rows, columns = self._grid(height, width, **settings)
        return rows * columns

    def fetch_images(self, image_url_or_urls: Any, input_data_format: ChannelOrder | None = None) -> Any:
        """Load an image or a nested list of images as RGB `PIL.Image`s, with the same nesting."""
        source = image_url_or_urls
        if _is_batch(source):
            return [self.fetch_images(item, input_data_format) for item in source]
        return load_image(source, input_data_format=input_data_format)

    def process_image(
        self, image: Any, input_data_format: ChannelOrder | None = None, **kwargs: Any
    ) -> Image.Image:
        """Load one image as an RGB `PIL.Image`."""
        return load_image(image, input_data_format=input_data_format)

    def _prepare_image_like_inputs(
        self,
        images: Any,
        *args: Any,
        input_data_format: ChannelOrder | None = None,
        max_aspect_ratio: int | None = None,
        **kwargs: Any,
    ) -> list[np.ndarray]:
        options: LoadOptions = {"input_data_format": input_data_format, "max_aspect_ratio": max_aspect_ratio}
        return [load_pixels(image, **options) for image in _flatten(images)]

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
        max_patches: int | None = None,
        max_aspect_ratio: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        patches, grids = [np.empty((0, 3 * patch_size**2), np.uint8)], []
        for image in images:
            _check_aspect_ratio(image, max_aspect_ratio)
            height, width = image.shape[:2]
            rows, columns = self._grid(height, width, patch_size, size, resize_rule, do_resize, max_patches)
            patches.append(_resize_to_patches(image, rows, columns, patch_size, resample))
            grids.append((1, rows, columns))

        # A single image, the common case, needs no copy.
        pixel_values = patches[1] if len(images) == 1 else np.concatenate(patches)
        pixel_values = _normalize(
            pixel_values, do_rescale, rescale_factor, do_normalize, image_mean, image_std
        )
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
        max_patches: int | None,
    ) -> tuple[int, int]:
        if not do_resize:
            if height % patch_size or width % patch_size or not height or not width:
                raise ValueError(
                    f"with do_resize=False, sides must be multiples of {patch_size} pixels, "
                    f"not {height} x {width}"
                )
            return _within_budget(height // patch_size, width // patch_size, max_patches)
        given = {side: pixels for side, pixels in dict(size).items() if pixels is not None}
        if set(given) == {"height", "width"}:
            if any(pixels < patch_size or pixels % patch_size for pixels in given.values()):
                raise ValueError(f"size must be multiples of {patch_size} pixels, not {given}")
            return _within_budget(given["height"] // patch_size, given["width"] // patch_size, max_patches)
        if set(given) != {"longest_edge"}:
            raise ValueError(
                'size must be {"longest_edge": pixels} or {"height": pixels, "width": pixels}, '
                f"not {given}"
            )
        return patch_grid(height, width, patch_size, given["longest_edge"], resize_rule, max_patches)


def _within_budget(rows: int, columns: int, max_patches: int | None) -> tuple[int, int]:
    if max_patches is not None and rows * columns > max_patches:
        raise ValueError(f"{rows} x {columns} patches of a fixed size exceed max_patches={max_patches}")
    return rows, columns


def _is_batch(images: Any) -> bool:
    return isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4


def _flatten(images: Any) -> Iterator[Any]:
    if _is_batch(images):
        for item in images:
            yield from _flatten(item)
    else:
        yield images


__all__ = [
    "SoloImageProcessor",
    "SoloImageProcessorKwargs",
    "image_to_patches",
    "patch_grid",
    "patches_to_image",
]
