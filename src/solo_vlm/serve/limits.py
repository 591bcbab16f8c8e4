"""Limits of the server. Imported by the command line, so it loads nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits on each request and on all of them together; every field is an option of `solo serve`.

    Attributes:
        max_concurrent: maximum in-flight requests (reading, queued or generating).
        max_batch: maximum requests generated together.
        max_batch_tokens: maximum of rows times (longest prompt + longest answer) in such a batch.
        max_tokens: maximum tokens per answer.
        max_text_chars: maximum characters of text per request.
        max_messages: maximum messages per request.
        max_images: maximum images per request.
        max_image_bytes: maximum size of an image file in bytes.
        max_pixels: maximum width * height, summed over a request's images.
        max_request_bytes: maximum size of a request body in bytes.
        max_seconds: time limit in seconds, from the last byte of a request to the last of its answer.
        max_body_seconds: time limit in seconds for sending the request body.
        max_fetch_seconds: time limit in seconds for downloading an image.
        max_drain_seconds: time limit in seconds for in-flight requests at shutdown.
        max_cached_image_bytes: memory in bytes for encoded images; 0 encodes every image anew.
        allow_image_urls: whether to download images from http(s) URLs.
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
    max_cached_image_bytes: int = 128 * 2**20
    allow_image_urls: bool = False
