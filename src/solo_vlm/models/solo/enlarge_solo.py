"""Enlarging an image and cutting it into patches in one pass: `enlarge.c`, where it was compiled."""

import ctypes
from pathlib import Path

import numpy as np

LIBRARY = Path(__file__).with_name("enlarge.so")
"""Made of `enlarge.c` when the package was installed, on x86-64 with a C compiler."""


def _load() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    library.solo_can_enlarge.argtypes = [ctypes.c_int] * 5
    library.solo_enlarge.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 5, ctypes.c_void_p]
    return library


_library = _load()


def enlarge_to_patches(pixels: np.ndarray, rows: int, columns: int, patch_size: int) -> np.ndarray | None:
    """The patches of an image enlarged as OpenCV does it bilinearly, to the same bits in a third of the time.

    Args:
        pixels: uint8 (height, width, 3).
        rows, columns: the new size in patches.
        patch_size: side of a patch in pixels.

    Returns:
        uint8 (rows * columns, 3 * patch_size**2), each channel first. None where somebody else must do it:
        the library was not compiled, the processor lacks AVX2, the image is no wider than five pixels, a side
        would shrink, or patches are no multiple of 32 pixels wide.

    Raises:
        MemoryError: there is none for the tables.
    """
    height, width = pixels.shape[:2]
    if _library is None or not _library.solo_can_enlarge(height, width, rows, columns, patch_size):
        return None
    pixels = np.ascontiguousarray(pixels)
    patches = np.empty((rows * columns, 3 * patch_size**2), np.uint8)
    form = (height, width, rows, columns, patch_size)
    if _library.solo_enlarge(pixels.ctypes.data, *form, patches.ctypes.data):
        raise MemoryError(f"no memory to enlarge an image of {height} x {width} pixels")
    return patches
