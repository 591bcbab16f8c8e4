"""What one visitor of the page may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Defaults are meant for one machine and a few people.

    Args:
        image_bytes: of one uploaded file.
        pixels: width times height of an image, told by its header before it is decoded.
        images: in one chat.
        held_bytes: of all visitors' images in memory; beyond it those that were not used for longest go.
        characters: of all turns of a chat.
        new_tokens: of an answer.
        waiting: requests that may wait while the model is busy with another.
    """

    image_bytes: int = 20 * 2**20
    pixels: int = 50_000_000
    images: int = 8
    held_bytes: int = 512 * 2**20
    characters: int = 50_000
    new_tokens: int = 1024
    waiting: int = 8

    @property
    def request_bytes(self) -> int:
        """Of a request in JSON: four bytes a character, twelve where it is escaped, and its frame."""
        return 12 * self.characters + 2**16
