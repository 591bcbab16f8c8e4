"""`solo scaling`: cost and quality as functions of model size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from solo_vlm.cli._common import (
    STDERR,
    STDOUT,
    ExecutorOption,
    JsonOption,
    ProcessesOption,
    parse_pixels,
    print_json,
    print_table,
    quiet_libraries,
)
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from solo_vlm.experiments.scaling.analysis import Analysis

app = typer.Typer(help="Count FLOPs, run scaling sweeps, and fit scaling laws.", no_args_is_help=True)


@app.command()
def flops(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub ID of a SOLO model or an LLM. Default: SOLO-7B.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A config.json, instead of --model.")] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Image size in pixels, such as 1024x768; repeatable.")
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Number of text tokens after each image.")] = 256,
    json: JsonOption = False,
) -> None:
    """Count the FLOPs of text and images, for SOLO and for LLaVA with the same decoder."""
    quiet_libraries()
    from solo_vlm.experiments.scaling.flops import IMAGE_SIZES, compare
    from solo_vlm.models.load import load_config
    from solo_vlm.models.solo.configuration_solo import SoloConfig

    if model and config:
        raise SoloError("give --model or --config, not both")
    sizes = [parse_pixels("--image", text) for text in image] if image else IMAGE_SIZES
    source = model or config
    facts = compare(load_config(source) if source else SoloConfig(), sizes, text_tokens)
    print_json(facts) if json else _print_flops(facts)


@app.command()
def sweep(
    settings: Annotated[str, typer.Argument(help="YAML file, or a name such as sweeps/toy.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")] = None,
    processes: ProcessesOption = 1,
    executor: ExecutorOption = "local",
    json: JsonOption = False,
) -> None:
    """Train every size at every budget, then fit and plot. Run the same command again to resume."""
    quiet_libraries()
    from solo_vlm.experiments.scaling.sweep import SweepSettings, run_sweep

    def report(name: str, done: int, total: int) -> None:
        STDERR.print(f"{name}: done, {done} of {total}")

    loaded = SweepSettings.load(settings, overrides or [])
    root = Path(loaded.root)
    table = run_sweep(loaded, processes, executor, report)
    analysis = fit_and_plot(table, root / "fit.json", root / "plots")
    if json:
        return print_json({**analysis.as_dict(), "results": str(table), "plots": str(root / "plots")})
    _print_laws(analysis, [])
    STDOUT.print(f"results: {table}\nplots: {root / 'plots'}")


@app.command()
def fit(
    points: Annotated[
        Path,
        typer.Argument(
            help="CSV or parquet table with n, loss, and d (or flops); optionally d_text and d_vision."
        ),
    ],
    budget: Annotated[
        list[float] | None, typer.Option(help="Budget in FLOPs to find the optimum of; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for fit.json and plots.")] = None,
    json: JsonOption = False,
) -> None:
    """Fit L(N, D) = E + A / N^alpha + B / D^beta, with 95% intervals and compute-optimal sizes."""
    budgets = budget or []
    analysis = fit_and_plot(points, out / "fit.json" if out else None, out, budgets)
    if json:
        return print_json(analysis.as_dict(budgets))
    _print_laws(analysis, budgets)
    if out:
        STDOUT.print(f"written: {out}")


@app.command()
def plot(
    results: Annotated[
        Path, typer.Argument(help="Table of a sweep, or any table that `solo scaling fit` reads.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the plots.")],
) -> None:
    """Plot the law, compute-optimal sizes and IsoFLOP profiles, as PNG files and one HTML page."""
    fit_and_plot(results, None, out)
    STDOUT.print(f"written: {out}")


def fit_and_plot(
    points: Path, facts: Path | None, plots: Path | None, budgets: Sequence[float] = ()
) -> Analysis:
    """Fit laws to a table of points; write the fit to `facts` and plots to the folder `plots`, if given."""
    try:
        from solo_vlm.experiments.scaling.analysis import analyze
        from solo_vlm.experiments.scaling.plots import write_plots

        analysis = analyze(points)
        if facts:
            analysis.write(facts, budgets)
        if plots:
            write_plots(analysis, plots)
    except ImportError as error:
        raise SoloError(f"{error.name} is not installed: pip install 'solo-vlm[science]'") from error
    return analysis


def _print_laws(analysis: Analysis, budgets: Sequence[float]) -> None:
    """Print parameters with intervals, optima, and predictions of held-out runs."""
    facts = analysis.as_dict(budgets)
    _print_parameters(facts, f"L = E + A / N^alpha + B / D^beta, {facts['n_points']} points")
    if facts["mixture"]:
        _print_parameters(facts["mixture"], "L = E + A / N^alpha + B / (T + g V)^beta")
    if facts["isoflop"]:
        _print_parameters(facts["isoflop"], "IsoFLOP profiles: N ~ C^a, D ~ C^b")
    if facts["optima"]:
        rows = [
            [_number(optimum[name]) for name in ("flops", "n", "d", "loss")] for optimum in facts["optima"]
        ]
        print_table("Optimal for a budget", ("FLOPs", "parameters", "tokens", "loss"), rows)
    if facts["holdout"]:
        rows = [
            [run["run"], _number(run["loss"]), _number(run["predicted"]), f"{run['error']:+.1%}"]
            for run in facts["holdout"]
        ]
        print_table("Held out", ("run", "loss", "predicted", "error"), rows)
    for note in facts["notes"]:
        STDOUT.print(note, style="dim")


def _print_parameters(facts: dict[str, Any], title: str) -> None:
    rows = [
        [name, _number(facts[name]), f"{_number(low)} to {_number(high)}"]
        for name, (low, high) in facts["intervals"].items()
    ]
    print_table(title, ("parameter", "value", "95% interval"), rows)


def _print_flops(facts: dict[str, Any]) -> None:
    counts = facts["parameters"]
    STDOUT.print(
        f"SOLO   {counts['solo']:,} parameters: decoder {counts['decoder']:,}, patch embedding "
        f"{counts['patch_embedding']:,}\nLLaVA  {counts['llava']:,} parameters: decoder "
        f"{counts['decoder']:,}, encoder {counts['encoder']:,}, connector {counts['connector']:,}\n"
    )
    sequences = [
        [
            f"{sequence['length']:,}",
            *(_teraflops(sequence[name]) for name in ("forward", "training", "hardware_full_recompute")),
            f"{sequence['attention_share']:.1%}",
            _teraflops(sequence["training_per_token"]),
        ]
        for sequence in facts["sequences"]
    ]
    print_table(
        "Text (SOLO and LLaVA alike), TFLOPs",
        ("tokens", "forward", "training", "with recompute", "attention", "training per token"),
        sequences,
        left=0,
    )
    images: list[list[str]] = []
    for image in facts["images"]:
        size = f"{image['width']}x{image['height']}"
        for name, cost in (("SOLO", image["solo"]), ("LLaVA", image["llava"])):
            costs = (
                cost["forward"] - cost["decoder"],
                cost["decoder"],
                cost["forward"],
                cost["with_text_forward"],
                cost["with_text_training"],
            )
            images.append([size, name, f"{cost['tokens']:,}", *map(_teraflops, costs)])
            size = ""
    title = (
        f"Images, TFLOPs: forward pass; with {facts['text_tokens']:,} tokens of text, forward and in training"
    )
    columns = ("pixels", "model", "tokens", "embed", "decoder", "alone", "with text", "training")
    print_table(title, columns, images, left=2)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"


def _teraflops(flops: float) -> str:
    return f"{flops / 1e12:,.4g}" if flops < 1e15 else f"{flops / 1e12:,.0f}"
