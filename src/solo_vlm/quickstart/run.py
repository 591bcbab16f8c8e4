"""Run the whole recipe: data, LLM, init, stages 1 to 3, fine-tuning, evaluation, report."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

from rich.progress import Progress

from solo_vlm.evaluate.held_out import HeldOutAnswer, accuracy, answer_questions, read_questions
from solo_vlm.generate import GenerationPipeline
from solo_vlm.models.from_llm import from_llm
from solo_vlm.quickstart.data import write_toy_data
from solo_vlm.quickstart.llm import training_texts, write_untrained_llm
from solo_vlm.quickstart.report import write_examples, write_loss_curve, write_report
from solo_vlm.train.metrics import progress_bar, read_metrics
from solo_vlm.train.recipe import Recipe
from solo_vlm.train.trainer import TrainResult, train
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import LOCK, lock_output_dir, remove, write_text, writing

STAGES = ("llm", "stage1", "stage2", "stage3", "sft")
_MARK = "quickstart.json"


def run_quickstart(out: Path, seed: int = 0, fraction: float = 1.0) -> dict[str, Any]:
    """Train, evaluate and report; return the content of `out/metrics.json`.

    Args:
        out: Folder for everything; replaces an earlier quickstart in it.
        seed: Seed of data and training. The same seed gives the same metrics on the same kind of machine.
        fraction: Share of the steps to train.

    Returns:
        `digits_accuracy`, `caption_exact_match`, `qa_accuracy` (all on held-out images), `seconds`,
        `tokens_per_second`, and `stages`: for each its steps, tokens, `loss_first` (of the first step) and
        `loss_last` (mean of the last ten logged losses).

    Raises:
        SoloError: `out` exists and is not from a quickstart.
    """
    _check_output_dir(out)
    with lock_output_dir(out) or nullcontext():
        _empty_output_dir(out)
        return _run(out, seed, fraction)


def _run(out: Path, seed: int, fraction: float) -> dict[str, Any]:
    started = time.perf_counter()
    with progress_bar() as progress:
        task = progress.add_task("data and tokenizer", total=1)
        write_toy_data(out / "data", seed)
        write_untrained_llm(out / "llm-untrained", training_texts(out / "data"), seed)
        progress.update(task, completed=1)
        trained: dict[str, TrainResult] = {}
        for stage in STAGES:
            if stage == "stage1":
                from_llm(out / "llm" / "model", seed=seed).save(out / "init")
            trained[stage] = train(_recipe(stage, out, seed, fraction), progress=progress)
        pipeline = GenerationPipeline.from_pretrained(trained["sft"].model)
        answers = {
            name: _answers(out / "data" / f"heldout_{name}.parquet", pipeline, progress)
            for name in ("digits", "captions", "qa")
        }

    steps = sum(run.metrics["steps"] for run in trained.values())
    tokens = sum(run.metrics["tokens"] for run in trained.values())
    metrics = {
        "digits_accuracy": accuracy(answers["digits"]),
        "caption_exact_match": accuracy(answers["captions"]),
        "qa_accuracy": accuracy(answers["qa"]),
        "seconds": round(time.perf_counter() - started, 1),
        "tokens_per_second": round(tokens / sum(run.metrics["seconds"] for run in trained.values())),
        "steps": steps,
        "tokens": tokens,
        "parameters": pipeline.model.num_parameters(),
        "held_out": {name: len(given) for name, given in answers.items()},
        "stages": {stage: _stage_metrics(out / stage, run) for stage, run in trained.items()},
        "seed": seed,
    }
    write_loss_curve(out / "loss.png", {stage: read_metrics(out / stage) for stage in STAGES})
    write_examples(out / "examples", answers)
    write_report(out / "report.html", metrics, answers, out / "loss.png")
    write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def _check_output_dir(out: Path) -> None:
    """Refuse a folder with something else than an earlier quickstart."""
    if (out / _MARK).is_file() or not out.exists():
        return
    if not out.is_dir() or any(path.name != LOCK for path in out.iterdir()):
        raise SoloError(f"{out} exists and is not from a quickstart: choose another folder with --out")


def _empty_output_dir(out: Path) -> None:
    """Remove all but the lock and the mark, which comes first, so that this can be repeated."""
    with writing(out):
        (out / _MARK).write_text("{}\n")
        for path in out.iterdir():
            if path.name not in (LOCK, _MARK):
                remove(path)


def _recipe(stage: str, out: Path, seed: int, fraction: float) -> Recipe:
    recipe = Recipe.load(f"quickstart/{stage}")
    steps = max(1, round((recipe.steps or 0) * fraction))
    return recipe.override(
        [f"root={json.dumps(str(out))}", f"seed={seed}", f"data.seed={seed}", f"steps={steps}"]
    )


def _answers(path: Path, pipeline: GenerationPipeline, progress: Progress) -> list[HeldOutAnswer]:
    questions = read_questions(path)
    task = progress.add_task(path.stem, total=len(questions), unit="question")
    answers: list[HeldOutAnswer] = []
    for batch in answer_questions(questions, pipeline):
        answers += batch
        progress.update(task, completed=len(answers))
    return answers


def _stage_metrics(folder: Path, run: TrainResult) -> dict[str, Any]:
    losses = [line["loss"] for line in read_metrics(folder)]
    return {
        "steps": run.metrics["steps"],
        "tokens": run.metrics["tokens"],
        "seconds": round(run.metrics["seconds"], 1),
        "loss_first": round(losses[0], 4),
        "loss_last": round(mean(losses[-10:]), 4),
    }
