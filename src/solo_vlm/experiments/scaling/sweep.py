"""A sweep: every size at every budget, trained by the engine, in one table of results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from solo_vlm.experiments.launcher.job import Engine
from solo_vlm.experiments.launcher.training import train_runs
from solo_vlm.experiments.scaling.models import write_sized_model
from solo_vlm.experiments.scaling.results import RESULTS, count_parameters, run_results, write_results
from solo_vlm.experiments.scaling.sweep_run import SweepRun
from solo_vlm.experiments.scaling.sweep_settings import Size, SweepSettings
from solo_vlm.experiments.scaling.toy import prepare_toy
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError


def run_sweep(
    settings: SweepSettings,
    processes: int = 1,
    engine: Engine = "local",
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Path:
    """Train whatever is not trained yet; return the path of the table, `root/results.parquet`.

    Started again, it keeps finished runs; interrupted ones go on from their newest checkpoints.

    Args:
        settings: the sweep.
        processes: runs side by side.
        engine: see `jobs.job.run_jobs`.
        progress: called with the name of each finished run, how many are finished, and of how many.

    Raises:
        SoloError: the settings do not fit the LLM or what is in the root already, or a run has failed.
        Stopped: by a signal; what ran is saved.
    """
    runs = prepare(settings)
    done = sum(run.finished for run in runs)
    for run in train_runs(runs, processes, engine):
        done += 1
        progress(run.name, done, len(runs))
    table = Path(settings.root) / RESULTS
    write_results(table, [run_results(run, settings.count) for run in runs])
    return table


def prepare(settings: SweepSettings) -> list[SweepRun]:
    """Data, untrained models, and all runs of a sweep.

    Raises:
        SoloError: as `run_sweep`.
    """
    root = Path(settings.root)
    if settings.toy_data:
        prepare_toy(root, root / settings.llm, settings.toy_data)
    llm = root / settings.llm if (root / settings.llm).exists() else settings.llm
    sizes = settings.sizes | {holdout.name: holdout.size for holdout in settings.holdout}
    seed = settings.recipe.get("seed", 0)
    for name, size in sizes.items():
        write_sized_model(root / "models" / name, llm, size, settings.base_width, seed)
    grid = [
        _run(settings, name, size, tokens, label)
        for name, size in settings.sizes.items()
        for label, tokens in _budgets(settings, root / "models" / name)
    ]
    held = [
        _run(settings, holdout.name, holdout.size, holdout.tokens, f"d{holdout.tokens}", holdout=True)
        for holdout in settings.holdout
    ]
    return grid + held


def scaled_rates(recipe: dict[str, Any], width: int, base_width: int) -> dict[str, Any]:
    """The recipe with the learning rates of a width (see `SweepSettings`).

    The patch embedding keeps its rate: without one of its own it keeps the one at `base_width`.
    """
    defaults = Recipe.model_fields["optimizer"].default
    optimizer = defaults.model_dump(mode="json") | recipe.get("optimizer", {})
    rate, scale = optimizer["learning_rate"], base_width / width
    scaled = {
        "learning_rate": rate * scale,
        "min_learning_rate": optimizer["min_learning_rate"] * scale,
        "patch_learning_rate": optimizer["patch_learning_rate"] or rate,
    }
    return {**recipe, "optimizer": {**optimizer, **scaled}}


def _budgets(settings: SweepSettings, model: Path) -> list[tuple[str, float]]:
    """Names and tokens of the budgets of a size."""
    n = count_parameters(model)[settings.count]
    tokens = [(f"d{tokens}", float(tokens)) for tokens in settings.tokens]
    return tokens + [(f"c{flops:g}".replace("+", ""), flops / (6 * n)) for flops in settings.flops]


def _run(
    settings: SweepSettings, name: str, size: Size, tokens: float, label: str, holdout: bool = False
) -> SweepRun:
    run = f"{name}-{label}"
    recipe = {
        **scaled_rates(settings.recipe, size["hidden_size"], settings.base_width),
        "root": settings.root,
        "model": f"models/{name}",
        "out": f"runs/{run}",
        "log_interval": 1,  # the table adds up what the steps have read
    }
    probe = Recipe.parse(recipe, origin="recipe")
    steps = round(tokens / (probe.global_batch * probe.data.sequence_length))
    if steps < 1:
        raise SoloError(f"{run}: {tokens:,.0f} tokens are less than one step; raise the budget")
    return SweepRun(run, probe.model_copy(update={"steps": steps}), name, holdout)


__all__ = ["SweepRun", "prepare", "run_sweep", "scaled_rates"]
