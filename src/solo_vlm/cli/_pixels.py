"""Sizes of images on the command line."""

from __future__ import annotations

import re

from solo_vlm.utils.errors import SoloError


def parse_pixels(option: str, text: str) -> tuple[int, int]:
    """(width, height) of "1024x768".

    Args:
        option: of the command, for the error.
        text: what it was given.

    Raises:
        SoloError: it is of another form.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise SoloError(f"{option} {text}: expected width x height in pixels, as 1024x768")
    return int(match[1]), int(match[2])
