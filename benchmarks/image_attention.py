"""Time of bidirectional images relative to causal attention, in a packed row.

    python benchmarks/image_attention.py [--tokens 32768] [--vision 0.54] [--layers 2] [--json] [--out FILE]

Documents of 200 to 2,000 tokens, each with one image, fill a row; the images make up the given share of its
tokens. Forward and backward pass of decoder layers in the shape of SmolLM2-135M (on CUDA: of Mistral-7B in
bfloat16), and of attention alone: causal, bidirectional by two causal parts, and by dense masks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from environment import environment, publish
from torch import Tensor
from transformers import AutoModel, LlamaConfig, MistralConfig

from solo_vlm.models.packed import attention
from solo_vlm.models.packed.isolation import isolate_documents

CUDA = torch.cuda.is_available()
REPEATS = 5


def make_row(tokens: int, vision: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the cumulative lengths of documents, and the image of each patch (-1 for text)."""
    generator = torch.Generator().manual_seed(seed)
    bounds, images = [0], torch.full((tokens,), -1)
    while bounds[-1] < tokens:
        length = min(int(torch.randint(200, 2001, (), generator=generator)), tokens - bounds[-1])
        patches = round(length * vision)
        start = bounds[-1] + int(torch.randint(length - patches + 1, (), generator=generator))
        images[start : start + patches] = len(bounds) - 1
        bounds.append(bounds[-1] + length)
    return torch.tensor(bounds), images


def seconds(run: Callable[[], Any]) -> float:
    """Return the time of a call."""
    started = time.perf_counter()
    run()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def make_decoder(layers: int) -> Any:
    if CUDA:
        config: Any = MistralConfig(num_hidden_layers=layers, sliding_window=None, vocab_size=64)
    else:
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=2**20,
        )
    decoder = AutoModel.from_config(config, dtype=torch.bfloat16 if CUDA else torch.float32).train()
    isolate_documents(decoder)
    return decoder.to("cuda" if CUDA else "cpu")


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return seconds by part and variant."""
    device = "cuda" if CUDA else "cpu"
    bounds, images = (part.to(device) for part in make_row(arguments.tokens, arguments.vision))
    decoder = make_decoder(arguments.layers)
    config = decoder.config
    dtype = decoder.dtype
    positions = torch.arange(arguments.tokens, device=device)
    positions = positions - bounds[torch.bucketize(positions, bounds, right=True) - 1]
    hidden = torch.randn(1, arguments.tokens, config.hidden_size, device=device, dtype=dtype)
    head_dim = config.hidden_size // config.num_attention_heads
    states = [
        torch.randn(1, heads, arguments.tokens, head_dim, device=device, dtype=dtype, requires_grad=True)
        for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    ]
    row = {"cu_seq_lens_q": bounds.int(), "max_length_q": int(bounds.diff().max())}

    def attend(index: Tensor | None) -> None:
        attended, _ = attention.packed_attention(None, *states, None, image_index=index, **row)
        torch.autograd.grad(attended.sum(), states)

    def step(index: Tensor | None) -> None:
        options = {} if index is None else {"image_index": index}
        output = decoder(
            inputs_embeds=hidden, position_ids=positions[None], use_cache=False, **row, **options
        ).last_hidden_state
        output.sum().backward()

    def by_masks(run: Callable[[Tensor | None], None]) -> None:
        with patch.object(attention, "_merges_images", return_value=False):
            run(images[None])

    results: dict[str, dict[str, float]] = {}
    for part, run in (("attention", attend), ("decoder layers", step)):
        variants = {
            "causal": partial(run, None),
            "bidirectional": partial(run, images[None]),
            "dense masks": partial(by_masks, run),
        }
        # In turns, so that other work on the machine slows all of them; the first round is a warm-up.
        rounds = [{name: seconds(call) for name, call in variants.items()} for _ in range(REPEATS + 1)][1:]
        results[part] = {name: statistics.median(taken[name] for taken in rounds) for name in variants}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--vision", type=float, default=0.54, help="share of image tokens")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write it to a file")
    arguments = parser.parse_args()
    results = {"environment": environment(), "tokens": arguments.tokens, "seconds": measure(arguments)}
    publish(results, arguments.json, arguments.out)
    if not arguments.json:
        for part, times in results["seconds"].items():
            for name, value in times.items():
                print(f"{part:16} {name:14} {value:8.3f} s {value / times['causal']:6.2f} x")


if __name__ == "__main__":
    main()
