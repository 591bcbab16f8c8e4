"""The order of the whole recipe: data, LLM, init, stages 1 to 3, fine-tuning, scores, report."""

from __future__ import annotations

import json
import shutil
import time
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
from solo_vlm.train.trainer import Trained, train
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_file

STAGES = ("llm", "stage1", "stage2", "stage3", "sft")
_MARK = "quickstart.json"


def run_quickstart(out: Path, seed: int = 0, fraction: float = 1.0) -> dict[str, Any]:
    """Train, evaluate and report; return what `out/metrics.json` holds.

    Args:
        out: folder for everything; an earlier quickstart in it is replaced.
        seed: of data and training; the same seed gives the same figures on the same kind of machine.
        fraction: of the steps, for a first look.

    Returns:
        `digits_accuracy`, `caption_exact_match`, `qa_accuracy` (all on held-out images), `seconds`,
        `tokens_per_second`, and `stages`: steps, tokens, `loss_first` (of the first step) and `loss_last`
        (mean of the last ten that were logged) of each.

    Raises:
        SoloError: `out` holds something else.
    """
    started = time.perf_counter()
    _claim(out)
    with progress_bar() as progress:
        _work(progress, "data", lambda: write_toy_data(out / "data", seed))
        write_untrained_llm(out / "llm-untrained", training_texts(out / "data"), seed)
        trained: dict[str, Trained] = {}
        for stage in STAGES:
            if stage == "stage1":
                from_llm(out / "llm" / "model", seed=seed).save(out / "init")
            trained[stage] = train(_recipe(stage, out, seed, fraction), progress=progress)
        pipeline = GenerationPipeline.from_pretrained(trained["sft"].model)
        answers = {
            name: _answers(out / "data" / f"heldout_{name}.parquet", pipeline, progress)
            for name in ("digits", "captions", "qa")
        }

    steps = sum(run.figures["steps"] for run in trained.values())
    tokens = sum(run.figures["tokens"] for run in trained.values())
    metrics = {
        "digits_accuracy": accuracy(answers["digits"]),
        "caption_exact_match": accuracy(answers["captions"]),
        "qa_accuracy": accuracy(answers["qa"]),
        "seconds": round(time.perf_counter() - started, 1),
        "tokens_per_second": round(tokens / sum(run.figures["seconds"] for run in trained.values())),
        "steps": steps,
        "tokens": tokens,
        "parameters": pipeline.model.num_parameters(),
        "held_out": {name: len(given) for name, given in answers.items()},
        "stages": {stage: _stage_figures(out / stage, run) for stage, run in trained.items()},
        "seed": seed,
    }
    write_loss_curve(out / "loss.png", {stage: read_metrics(out / stage) for stage in STAGES})
    write_examples(out / "examples", answers)
    write_report(out / "report.html", metrics, answers, out / "loss.png")
    with new_file(out / "metrics.json") as partial:
        partial.write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def _claim(out: Path) -> None:
    """Make the folder ours: a new one, or one that an earlier quickstart left."""
    if out.exists() and not (out / _MARK).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise SoloError(f"{out} exists and is not from a quickstart: choose another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARK).write_text("{}\n")


def _recipe(stage: str, out: Path, seed: int, fraction: float) -> Recipe:
    recipe = Recipe.load(f"quickstart/{stage}")
    steps = max(1, round((recipe.steps or 0) * fraction))
    return recipe.override(
        [f"root={json.dumps(str(out))}", f"seed={seed}", f"data.seed={seed}", f"steps={steps}"]
    )


def _work(progress: Progress, name: str, work: Any) -> None:
    """Do something without steps, shown as one."""
    task = progress.add_task(name, total=1, figures="")
    work()
    progress.update(task, completed=1)


def _answers(path: Path, pipeline: GenerationPipeline, progress: Progress) -> list[HeldOutAnswer]:
    questions = read_questions(path)
    task = progress.add_task(path.stem, total=len(questions), figures="")
    answers: list[HeldOutAnswer] = []
    for batch in answer_questions(questions, pipeline):
        answers += batch
        progress.update(task, completed=len(answers))
    return answers


def _stage_figures(folder: Path, run: Trained) -> dict[str, Any]:
    losses = [line["loss"] for line in read_metrics(folder)]
    return {
        "steps": run.figures["steps"],
        "tokens": run.figures["tokens"],
        "seconds": round(run.figures["seconds"], 1),
        "loss_first": round(losses[0], 4),
        "loss_last": round(mean(losses[-10:]), 4),
    }
