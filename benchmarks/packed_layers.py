"""Time of a packed row through layers of several kinds: grouped, document by document, by a dense mask.

    python benchmarks/packed_layers.py [--rounds N] [--tokens N] [--json] [--out FILE]

Forward and backward pass of four layers of random weights over one row of documents of 16 to 512 tokens:
Qwen3-Next (gated delta rule, convolution, attention), Nemotron-H (Mamba-2, attention), gpt-oss (attention
with sinks, every other layer in a window) and Gemma 2 (capped scores, every other layer in a window).

- "grouped" is what `solo train` does (`isolate_documents`);
- "each alone" computes one document after the other, with transformers' attention;
- "dense mask" is transformers' attention over the whole row. Recurrent layers have no mask.

The variants alternate; results are medians of the rounds, and ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from environment import environment, publish
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from solo_vlm.check.tiny import tiny_llm
from solo_vlm.models.packed.isolation import isolate_documents

SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "max_position_embeddings": 8192}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": SIZES,
    "nemotron_h": SIZES,
    "gpt_oss": {**SIZES, "sliding_window": 128},
    "gemma2": {**SIZES, "sliding_window": 128},
}
HAS_MASK = ("gpt_oss", "gemma2")


def measure(rounds: int, tokens: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    lengths = draw_lengths(tokens)
    return {
        "tokens": tokens,
        "documents": len(lengths),
        **{family: measure_family(family, lengths, rounds) for family in FAMILIES},
    }


def draw_lengths(tokens: int) -> list[int]:
    """Return lengths from 16 to 512, evenly spread on a logarithmic scale, that fill a row."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        length = int(2 ** (4 + 5 * torch.rand((), generator=generator)))
        lengths.append(min(length, left))
    return lengths


def measure_family(family: str, lengths: list[int], rounds: int) -> dict[str, Any]:
    model = tiny_llm(family, **FAMILIES[family]).train()
    isolated = copy.deepcopy(model)
    isolate_documents(isolated)
    rows = torch.randint(SIZES["vocab_size"], (1, sum(lengths))).split(lengths, 1)
    packed = pack(rows)
    variants: dict[str, Callable[[], None]] = {
        "grouped": partial(step, isolated, [packed]),
        "each alone": partial(step, model, [{"input_ids": row} for row in rows]),
    }
    if family in HAS_MASK:
        dense = {name: packed[name] for name in ("input_ids", "position_ids")}
        variants["dense mask"] = partial(step, model, [dense])
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, run in variants.items():
            start = perf_counter()
            run()
            if turn:  # the first one warms up
                taken[name].append(perf_counter() - start)
    ratios = {
        f"{name} / grouped": statistics.median(
            other / ours for other, ours in zip(times, taken["grouped"], strict=True)
        )
        for name, times in taken.items()
        if name != "grouped"
    }
    return {"seconds": {name: statistics.median(times) for name, times in taken.items()}, **ratios}


def pack(rows: tuple[Tensor, ...]) -> dict[str, Any]:
    """Return a packed row, as `solo_vlm.data.collate.collate` does."""
    lengths = [row.shape[1] for row in rows]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return {
        "input_ids": torch.cat(rows, 1),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def step(model: PreTrainedModel, batches: list[dict[str, Any]]) -> None:
    """Compute gradients of the mean logit of every batch."""
    for batch in batches:
        model(**batch, use_cache=False).logits.mean().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (5)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the row (2048)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    results = {**measure(arguments.rounds, arguments.tokens), "environment": environment()}
    publish(results, arguments.json, arguments.out)
    if arguments.json:
        return
    for name, value in results.items():
        print(f"{name:12}", value)


if __name__ == "__main__":
    main()
