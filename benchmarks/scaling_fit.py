"""Fit scaling laws to data drawn from published laws: coverage of the 95% intervals, and time per fit.

    python benchmarks/scaling_fit.py [--draws 100] [--out FILE]

Each draw has 250 runs of 6e18 to 3e21 FLOPs, as in Hoffmann et al. 2022, with models of 0.2 to 5 times the
optimal size. Their losses follow a published law with log-normal noise. A parameter is covered if its 95%
interval contains the true value.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment

from solo_vlm.experiments.scaling.laws import ScalingLaw, fit_scaling_law

LAWS = {
    "hoffmann_2022": ScalingLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
    "besiroglu_2024": ScalingLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658),
}


def runs(law: ScalingLaw, seed: int, points: int = 250, noise: float = 0.01) -> tuple[np.ndarray, ...]:
    """Draw runs from a law: parameters, tokens and losses, (points,) each."""
    rng = np.random.default_rng(seed)
    flops = np.exp(rng.uniform(np.log(6e18), np.log(3e21), points))
    best = np.array([law.optimum(c).n for c in flops])
    n = best * np.exp(rng.uniform(-np.log(5), np.log(5), points))
    d = flops / (6 * n)
    return n, d, law.loss(n, d) * np.exp(noise * rng.standard_normal(points))


def coverage(law: ScalingLaw, draws: int, noise: float) -> dict[str, Any]:
    """Count the draws whose intervals cover each parameter, and all five; time the fits."""
    names = ("E", "A", "B", "alpha", "beta", "a", "b")
    covered, seconds = [], []
    for seed in range(draws):
        data = runs(law, seed, noise=noise)
        started, worked = time.perf_counter(), time.process_time()
        intervals = fit_scaling_law(*data).intervals
        seconds.append((time.perf_counter() - started, time.process_time() - worked))
        covered.append([intervals[name][0] <= getattr(law, name) <= intervals[name][1] for name in names])
    table = np.array(covered)
    wall, processor = np.median(seconds, axis=0)
    return {
        "draws": draws,
        "noise": noise,
        "covered": dict(zip(names, map(int, table.sum(0)), strict=True)),
        "all_five_covered": int(table[:, :5].all(1).sum()),
        "median_seconds": wall,
        "median_processor_seconds": processor,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for name, law in LAWS.items():
        results[name] = coverage(law, arguments.draws, noise=0.01)
        print(name, json.dumps(results[name]), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({**results, "environment": environment()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
