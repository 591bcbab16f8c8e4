"""Turns of a chat, made of a prompt and images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from solo_vlm.data.text_values import check_text
from solo_vlm.models.solo.image_loading_solo import ImageError, load_image
from solo_vlm.models.solo.processing_solo import Message
from solo_vlm.utils.errors import SoloError


def check_prompt(prompt: str) -> None:
    """Make sure that a tokenizer can read a prompt, before long work begins.

    Raises:
        SoloError: it cannot.
    """
    try:
        check_text(prompt)
    except ValueError as error:
        raise SoloError(f"the prompt cannot be used: {error}") from error


def user_turn(prompt: str, images: Sequence[Image.Image]) -> Message:
    """A user's turn: images first, then the prompt.

    Raises:
        SoloError: see `check_prompt`.
    """
    check_prompt(prompt)
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}


def open_images(sources: Sequence[str]) -> list[Image.Image]:
    """Images from paths and URLs.

    Raises:
        SoloError: naming the one that cannot be read.
    """
    try:
        return [load_image(source) for source in sources]
    except ImageError as error:
        raise SoloError(str(error)) from error
