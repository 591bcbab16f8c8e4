"""The paper's benchmarks by name."""

from __future__ import annotations

import difflib

from solo_vlm.evaluate.benchmarks.ai2d import AI2D, AI2D_NO_MASK
from solo_vlm.evaluate.benchmarks.benchmark import Benchmark
from solo_vlm.evaluate.benchmarks.mathvista import MATHVISTA
from solo_vlm.evaluate.benchmarks.mme import MME
from solo_vlm.evaluate.benchmarks.mmstar import MMSTAR
from solo_vlm.evaluate.benchmarks.scienceqa import SCIENCEQA, SCIENCEQA_FULL
from solo_vlm.evaluate.benchmarks.seedbench import SEEDBENCH
from solo_vlm.utils.errors import SoloError

__all__ = ["BENCHMARKS", "PAPER", "Benchmark", "get"]

PAPER = ("mmstar", "mme", "seedbench", "ai2d", "scienceqa", "mathvista")
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (MMSTAR, MME, SEEDBENCH, AI2D, AI2D_NO_MASK, SCIENCEQA, SCIENCEQA_FULL, MATHVISTA)
}


def get(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
        SoloError: there is none; the message has the nearest one and all names.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    near = difflib.get_close_matches(name, BENCHMARKS, n=1)
    hint = f": did you mean {near[0]}?" if near else ""
    raise SoloError(f"no benchmark {name}{hint} (there are {', '.join(BENCHMARKS)})")
