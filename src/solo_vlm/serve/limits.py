"""What one request, and all of them together, may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of the server; each is an option of `solo serve`.

    Attributes:
        max_concurrent: requests in the house, whether they are read, wait or are answered.
        max_batch: requests that are answered together.
        max_batch_tokens: rows times longest prompt and answer of such a batch.
        max_tokens: of one answer.
        max_text_chars: characters of all texts of a request.
        max_messages: of a chat.
        max_images: of a request.
        max_image_bytes: of one image file.
        max_pixels: width * height, of all images of a request together.
        max_request_bytes: of the body.
        max_seconds: from a request's last byte to its answer's.
        max_body_seconds: from a request's first byte to its last.
        max_fetch_seconds: for an image from a URL.
        max_drain_seconds: for what is unfinished when the server is asked to stop.
        allow_image_urls: whether images may be fetched from http(s) URLs.
    """

    max_concurrent: int = 64
    max_batch: int = 8
    max_batch_tokens: int = 32_768
    max_tokens: int = 1024
    max_text_chars: int = 200_000
    max_messages: int = 200
    max_images: int = 16
    max_image_bytes: int = 10 * 2**20
    max_pixels: int = 50_000_000
    max_request_bytes: int = 32 * 2**20
    max_seconds: float = 300.0
    max_body_seconds: float = 30.0
    max_fetch_seconds: float = 10.0
    max_drain_seconds: float = 30.0
    allow_image_urls: bool = False
