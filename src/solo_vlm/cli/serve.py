"""`solo serve`: OpenAI's chat API and a page for one model; `solo web`: the same, opened in the browser."""

from __future__ import annotations

import inspect
import os
import webbrowser
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from threading import Thread
from typing import Annotated, Any, Literal, get_type_hints

import typer

from solo_vlm.cli._common import STDERR, STDOUT, QuantizeOption, quiet_libraries
from solo_vlm.serve.limits import Limits
from solo_vlm.utils.errors import SoloError

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_KEY_VARIABLE = "SOLO_API_KEY"
_PREFIX_CACHE_GB = 1.0

ModelOption = Annotated[str, typer.Option(help="Folder or hub ID of a SOLO model.")]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")]
HostOption = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all interfaces.")]
KeysOption = Annotated[
    Path | None, typer.Option(help=f"File of accepted API keys, one per line; default: ${_KEY_VARIABLE}.")
]


def _with_limits(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the parameter `**limits` of a command into one option per field of `Limits`."""
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "limits"]
    hints = get_type_hints(Limits, include_extras=True)
    options = [
        inspect.Parameter(field.name, own[0].kind, default=field.default, annotation=hints[field.name])
        for field in fields(Limits)
    ]
    command.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in [*own, *options]}
    return command


@_with_limits
def serve(
    model: ModelOption,
    port: PortOption = 8000,
    host: HostOption = "127.0.0.1",
    engine: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(help="Use vLLM's own server instead, which has no page (vllm)."),
    ] = "transformers",
    name: Annotated[
        str | None, typer.Option(help="Model name in requests; default: the folder's name.")
    ] = None,
    api_key_file: KeysOption = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Data type of the weights; auto: as stored."),
    ] = "auto",
    quantize: QuantizeOption = None,
    device: Annotated[str | None, typer.Option(help="Default: the accelerator, if there is one.")] = None,
    prefix_cache: Annotated[
        float, typer.Option(min=0, help="Memory for keys and values of earlier prompts, in GB.")
    ] = _PREFIX_CACHE_GB,
    vllm: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- VLLM_OPTIONS", help="With --engine vllm: options of vLLM's server."),
    ] = None,
    **limits: Any,
) -> None:
    """Serve a model behind OpenAI's chat API, with a page for the browser at /."""
    name = name or Path(model).resolve().name
    api_keys = _api_keys(api_key_file, host)
    if engine == "vllm":
        from solo_vlm.serve.vllm import check_design, check_ends, exec_vllm, vllm_command

        if device or quantize or prefix_cache not in (0, _PREFIX_CACHE_GB):
            raise SoloError(
                "--engine vllm supports neither --device nor --quantize, and --prefix-cache only as 0"
            )
        check_design(model)
        check_ends(model)
        command = vllm_command(model, name, host, port, Limits(**limits), dtype, prefix_cache > 0)
        exec_vllm([*command, *(vllm or [])], api_keys)
    if vllm:
        raise SoloError(f"options after -- require --engine vllm: {' '.join(vllm)}")

    def on_ready(url: str) -> None:
        STDERR.print(f"{name}: API at {url}/v1 and page at {url}")

    options = {"dtype": dtype, "device": device, "quantize": quantize}
    _serve(model, options, prefix_cache, name, host, port, Limits(**limits), api_keys, on_ready)


def web(
    model: ModelOption,
    port: PortOption = 7860,
    host: HostOption = "127.0.0.1",
    max_image_mib: Annotated[int, typer.Option(min=1, help="Maximum MiB per image file.")] = 20,
    max_megapixels: Annotated[
        int, typer.Option(min=1, help="Maximum megapixels of a chat's images together.")
    ] = 100,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer.")] = 1024,
    api_key_file: KeysOption = None,
    quantize: QuantizeOption = None,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in the browser.")
    ] = True,
) -> None:
    """Serve a model and open its page in the browser: drop an image, see its patches, chat about it."""
    limits = Limits(
        max_image_bytes=max_image_mib * 2**20,
        max_request_bytes=max(
            Limits.max_request_bytes, 4 * max_image_mib * 2**20
        ),  # three such images in base64
        max_pixels=max_megapixels * 10**6,
        max_tokens=max_new_tokens,
        max_drain_seconds=5.0,
    )

    def on_ready(url: str) -> None:
        STDOUT.print(f"solo web: {url}  (press Ctrl-C to stop)")
        if open_browser:  # in a thread, because a text browser blocks until it is closed
            Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    name, api_keys = "/".join(Path(model).parts[-2:]), _api_keys(api_key_file, host)
    _serve(model, {"quantize": quantize}, _PREFIX_CACHE_GB, name, host, port, limits, api_keys, on_ready)


def _serve(model: str, options: dict[str, Any], prefix_cache: float, *arguments: Any) -> None:
    """Load the model with some options and pass the others to `serve_model`."""
    quiet_libraries()
    try:
        from solo_vlm.serve.server import serve_model
    except ModuleNotFoundError as error:
        raise SoloError(f"the server needs {error.name}: pip install 'solo-vlm[serve]'") from error
    from solo_vlm.generate import GenerationPipeline, PrefixCache

    def load() -> GenerationPipeline:
        cache = PrefixCache(int(prefix_cache * 1e9)) if prefix_cache else None
        return GenerationPipeline.from_pretrained(model, prefix_cache=cache, **options)

    serve_model(load, *arguments)


def _api_keys(file: Path | None, host: str) -> list[str]:
    """Read the API keys from the file, or else from the environment. Warn about an open server."""
    if file is None:
        keys = [key] if (key := os.environ.get(_KEY_VARIABLE, "").strip()) else []
    else:
        try:
            keys = file.read_text(encoding="utf-8-sig").split()
        except (OSError, UnicodeDecodeError) as error:
            raise SoloError(f"cannot read API keys from {file}: {error}") from error
        if not keys:
            raise SoloError(f"{file} has no API key: write one per line")
    if not keys and host not in _LOOPBACK:
        warning = f"anyone who can reach {host} may use this server: set {_KEY_VARIABLE} or --api-key-file"
        STDERR.print(warning, style="yellow")
    return keys
