"""Run the toy sweep from data to law: its time, the fitted law, and the prediction of a larger run.

    python benchmarks/scaling_sweep.py [--root runs/sweep-toy] [--processes 2] [--out FILE]

A root with finished runs is resumed, and the times cover the remaining runs only.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import pyarrow.parquet as pq
from environment import environment

from solo_vlm.cli.scaling import fit_and_plot
from solo_vlm.experiments.scaling.sweep import SweepSettings, run_sweep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs/sweep-toy"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON")
    arguments = parser.parse_args()
    started = time.perf_counter()
    settings = SweepSettings.load("sweeps/toy", [f"root={arguments.root}"])
    table = run_sweep(
        settings, arguments.processes, progress=lambda name, done, total: print(name, done, total, flush=True)
    )
    facts = fit_and_plot(table, arguments.root / "fit.json", arguments.root / "plots").as_dict()
    rows = [{k: v for k, v in row.items() if k != "recipe"} for row in pq.read_table(table).to_pylist()]
    results = {
        "seconds": round(time.perf_counter() - started, 1),
        "processor_seconds": round(
            sum(map(_processor_seconds, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
        ),
        "processes": arguments.processes,
        "law": facts,
        "runs": rows,
        "environment": environment(),
    }
    print(json.dumps({key: results[key] for key in ("seconds", "processor_seconds", "law")}))
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


def _processor_seconds(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
