"""Report on the model of `recipes/cifar10`: scores, confusion matrix, learning curve, sample answers.

    python examples/cifar10/report.py [--root runs/cifar10] [--out runs/cifar10/report]

Asks `ROOT/sft/model` the held-out questions; a repeated command resumes. Writes `report.json` (exact-match
accuracies with Wilson's 95% intervals, and how the model was trained), `confusion.png`, `curve.png` and
`answers.png`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.progress import Progress
from scipy.stats import binomtest

from solo_vlm.evaluate.held_out import answer_questions, read_questions
from solo_vlm.generate import GenerationPipeline
from solo_vlm.train.metrics import read_metrics
from solo_vlm.train.run_folder import read_manifest_recipe
from solo_vlm.utils.files import new_file
from solo_vlm.utils.json_lines import LinesFile
from solo_vlm.utils.pages import save_figure

KINDS = ("name", "kind", "yes_no")
SHOWN = 24
Record = dict[str, Any]


def ask(pipeline: GenerationPipeline, data: Path, answers: Path, progress: Progress) -> list[Record]:
    """Answer every held-out question of a file."""
    questions = read_questions(data)
    with LinesFile(answers) as file:
        records = file.records
        task = progress.add_task(data.stem, total=len(questions), completed=len(records))
        for batch in answer_questions(questions[len(records) :], pipeline):
            new = [
                {"reference": a.reference, "answer": a.answer.strip(), "correct": a.correct} for a in batch
            ]
            file.append(new)
            records += new
            progress.update(task, completed=len(records))
    return records


def score(records: Sequence[Record]) -> Record:
    """Return accuracy, its 95% interval, and the number of answers."""
    correct = sum(record["correct"] for record in records)
    interval = binomtest(correct, len(records)).proportion_ci(method="wilson")
    return {"accuracy": correct / len(records), "interval": [interval.low, interval.high], "n": len(records)}


def stages_of(root: Path) -> list[Path]:
    """Return the runs that led to the model, found backwards from the last by their initial models."""
    runs: list[Path] = []
    run = root / "sft"
    while (manifest := run / "manifest.json").exists():
        runs.insert(0, run)
        run = root / Path(read_manifest_recipe(manifest).model).parent
    return runs


def training(run: Path) -> Record:
    """Return environment, outcome and validation losses of a stage."""
    manifest = json.loads((run / "manifest.json").read_text())
    kept = {key: manifest[key] for key in ("commit", "packages", "python", "hardware", "outcome")}
    return {**kept, "validation_loss": held_out_losses(read_metrics(run))}


def held_out_losses(lines: Sequence[Record]) -> dict[int, float]:
    """Return validation losses by step."""
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


def draw_confusion(records: Sequence[Record]) -> Figure:
    """Draw the row-normalized confusion matrix; answers that name no class count as "other"."""
    classes = sorted({record["reference"] for record in records})
    columns = [*classes, "other"]
    counts = np.zeros((len(classes), len(columns)))
    for record in records:
        answer = record["answer"] if record["answer"] in classes else "other"
        counts[classes.index(record["reference"]), columns.index(answer)] += 1
    shares = counts / counts.sum(1, keepdims=True)
    figure = Figure(figsize=(7.5, 6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=7, color="0.1")
    axes.set(xlabel="answer", ylabel="class")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    return figure


def draw_curve(root: Path) -> Figure:
    """Draw training and validation loss of each stage over its steps."""
    runs = stages_of(root)
    figure = Figure(figsize=(4 * len(runs), 3.5), layout="constrained")
    for axes, run in zip(figure.subplots(1, len(runs)), runs, strict=True):
        lines = read_metrics(run)
        axes.plot(
            [line["step"] for line in lines], [line["loss"] for line in lines], linewidth=0.7, alpha=0.6
        )
        held_out = held_out_losses(lines)
        axes.plot(list(held_out), list(held_out.values()), "o-", label="held out")
        axes.legend(frameon=False)
        axes.set(title=run.name, xlabel="step", ylabel="loss (nats per token)", ylim=(0, 2))
    return figure


def draw_answers(data: Path, records: Sequence[Record]) -> Figure:
    """Draw the first images with class and answer."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    shown = zip(figure.subplots(4, SHOWN // 4).flat, read_questions(data), records, strict=False)
    for axes, question, record in shown:
        axes.imshow(question.image)
        axes.set_axis_off()
        color = "black" if record["correct"] else "firebrick"
        axes.set_title(f"{record['reference']}: {record['answer']}", fontsize=7, color=color)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--out", type=Path, help="default: ROOT/report")
    arguments = parser.parse_args()
    root, out = arguments.root, arguments.out or arguments.root / "report"
    pipeline = GenerationPipeline.from_pretrained(root / "sft" / "model")
    files = {kind: root / "data" / f"heldout_{kind}.parquet" for kind in KINDS}
    with Progress() as progress:
        answers = {kind: ask(pipeline, file, out / f"{kind}.jsonl", progress) for kind, file in files.items()}
    report = {
        "scores": {kind: score(records) for kind, records in answers.items()},
        "training": {run.name: training(run) for run in stages_of(root)},
    }
    for name, figure in {
        "confusion": draw_confusion(answers["name"]),
        "curve": draw_curve(root),
        "answers": draw_answers(files["name"], answers["name"]),
    }.items():
        save_figure(figure, out / f"{name}.png")
    with new_file(out / "report.json") as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["scores"]))


if __name__ == "__main__":
    main()
