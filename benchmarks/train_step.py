"""Speed and memory of a training step, compared with padded batches, full logits and LLaVA.

    python benchmarks/train_step.py [--parts steps loss 7b qlora] [--json] [--out FILE] [--plot FILE]

Samples are captioned photographs. A model of SmolLM2-135M's shape with random weights (bfloat16 over float32
weights) runs whole steps, forward, backward and optimizer, on the same samples each time:

- packed: as in `solo train`, documents in one row, logits in chunks and only at supervised positions;
- packed_full_logits: the same, but with logits at all positions;
- padded: one sample per row, padded to the longest, logits at all positions, as in the original code;
- llava: transformers' LLaVA with a frozen CLIP-L/336 encoder before the same decoder, in padded batches.

The variants alternate; results are medians of the rounds, and ratios are taken within a round. Peak memory is
that of a new process that runs one step. Tokens are those of documents, without padding; LLaVA, whose images
have other tokens, is compared by samples. Reading images is not part of a step.

Parts: "steps", the above; "loss", the memory of the loss alone; and, on a CUDA GPU, "7b": as many layers of
the paper's 7B model as fit, on packed sequences of 32,768 tokens; "qlora": all layers of that model in 4
bits, by `recipes/presets/lora.yaml`, within 24 GB (`--memory-gb`). With `--out`, each part is written when it
is done, and merged with the results of earlier calls, so that parts can be measured in separate calls;
`--parts` without a name measures nothing and only plots and prints. `mfu` is that of the fastest 7B
configuration, else of "packed".
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from environment import environment
from training import loss_memory, qlora, seven_b, steps
from training.machine import this_device
from training.plot import draw
from training.workload import Workload
from transformers.utils import logging

from solo_vlm.utils.files import write_text

Results = dict[str, Any]
PARTS = ("steps", "loss", "7b", "qlora")


def measure(arguments: argparse.Namespace, earlier: Results) -> Iterator[Results]:
    """Yield the results of each part as soon as they are known."""
    workload = Workload.of_tiny() if arguments.tiny else Workload(arguments.samples)
    if "steps" in arguments.parts:
        yield steps.measure(workload, arguments.precision, arguments.warmup, arguments.rounds)
    if "loss" in arguments.parts:
        full_tokens = min(arguments.full_logits_tokens, workload.length)
        yield loss_memory.measure(workload, full_tokens, arguments.precision)
    if "7b" in arguments.parts:
        started = time.monotonic()
        measured = earlier.get("seven_b", {})
        for name in arguments.configurations:
            if time.monotonic() - started < 60 * arguments.minutes:
                measured[name] = seven_b.measure(workload, name, arguments.warmup, arguments.rounds)
                yield {"seven_b": measured}
    if "qlora" in arguments.parts:
        metrics = qlora.measure(workload, arguments.memory_gb, arguments.warmup, arguments.rounds)
        yield {"qlora": {"nf4": metrics}}


def with_mfu(results: Results) -> Results:
    """Return the results with the model FLOPs utilization, if the device is known."""
    seven = [metrics["mfu"] for metrics in results.get("seven_b", {}).values() if "mfu" in metrics]
    small = results.get("variants", {}).get("packed", {}).get("mfu")
    mfu = max(seven, default=small)
    return results if mfu is None else {**results, "mfu": mfu}


def describe(device: torch.device) -> dict[str, Any]:
    """Return the number of threads, or the GPU, which `environment` does not include."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return {"device": "cpu", "threads": torch.get_num_threads()}


def show(results: Results) -> None:
    """Print results as plain lines, with tables for nested ones."""
    for name, value in results.items():
        if not isinstance(value, dict):
            print(f"{name:34} {value:,.3f}")
            continue
        print(name)
        for inner, metrics in value.items():
            row = metrics.items() if isinstance(metrics, dict) else [("", metrics)]
            cells = (
                f"{key} {cell:,.4g}" if isinstance(cell, float) else f"{key} {cell}" for key, cell in row
            )
            print(f"  {inner:32}", "  ".join(cells))


def parse() -> argparse.Namespace:
    on_gpu = this_device().type != "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--parts", nargs="*", choices=PARTS, help="default: all that the machine supports")
    add("--samples", type=int, default=112 if on_gpu else 8, help="samples per step (112 on a GPU, else 8)")
    add("--rounds", type=int, default=10 if on_gpu else 5, help="measured rounds (10 on a GPU, else 5)")
    add("--warmup", type=int, default=3 if on_gpu else 1, help="warm-up rounds (3 on a GPU, else 1)")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="precision, as in recipes (bf16)")
    add(
        "--full-logits-tokens",
        type=int,
        default=32_768 if on_gpu else 8_192,
        help="tokens over which full logits are held; their memory is scaled to 32,768\n"
        "(32,768 on a GPU, else 8,192)",
    )
    add("--configurations", nargs="+", choices=seven_b.CONFIGURATIONS, help="configurations of part 7b (all)")
    add(
        "--minutes",
        type=float,
        default=8,
        help="minutes after which part 7b starts no configuration (8)",
    )
    add("--memory-gb", type=float, default=24, help="memory that part qlora may use (24)")
    add("--tiny", action="store_true", help="tiny models and few samples, to test the benchmark itself")
    add("--json", action="store_true", help="print one JSON object")
    add("--out", type=Path, metavar="FILE", help="JSON file, extended part by part")
    add("--plot", type=Path, metavar="FILE", help="plot, as .svg or .png")
    arguments = parser.parse_args()
    if arguments.parts is None:
        arguments.parts = PARTS if on_gpu else PARTS[: 3 if arguments.tiny else 2]
    elif {"7b", "qlora"} & set(arguments.parts) and not (on_gpu or arguments.tiny):
        parser.error("parts 7b and qlora need a CUDA GPU")
    if arguments.configurations is None:
        arguments.configurations = ["full"] if arguments.tiny else seven_b.CONFIGURATIONS
    if arguments.tiny:
        arguments.rounds, arguments.warmup = 1, 1
    return arguments


def main() -> None:
    arguments = parse()
    logging.set_verbosity_error()
    results: Results = {}
    if arguments.out and arguments.out.exists():
        results = json.loads(arguments.out.read_text())
    if arguments.parts:
        results["environment"] = {**environment(), **describe(this_device())}
    for part in measure(arguments, results):
        results = with_mfu(results | part)
        if arguments.out:
            write_text(arguments.out, json.dumps(results, indent=2) + "\n")
    if arguments.plot:
        draw(results, arguments.plot)
    if arguments.json:
        print(json.dumps(results))
    else:
        show(results)


if __name__ == "__main__":
    main()
