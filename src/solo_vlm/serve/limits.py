"""Server limits and their command-line options, without heavy imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

Option = typer.Option


@dataclass(frozen=True)
class Limits:
    """Limits on each request and on all of them together; each field is an option of `solo serve`."""

    max_concurrent: Annotated[
        int, Option(min=1, help="Maximum in-flight requests (reading, queued or generating); more get 429.")
    ] = 64
    max_connections: Annotated[
        int, Option(min=1, help="Maximum open connections; above it, the longest idle one is closed.")
    ] = 512
    max_batch: Annotated[int, Option(min=1, help="Maximum requests generated together.")] = 8
    max_batch_tokens: Annotated[
        int, Option(min=1, help="Maximum tokens per batch of several requests, with padding and answers.")
    ] = 32_768
    max_tokens: Annotated[int, Option(min=1, help="Maximum tokens per answer.")] = 1024
    max_text_chars: Annotated[int, Option(min=1, help="Maximum characters of text per request.")] = 200_000
    max_messages: Annotated[int, Option(min=1, help="Maximum messages per request.")] = 200
    max_images: Annotated[int, Option(min=0, help="Maximum images per request.")] = 16
    max_image_bytes: Annotated[int, Option(min=1, help="Maximum bytes per image file.")] = 10 * 2**20
    max_pixels: Annotated[
        int, Option(min=1, help="Maximum width * height, summed over a request's images.")
    ] = 50_000_000
    max_request_bytes: Annotated[int, Option(min=1, help="Maximum bytes per request body.")] = 32 * 2**20
    max_pending_bytes: Annotated[
        int, Option(min=1, help="Maximum bytes of all large bodies being read or prepared; more get 429.")
    ] = 256 * 2**20
    max_values: Annotated[
        int, Option(min=1, help="Maximum JSON values (strings, numbers, lists, objects) per request.")
    ] = 10_000
    max_seconds: Annotated[float, Option(min=0.1, help="Time limit per request, once its body is read.")] = (
        300.0
    )
    max_body_seconds: Annotated[float, Option(min=0.1, help="Time limit for sending a request's body.")] = (
        30.0
    )
    max_head_seconds: Annotated[
        float, Option(min=0.1, help="Time limit for sending a request's headers on an open connection.")
    ] = 10.0
    max_fetch_seconds: Annotated[
        float, Option(min=0.1, help="Time limit for downloading a request's images.")
    ] = 10.0
    max_drain_seconds: Annotated[
        float, Option(min=0, help="Time limit for in-flight requests at shutdown.")
    ] = 30.0
    max_cached_image_bytes: Annotated[
        int, Option(min=0, help="Memory for encoded images in bytes; 0 disables the cache.")
    ] = 128 * 2**20
    allow_image_urls: Annotated[
        bool, Option("--allow-image-urls", help="Download images from public http(s) addresses.")
    ] = False
