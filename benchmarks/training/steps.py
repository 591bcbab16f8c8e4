"""Whole training steps of all variants, alternately."""

from __future__ import annotations

import statistics
import sys
from functools import partial
from typing import Any

from training.machine import in_fresh_process, peak_flops, seconds
from training.variants import FULL_LOGITS, LLAVA, NAMES, OURS, PADDED, SHAPE, make_variants
from training.workload import Workload, supervised_share

from solo_vlm.models.flops import ModelShape
from solo_vlm.train.metrics import memory_gb
from solo_vlm.train.parallel.context import init_distributed


def measure(workload: Workload, precision: str, warmup: int, rounds: int) -> dict[str, Any]:
    """Return speed and memory of all variants, and their data."""
    memory = {name: in_fresh_process(_peak_memory, workload, precision, name) for name in NAMES}
    taken, variants, peak = in_fresh_process(_take_turns, workload, precision, warmup, rounds)
    _, documents = workload.draw()
    lengths = [len(document) for document in documents]
    tokens, patches = sum(lengths), sum(len(document.pixel_values) for document in documents)

    def over(name: str) -> float:
        return statistics.median(other / ours for other, ours in zip(taken[name], taken[OURS], strict=True))

    metrics = {}
    for name in NAMES:
        step = statistics.median(taken[name])
        metrics[name] = {
            "step_seconds": step,
            "samples_per_second": len(lengths) / step,
            "peak_memory_gb": memory[name],
            **variants[name],
            **({} if name == LLAVA else {"tokens_per_second": tokens / step}),
            **({"mfu": variants[name]["flops"] / step / peak} if peak else {}),
        }
    return {
        "tokens_per_second": tokens / statistics.median(taken[OURS]),
        "speedup_over_padded": over(PADDED),
        "speedup_over_full_logits": over(FULL_LOGITS),
        "samples_per_second_over_llava": over(LLAVA),
        "variants": metrics,
        "workload": {
            "parameters": ModelShape.of(workload.config(SHAPE)).parameters.total,
            "precision": precision,
            "rounds": rounds,
            "samples": len(lengths),
            "tokens": tokens,
            "tokens_per_sample": tokens / len(lengths),
            "vision_share": patches / tokens,
            "supervised_share": supervised_share(documents),
            "rows_of_padded_batches": workload.rows,
            "padding_share": 1 - tokens / variants[PADDED]["slots"],
            **workload.of_many_batches(),
        },
    }


def _take_turns(
    workload: Workload, precision: str, warmup: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, int]], float | None]:
    """Return seconds of each variant's steps, its slots and FLOPs, and the device's peak FLOPs per second."""
    recipe = workload.recipe(precision=precision)
    taken: dict[str, list[float]] = {name: [] for name in NAMES}
    with init_distributed(recipe) as context:
        variants = make_variants(NAMES, workload, recipe, context)
        for turn in range(warmup + rounds):
            for name, variant in variants.items():
                variant.prepare()
                step = seconds(partial(variant.step, recipe, context), context.device)
                print(f"round {turn - warmup + 1}: {name} {step:.2f} s", file=sys.stderr)
                if turn >= warmup:
                    taken[name].append(step)
        costs = {name: {"slots": variant.slots, "flops": variant.flops} for name, variant in variants.items()}
        return taken, costs, peak_flops(context.device)


def _peak_memory(workload: Workload, precision: str, name: str) -> float:
    """Return the peak gigabytes of a process that runs one step."""
    recipe = workload.recipe(precision=precision)
    with init_distributed(recipe) as context:
        variant = make_variants([name], workload, recipe, context)[name]
        variant.prepare()
        variant.step(recipe, context)
        return memory_gb(context.device)
