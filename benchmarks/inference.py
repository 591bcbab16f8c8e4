"""Inference speed: repeated questions about one image, and comparisons with LLaVA and the memory bandwidth.

    python benchmarks/inference.py [--parts compute prefix compiled speed] [--json] [--out FILE]

Models have random weights. The decoder has the shape of SmolLM2-135M on a CPU (float32), and that of the
paper's 7B model on a GPU (bfloat16).

- prefix: ten questions about one image of 1024 x 1024 pixels, each answered by two pipelines of the same
  model, with and without a prefix cache, alternately. `prefix_speedup` is the ratio of their times for short
  answers (8 tokens), including reading the image; results for longer answers are listed, too.
  `prefix_same_answers` is true if all answers agree.
- compiled: the same questions with and without `--compile` (on a GPU, CUDA graphs), and the longest answers.
  `compile_speedup` is the ratio of times after a first round, in which the decoding step is compiled.
- compute: FLOPs until the first token, counted, not timed. `flops_over_llava` is LLaVA's divided by SOLO's.
- speed: seconds to the first token, and tokens per second after it, for square images of several sizes and
  batches of several chats, alternating with transformers' LLaVA with CLIP-L/336 and an equal decoder.
  `ttft_over_llava` and `decode_over_llava` (by image size, for one chat at a time) are LLaVA's time divided
  by SOLO's: above 1, SOLO is faster. Image preprocessing is excluded for both. `share_of_bandwidth` compares
  a decoding step with the time to read its weights, keys and values once.

Results are medians of the rounds; ratios are taken within a round. With `--out`, each part is written when it
is done, and merged with the results of earlier calls, such as other batches.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from answering import compiled, compute, prefix, speed
from answering.models import Setting
from environment import environment
from training.machine import this_device
from transformers.utils import logging

from solo_vlm.utils.files import write_text

PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "compute": compute.measure,
    "prefix": prefix.measure,
    "compiled": compiled.measure,
    "speed": speed.measure,
}


def parse() -> argparse.Namespace:
    on_gpu = this_device().type != "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(all)")
    add("--shape", choices=("smollm2-135m", "solo-7b"), default="solo-7b" if on_gpu else "smollm2-135m")
    add(
        "--sizes",
        nargs="+",
        type=int,
        default=[336, 512, 768, 1024],
        help="sides of the images (336 to 1024)",
    )
    add("--batches", nargs="+", type=int, default=[1, 4, 16], help="chats per batch (1, 4 and 16)")
    add("--rounds", type=int, default=10 if on_gpu else 3, help="measured rounds (10 on a GPU, else 3)")
    add("--answers", nargs="+", type=int, default=[8, 16, 32], help="tokens per answer (8, 16 and 32)")
    add("--tiny", action="store_true", help="tiny models, to test the benchmark itself")
    add("--json", action="store_true", help="print one JSON object")
    add("--out", type=Path, metavar="FILE", help="JSON file, extended part by part")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    logging.set_verbosity_error()
    device = this_device()
    setting = Setting(
        arguments.shape,
        device,
        torch.float32 if device.type == "cpu" else torch.bfloat16,
        tuple(arguments.sizes),
        tuple(arguments.batches),
        arguments.rounds,
        tuple(arguments.answers),
        arguments.tiny,
    )
    results: dict[str, Any] = {}
    if arguments.out and arguments.out.exists():
        results = json.loads(arguments.out.read_text())
    results["environment"] = {
        **environment(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "shape": setting.shape,
        "dtype": str(setting.dtype).removeprefix("torch."),
    }
    for name in arguments.parts:
        _add(results, PARTS[name](setting))
        if arguments.out:
            write_text(arguments.out, json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=None if arguments.json else 2))


def _add(results: dict[str, Any], part: dict[str, Any]) -> None:
    """Merge the results of a part into those of the same name."""
    for name, figure in part.items():
        earlier = results.get(name)
        results[name] = {**earlier, **figure} if isinstance(earlier, dict) else figure


if __name__ == "__main__":
    main()
