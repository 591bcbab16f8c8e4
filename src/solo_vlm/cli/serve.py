"""`solo serve`: a model behind OpenAI's chat API."""

from __future__ import annotations

import os
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from solo_vlm.cli._common import STDERR, QuantizeOption, quiet_libraries
from solo_vlm.serve.limits import Limits
from solo_vlm.utils.errors import SoloError

_DEFAULT = Limits()
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_KEY_VARIABLE = "SOLO_API_KEY"
_PREFIX_CACHE = 1.0  # GB


class Engine(StrEnum):
    """What generates."""

    transformers = "transformers"
    vllm = "vllm"


def serve(
    model: Annotated[str, typer.Option(help="Folder or hub id of a SOLO model.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    engine: Annotated[Engine, typer.Option(help="vllm: vLLM's own server.")] = Engine.transformers,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model; default: the folder's name.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"Keys that requests need, one a line; default: ${_KEY_VARIABLE}.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Of the weights; auto: as stored."),
    ] = "auto",
    quantize: QuantizeOption = None,
    device: Annotated[str | None, typer.Option(help="Default: the accelerator, if there is one.")] = None,
    prefix_cache: Annotated[
        float, typer.Option(min=0, help="GB of keys and values of earlier prompts to keep.")
    ] = _PREFIX_CACHE,
    max_concurrent: Annotated[
        int, typer.Option(min=1, help="Requests in work; further ones get 429.")
    ] = _DEFAULT.max_concurrent,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests answered together.")] = _DEFAULT.max_batch,
    max_batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a batch of several, padding and answers included.")
    ] = _DEFAULT.max_batch_tokens,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = _DEFAULT.max_tokens,
    max_text_chars: Annotated[
        int, typer.Option(min=1, help="Characters of a request's texts.")
    ] = _DEFAULT.max_text_chars,
    max_messages: Annotated[int, typer.Option(min=1, help="Messages of a chat.")] = _DEFAULT.max_messages,
    max_images: Annotated[int, typer.Option(min=0, help="Images of a request.")] = _DEFAULT.max_images,
    max_image_bytes: Annotated[
        int, typer.Option(min=1, help="Bytes of an image file.")
    ] = _DEFAULT.max_image_bytes,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Pixels of a request's images together.")
    ] = _DEFAULT.max_pixels,
    max_request_bytes: Annotated[
        int, typer.Option(min=1, help="Bytes of a request.")
    ] = _DEFAULT.max_request_bytes,
    max_seconds: Annotated[
        float, typer.Option(min=0.1, help="Time for a request, once it is read.")
    ] = _DEFAULT.max_seconds,
    max_body_seconds: Annotated[
        float, typer.Option(min=0.1, help="Time for a client to send a request.")
    ] = _DEFAULT.max_body_seconds,
    max_fetch_seconds: Annotated[
        float, typer.Option(min=0.1, help="Time to fetch an image.")
    ] = _DEFAULT.max_fetch_seconds,
    max_drain_seconds: Annotated[
        float, typer.Option(min=0, help="Time to finish what has begun, when asked to stop.")
    ] = _DEFAULT.max_drain_seconds,
    allow_image_urls: Annotated[
        bool, typer.Option("--allow-image-urls", help="Fetch images from public http(s) addresses.")
    ] = _DEFAULT.allow_image_urls,
    vllm: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- VLLM_OPTIONS", help="With --engine vllm: options of its own."),
    ] = None,
) -> None:
    """Serve a model behind OpenAI's chat API, within limits."""
    options = locals()
    limits = Limits(**{field.name: options[field.name] for field in fields(Limits)})
    name = name or Path(model).resolve().name
    api_keys = _api_keys(api_key_file)
    if not api_keys and host not in _LOOPBACK:
        STDERR.print(
            f"anybody who reaches {host} may ask: set {_KEY_VARIABLE} or --api-key-file", style="yellow"
        )
    if engine == Engine.vllm:
        from solo_vlm.serve.vllm_server import become_vllm, vllm_command

        if device or quantize or prefix_cache not in (0, _PREFIX_CACHE):
            raise SoloError(
                "--engine vllm takes neither --device nor --quantize, and no --prefix-cache but 0"
            )
        command = vllm_command(model, name, host, port, limits, dtype, prefix_caching=prefix_cache > 0)
        become_vllm([*command, *(vllm or [])], api_keys)
    if vllm:
        raise SoloError(f"options after -- are for --engine vllm: {' '.join(vllm)}")
    quiet_libraries()
    try:
        from solo_vlm.serve.server import serve_model
    except ModuleNotFoundError as error:
        raise SoloError(f"the server needs {error.name}: pip install 'solo-vlm[serve]'") from error
    from solo_vlm.generate import Answerer, PrefixCache

    def load() -> Answerer:
        known = PrefixCache(int(prefix_cache * 1e9)) if prefix_cache else None
        return Answerer.load(model, dtype, device, quantize, known)

    def on_ready(url: str) -> None:
        STDERR.print(f"{name} at {url}/v1", highlight=False)

    serve_model(load, name, host, port, limits, api_keys, on_ready)


def _api_keys(file: Path | None) -> list[str]:
    """Those of the file, else of the environment.

    Raises:
        SoloError: the file cannot be read, or has none.
    """
    if file is None:
        return [key] if (key := os.environ.get(_KEY_VARIABLE, "").strip()) else []
    try:
        keys = file.read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise SoloError(f"cannot read API keys from {file}: {error}") from error
    if not keys:
        raise SoloError(f"{file} has no API key: write one a line")
    return keys
