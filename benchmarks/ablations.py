"""Run every ablation of the package in one root folder, where they share identical runs.

    python benchmarks/ablations.py [NAME ...] [--root FOLDER] [--seeds N] [--processes 2] [--out FILE]
    python benchmarks/ablations.py --out FILE --markdown

A repeated command resumes, and its times cover the remaining work only. With names, or paths, only those
ablations run, and FILE keeps its reports of the others. The second command prints the tables of the
documentation without running anything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow.parquet as pq
from environment import environment, publish
from PIL import Image

from solo_vlm.experiments.ablations.pipeline import all_stages, build_pipelines
from solo_vlm.experiments.ablations.report import (
    COLUMNS,
    EFFECT_COLUMNS,
    effect_lines,
    result_lines,
    write_report,
)
from solo_vlm.experiments.ablations.run import run_ablation
from solo_vlm.experiments.ablations.settings import Ablation, AblationSettings, list_ablations
from solo_vlm.models.inspect import summarize_image
from solo_vlm.models.solo.image_loading_solo import load_image
from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor
from solo_vlm.train.metrics import progress_bar

KINDS = ("stage1", "stage2", "stage3", "sft", "grids")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--root", help="default: the ablations' own")
    parser.add_argument("--seeds", type=int, help="default: the ablations' own")
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
    given = {"root": arguments.root, "seeds": arguments.seeds}
    given = {key: value for key, value in given.items() if value}
    ablations = {name: Ablation.load(name, **given) for name in arguments.names or list_ablations()}
    reports = {name: run(name, ablation, arguments) for name, ablation in ablations.items()}
    if arguments.names and arguments.out and arguments.out.is_file():
        reports = json.loads(arguments.out.read_text())["reports"] | reports
    results = {
        "seconds": round(time.perf_counter() - started),
        "training_seconds": training_seconds(ablations.values()),
        "num_image_tokens": mean_image_tokens(next(iter(ablations.values())).settings),
        "processes": arguments.processes,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "environment": environment(),
        "reports": reports,
    }
    publish(results, as_json=False, out=arguments.out)


def run(name: str, ablation: Ablation, arguments: argparse.Namespace) -> dict[str, Any]:
    with progress_bar() as progress:
        report, folder = run_ablation(ablation, progress, processes=arguments.processes)
    write_report(report, folder)
    if arguments.plots:
        shutil.copyfile(folder / "plot.png", arguments.plots / f"ablation-{name.replace('/', '-')}.png")
    return report.as_dict()


def mean_image_tokens(settings: AblationSettings) -> dict[str, float]:
    """Return the mean number of tokens per toy image at native resolution, with separators, by stage."""
    return {
        kind: mean(summarize_image(image, SoloImageProcessor()).tokens for image in images(settings, kind))
        for kind in KINDS
        if getattr(settings.toy_data, kind, 0)
    }


def images(settings: AblationSettings, kind: str) -> Iterator[Image.Image]:
    path = Path(settings.root) / "data" / f"{kind}.parquet"
    for row in pq.read_table(path, columns=["images"])["images"].to_pylist():
        for image in row:
            yield load_image(image["bytes"])


def training_seconds(ablations: Iterable[Ablation]) -> int:
    """Return the training time of all runs, including those of earlier invocations."""
    pipelines = [pipeline for ablation in ablations for pipeline in build_pipelines(ablation)]
    folders = [stage.folder for stage in all_stages(pipelines) if stage.run]
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
    return round(sum(manifest["outcome"]["seconds"] for manifest in manifests))


def markdown(report: dict[str, Any]) -> str:
    """Format the results of an ablation as Markdown tables."""
    text = f"{report['ablation']}\n\n{table(COLUMNS, result_lines(report))}"
    effects = list(effect_lines(report))
    return text + (f"\n{table(EFFECT_COLUMNS, effects)}" if effects else "")


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    main()
