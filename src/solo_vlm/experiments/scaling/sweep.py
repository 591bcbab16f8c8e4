"""Sweep: training of decoders of several sizes at several budgets, and a table with one row per run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from solo_vlm.experiments.launcher import Executor, TrainingRun, train_runs
from solo_vlm.models.flops import count_parameters as count_by_part
from solo_vlm.models.from_llm import compose
from solo_vlm.models.load import load_config, load_tokenizer
from solo_vlm.quickstart.data.files import ToySettings, draw_toy_data
from solo_vlm.quickstart.llm import training_texts, write_untrained_llm
from solo_vlm.train.metrics import read_metrics
from solo_vlm.train.recipe import Recipe
from solo_vlm.utils.errors import SoloError, did_you_mean, first_line
from solo_vlm.utils.files import new_file
from solo_vlm.utils.settings import Settings

RESULTS = "results.parquet"

Size = dict[str, PositiveInt]

_SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("size", pa.string()),
        ("holdout", pa.bool_()),
        ("n", pa.int64()),  # parameters, as `SweepSettings.count` defines them
        ("d", pa.int64()),  # text and vision tokens
        ("loss", pa.float64()),  # final validation loss
        ("n_non_embedding", pa.int64()),
        ("n_total", pa.int64()),
        ("d_text", pa.int64()),
        ("d_vision", pa.int64()),
        ("d_supervised", pa.int64()),
        ("flops", pa.float64()),  # training FLOPs
        ("steps", pa.int64()),
        ("seconds", pa.float64()),
        ("learning_rate", pa.float64()),
        ("recipe", pa.string()),
    ]
)


class HoldoutSettings(Settings):
    """Run that laws are not fitted to, but must predict.

    Attributes:
        name: Name of the size.
        size: Changes to the configuration of the decoder.
        tokens: Training tokens.
    """

    name: str
    size: Size
    tokens: PositiveInt


class SweepSettings(Settings):
    """Grid of sizes x budgets, with one training run each.

    The decoders start from random weights. Learning rates follow the width as in muP for Adam (Yang et al.
    2022, "Tensor Programs V", table 3): rates of matrices scale with 1 / width, their initial standard
    deviation with width^-1/2; the patch embedding, whose 3,072 inputs do not depend on the size, keeps its
    own rate. Keep the head size constant, too. Unlike in muP, the token embedding scales like the matrices.

    Attributes:
        root: Folder of the sweep; data paths and `llm` are relative to it.
        llm: Folder or hub ID of an LLM that provides the architecture and the tokenizer of all sizes.
        toy_data: Toy data to write first; `llm` is made from it if it is missing.
        recipe: Recipe of every run without `root`, `model`, `out` and `steps`; needs validation data.
        base_width: Hidden size that the learning rates of the recipe refer to.
        sizes: Changes to the configuration of the LLM (`hidden_size`, `num_hidden_layers`, ...), by name.
        tokens: Budgets in tokens, the same for every size. Alternative to `flops`.
        flops: Budgets C in FLOPs, for IsoFLOP profiles: N parameters are trained on D = C / (6 N) tokens.
        count: Definition of N: which parameters it counts.
        holdout: Runs to predict.
    """

    root: str
    llm: str
    toy_data: ToySettings | None = None
    recipe: dict[str, Any]
    base_width: PositiveInt
    sizes: dict[str, Size] = Field(min_length=1)
    tokens: tuple[PositiveInt, ...] = ()
    flops: tuple[PositiveFloat, ...] = ()
    count: Literal["non_embedding", "total"] = "non_embedding"
    holdout: tuple[HoldoutSettings, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.tokens) == bool(self.flops):
            raise ValueError("give budgets either as tokens or as flops")
        if not self.recipe.get("validation"):
            raise ValueError("recipe.validation is missing: laws are fitted to losses on held-out data")
        if taken := {"root", "model", "out", "steps"} & self.recipe.keys():
            raise ValueError(f"recipe.{min(taken)} is set by the sweep: remove it")
        sizes = [*self.sizes.values(), *(holdout.size for holdout in self.holdout)]
        if not all("hidden_size" in size for size in sizes):
            raise ValueError("every size needs a hidden_size: the learning rate depends on it")
        names = [*self.sizes, *(holdout.name for holdout in self.holdout)]
        if len(set(names)) < len(names):
            raise ValueError("a holdout has the name of another size")
        return self


@dataclass(frozen=True)
class SweepRun(TrainingRun):
    """Training run of a sweep; laws are not fitted to `holdout` runs."""

    size: str
    holdout: bool


def run_sweep(
    settings: SweepSettings,
    processes: int = 1,
    executor: Executor = "local",
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Path:
    """Train all unfinished runs and return the path of the table, `root/results.parquet`.

    A repeated call keeps finished runs; interrupted ones resume from their newest checkpoints.

    Args:
        processes: Maximum number of concurrent runs.
        executor: See `launcher.run_jobs`.
        progress: Called with the name of each finished run, and the completed and total number of runs.

    Raises:
        SoloError: The settings fit neither the LLM nor earlier runs in the root, or a run failed.
        Stopped: A signal arrived; progress is saved.
    """
    runs = prepare(settings)
    done = sum(run.finished for run in runs)
    for run in train_runs(runs, processes, executor):
        done += 1
        progress(run.name, done, len(runs))
    table = Path(settings.root) / RESULTS
    with new_file(table) as partial:
        rows = [run_results(run, settings.count) for run in runs]
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), partial)
    return table


def prepare(settings: SweepSettings) -> list[SweepRun]:
    """Write data and untrained models, and return all runs of a sweep."""
    root = Path(settings.root)
    llm = root / settings.llm
    if settings.toy_data:
        draw_toy_data(root / "data", settings.toy_data)
        if not llm.exists():
            texts = training_texts(root / "data", ("text", "stage2"))
            write_untrained_llm(llm, texts, settings.toy_data.seed)
    sizes = settings.sizes | {holdout.name: holdout.size for holdout in settings.holdout}
    seed = settings.recipe.get("seed", 0)
    for name, size in sizes.items():
        source = llm if llm.exists() else settings.llm
        write_sized_model(root / "models" / name, source, size, settings.base_width, seed)
    grid = [
        _run(settings, name, size, tokens, label)
        for name, size in settings.sizes.items()
        for label, tokens in _budgets(settings, root / "models" / name)
    ]
    held_out = [
        _run(settings, holdout.name, holdout.size, holdout.tokens, f"d{holdout.tokens}", holdout=True)
        for holdout in settings.holdout
    ]
    return grid + held_out


def scaled_rates(recipe: dict[str, Any], width: int, base_width: int) -> dict[str, Any]:
    """Return the recipe with learning rates for a width (see `SweepSettings`).

    The patch embedding keeps its rate; if the recipe sets none, that is the learning rate at `base_width`.
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


def run_results(run: SweepRun, count: str) -> dict[str, Any]:
    """Return the table row of a finished run; `count` defines which parameters N counts."""
    n = count_parameters(run.folder / "model")
    steps = read_metrics(run.folder)
    d = {
        kind: int(sum(step[f"{kind}_tokens"] for step in steps)) for kind in ("text", "vision", "supervised")
    }
    return {
        "run": run.name,
        "size": run.size,
        "holdout": run.holdout,
        "n": n[count],
        "d": d["text"] + d["vision"],
        "loss": steps[-1]["validation_loss"],
        **{f"n_{kind}": value for kind, value in n.items()},
        **{f"d_{kind}": value for kind, value in d.items()},
        "flops": float(sum(step["flops"] for step in steps)),
        "steps": len(steps),
        "seconds": sum(step["step_seconds"] for step in steps),
        "learning_rate": run.recipe.optimizer.learning_rate,
        "recipe": json.dumps(run.recipe.model_dump(mode="json")),
    }


def count_parameters(model: Path) -> dict[str, int]:
    """Count the parameters of a model: "non_embedding" (layers and norms of the decoder) and "total"."""
    counts = count_by_part(load_config(model))
    return {"non_embedding": counts.attention + counts.mlp + counts.norms, "total": counts.total}


def write_sized_model(
    out: Path, llm: str | Path, size: Mapping[str, int], base_width: int, seed: int = 0
) -> None:
    """Write an untrained SOLO model, unless it exists.

    Args:
        llm: Folder or hub ID of the LLM that provides configuration and tokenizer.
        size: Changes to that configuration.
        base_width: Hidden size at which weights have the configured initial standard deviation; it scales
            with width^-1/2 (Yang et al. 2022, "Tensor Programs V", table 3).
    """
    config = _sized_config(llm, size)
    config.initializer_range *= (base_width / config.hidden_size) ** 0.5
    if out.exists():
        return _check_same(out, config, [*size, "initializer_range"])
    set_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    except Exception as error:  # model families raise any type on odd sizes
        raise SoloError(f"cannot make a model of {llm} with {dict(size)}: {first_line(error)}") from error
    compose(model, load_tokenizer(llm), seed=seed).save(out)


def _check_same(model: Path, config: Any, settings: Sequence[str]) -> None:
    existing = load_config(model).text_config
    for name in settings:
        found, wanted = getattr(existing, name), getattr(config, name)
        if found != wanted:
            raise SoloError(
                f"{model} has {name} {found}, the sweep {wanted}: remove it and its runs, or choose another "
                "root"
            )


def _sized_config(llm: str | Path, size: Mapping[str, int]) -> Any:
    config = load_config(llm)
    settings = config.to_dict()
    for key in size.keys() - settings.keys():
        raise SoloError(f"{llm} has no setting {key}{did_you_mean(key, settings)}")
    heads = size.get("num_attention_heads", config.num_attention_heads)
    width = size.get("hidden_size", config.hidden_size)
    kept = {key: value for key, value in settings.items() if key != "layer_types"}
    # Some families default to another head_dim than the one that follows from width and heads.
    if settings.get("head_dim") == config.hidden_size // config.num_attention_heads:
        kept["head_dim"] = width // heads
    return AutoConfig.for_model(**{**kept, **size})


def _budgets(settings: SweepSettings, model: Path) -> list[tuple[str, float]]:
    """Return label and tokens of each budget of a size."""
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
        "log_interval": 1,  # the table sums the tokens and FLOPs of every step
    }
    probe = Recipe.parse(recipe, origin="recipe")
    steps = round(tokens / (probe.global_batch * probe.data.sequence_length))
    if steps < 1:
        raise SoloError(f"{run}: {tokens:,.0f} tokens are less than one step; raise the budget")
    return SweepRun(run, probe.model_copy(update={"steps": steps}), name, holdout)
