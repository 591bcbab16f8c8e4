"""Run every ablation of the package in one root folder, where they share identical runs.

    python benchmarks/ablations.py [NAME ...] [--root runs/ablations] [--seeds 3] [--processes 2] [--out FILE]
    python benchmarks/ablations.py --out FILE --markdown

A repeated command resumes, and its times cover the remaining work only. With names, only those ablations run,
and FILE keeps its reports of the others. The second command prints the tables of the documentation without
running anything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow.parquet as pq
from environment import environment

from solo_vlm.experiments.ablations.report import COLUMNS, result_lines, write_report
from solo_vlm.experiments.ablations.run import run_ablation
from solo_vlm.experiments.ablations.settings import Ablation, list_ablations
from solo_vlm.models.inspect import summarize_image
from solo_vlm.models.solo.image_loading_solo import load_image
from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor
from solo_vlm.train.metrics import progress_bar

STAGES = ("stage1", "stage2", "stage3", "sft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--root", default="runs/ablations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the results there, as JSON")
    parser.add_argument("--plots", type=Path, help="also copy the plots there, as ablation-NAME.png")
    parser.add_argument("--markdown", action="store_true", help="print the tables of FILE, given as --out")
    arguments = parser.parse_args()
    if arguments.markdown:
        for report in json.loads(arguments.out.read_text())["reports"].values():
            print(markdown(report))
        return
    started = time.perf_counter()
    reports = {name: run(name, arguments) for name in arguments.names or list_ablations()}
    if arguments.names and arguments.out and arguments.out.is_file():
        reports = json.loads(arguments.out.read_text())["reports"] | reports
    results = {
        "seconds": round(time.perf_counter() - started),
        "training_seconds": training_seconds(Path(arguments.root)),
        "num_image_tokens": {stage: mean_image_tokens(Path(arguments.root), stage) for stage in STAGES},
        "processes": arguments.processes,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "environment": environment(),
        "reports": reports,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    ablation = Ablation.load(name, root=arguments.root, seeds=arguments.seeds)
    with progress_bar() as progress:
        report, folder = run_ablation(ablation, progress, processes=arguments.processes)
    write_report(report, folder)
    if arguments.plots:
        shutil.copyfile(folder / "plot.png", arguments.plots / f"ablation-{name}.png")
    return report.as_dict()


def mean_image_tokens(root: Path, stage: str) -> float:
    """Return the mean number of tokens per image at native resolution, with separators."""
    rows = pq.read_table(root / "data" / f"{stage}.parquet", columns=["images"])["images"].to_pylist()
    images = [load_image(image["bytes"]) for row in rows for image in row]
    return mean(summarize_image(image, SoloImageProcessor()).tokens for image in images)


def training_seconds(root: Path) -> int:
    """Return the training time of all runs, including those of earlier invocations."""
    manifests = [json.loads(path.read_text()) for path in root.glob("runs/*/manifest.json")]
    return round(sum(manifest["outcome"]["seconds"] for manifest in manifests))


def markdown(report: dict[str, Any]) -> str:
    """Format the results of an ablation as a Markdown table."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *result_lines(report)]
    return "\n".join([f"{report['ablation']}\n", *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


if __name__ == "__main__":
    main()
