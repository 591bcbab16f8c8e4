"""Benchmarks by name: the paper's six and the usual ones beside them."""

from __future__ import annotations

from solo_vlm.evaluate.benchmarks.hallusion_bench import HALLUSION_BENCH
from solo_vlm.evaluate.benchmarks.mathvista import MATHVISTA
from solo_vlm.evaluate.benchmarks.mmbench import MMBENCH
from solo_vlm.evaluate.benchmarks.mme import MME
from solo_vlm.evaluate.benchmarks.mmmu import MMMU
from solo_vlm.evaluate.benchmarks.multiple_choice import (
    AI2D,
    AI2D_NO_MASK,
    MMSTAR,
    REALWORLDQA,
    SCIENCEQA,
    SCIENCEQA_FULL,
    SEEDBENCH,
)
from solo_vlm.evaluate.benchmarks.pope import POPE
from solo_vlm.evaluate.benchmarks.short_answers import CHARTQA, DOCVQA, INFOVQA, OCRBENCH, TEXTVQA, VQAV2
from solo_vlm.evaluate.scoring.score import Benchmark
from solo_vlm.utils.errors import SoloError, did_you_mean

PAPER = ("mmstar", "mme", "seedbench", "ai2d", "scienceqa", "mathvista")
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        *(MMSTAR, MME, SEEDBENCH, AI2D, AI2D_NO_MASK, SCIENCEQA, SCIENCEQA_FULL, MATHVISTA),
        *(POPE, MMMU, CHARTQA, DOCVQA, INFOVQA, TEXTVQA, VQAV2, OCRBENCH),
        *(REALWORLDQA, HALLUSION_BENCH, MMBENCH),
    )
}


def get(name: str) -> Benchmark:
    """Return the benchmark of a name.

    Raises:
        SoloError: The name is unknown; the message suggests the nearest one and lists all.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    hint = did_you_mean(name, BENCHMARKS)
    raise SoloError(f"unknown benchmark {name}{hint} (available: {', '.join(BENCHMARKS)})")
