"""Overhead of sharding a small model on one process: per layer, per unit of several layers, and unsharded.

    python benchmarks/sharding.py [--json] [--out FILE]

Whole training steps with a decoder of SmolLM2-135M's 30 layers on one packed sequence. On a CPU, its matrices
are so small, and the sequence so short, that the overhead of Python and torch takes most of the time, on one
thread; on a CUDA GPU it has the size of SmolLM2-135M and 8,192 tokens. "units" is what `solo train` does:
layers are gathered together up to `FSDP_UNIT_SIZE` parameters (solo_vlm.train.parallel.sharding). "whole" is
an unsharded model under autocast.

The variants alternate; results are medians of the rounds, and ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from environment import environment, publish
from training.machine import one_sharded_process, random_model, seconds, this_device
from training.workload import Workload
from transformers.utils import logging

from solo_vlm import SoloForConditionalGeneration
from solo_vlm.data.collate import collate, num_supervised_tokens
from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.train.optimizer import make_optimizer
from solo_vlm.train.parallel.sharding import FSDP_UNIT_SIZE
from solo_vlm.train.trainer import optimizer_step

UNITS = {"layer by layer": 1, "units": FSDP_UNIT_SIZE, "whole": None}  # parameters gathered at once
NARROW = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


def measure(rounds: int, warmup: int) -> dict[str, Any]:
    device = this_device()
    on_gpu = device.type != "cpu"
    torch.set_num_threads(1)
    workload = Workload(1, length=8192 if on_gpu else 64, median=500 if on_gpu else 64)
    decoder = {} if on_gpu else {**NARROW, "head_dim": 12, "vocab_size": 512}
    config = workload.config("smollm2-135m", **decoder)
    recipe = workload.recipe(precision="bf16")
    batches = [collate(workload.sequence(), workload.length, pad_token_id=0)]

    taken: dict[str, list[float]] = {name: [] for name in UNITS}
    with one_sharded_process(recipe) as sharded:
        steps = {}
        for name, unit in UNITS.items():
            context = sharded if unit else replace(sharded, mesh=None, parameter_mesh=None)
            model = random_model(
                SoloForConditionalGeneration, config, recipe, context, unit=unit or FSDP_UNIT_SIZE
            )
            isolate_documents(model)
            optimizer = make_optimizer(model, recipe.optimizer)
            supervised = num_supervised_tokens(batches)
            steps[name] = partial(optimizer_step, model, optimizer, batches, supervised, recipe, context)
        for turn in range(warmup + rounds):
            for name, step in steps.items():
                took = seconds(step, device)
                if turn >= warmup:
                    taken[name].append(took)

    def faster(name: str) -> float:
        pairs = zip(taken["layer by layer"], taken[name], strict=True)
        return statistics.median(layers / other for layers, other in pairs)

    return {
        "units_over_layer_by_layer": faster("units"),
        "whole_over_layer_by_layer": faster("whole"),
        "milliseconds": {name: 1000 * statistics.median(times) for name, times in taken.items()},
        "tokens": workload.length,
        "hidden_size": config.text_config.hidden_size,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="measured rounds (20)")
    parser.add_argument("--warmup", type=int, default=5, help="warm-up rounds (5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    results = {**measure(arguments.rounds, arguments.warmup), "environment": environment()}
    publish(results, arguments.json, arguments.out)
    if arguments.json:
        return
    for name, value in results.items():
        print(f"{name:28}", value if isinstance(value, dict | str) else f"{value:,.3f}")


if __name__ == "__main__":
    main()
