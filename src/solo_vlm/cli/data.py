"""`solo data`: list, download and convert the paper's data sets; inspect and verify mixtures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from solo_vlm.cli._common import (
    STDOUT,
    ExecutorOption,
    print_json,
    print_table,
    print_whole,
    progress_bar,
    quiet_libraries,
)
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from solo_vlm.data.encode import Encoder
    from solo_vlm.data.mixture import Mixture
    from solo_vlm.data.survey.preview import Preview, Run

app = typer.Typer(
    help="List, download and convert the paper's data sets; inspect and verify mixtures.",
    no_args_is_help=True,
)

MixtureFile = Annotated[
    str, typer.Argument(metavar="MIXTURE", help="YAML file of a mixture or recipe, or name of a recipe.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

_COUNTS = ("instances", "samples", "images", "tokens")
_WELL_SHUFFLED = 0.25


@app.command("list")
def list_data_sets(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object with all fields.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the Markdown table of the documentation.")
    ] = False,
) -> None:
    """List the data sets of the paper, with its counts, and those of the recipes solo-open/."""
    from rich.table import Table

    from solo_vlm.data.catalog.entry import DATA_SETS, markdown_table

    if json:
        print_json({"data_sets": [data_set.as_dict() for data_set in DATA_SETS.values()]})
        return
    if markdown:
        print(markdown_table(DATA_SETS.values()), end="")
        return
    table = Table(show_edge=False)
    for column in ("name", "use", "the paper's count", "raw shape"):
        table.add_column(column, no_wrap=column in ("name", "the paper's count"))
    for data_set in DATA_SETS.values():
        status = "confirmed" if data_set.schema_confirmed else "not confirmed"
        table.add_row(data_set.name, data_set.use, data_set.size, status)
    print_whole(table)


@app.command()
def download(
    name: Annotated[
        str, typer.Argument(help="Name of a data set that publishes image URLs (see solo data list).")
    ],
    urls: Annotated[Path, typer.Option(help="Published URL list, or a folder of its files.")],
    out: Annotated[Path, typer.Option(help="Folder for the tar files, which solo data convert reads.")],
    img2dataset: Annotated[
        str, typer.Option(help="Name or path of the img2dataset program.")
    ] = "img2dataset",
    processes: Annotated[int, typer.Option(min=1, help="Number of download processes.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Number of threads per process.")] = 64,
) -> None:
    """Download the images of CapFusion or CC3M with img2dataset. Run the same command again to resume."""
    from solo_vlm.data.catalog.download import download as run
    from solo_vlm.data.catalog.entry import get

    run(get(name), urls, out, img2dataset, processes, threads)


@app.command()
def convert(
    name: Annotated[str, typer.Argument(help="Name of a data set (see solo data list).")],
    raw: Annotated[list[Path], typer.Option(help="Folder of raw files, or one raw file; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Folder for the sample files and report.json.")],
    executor: ExecutorOption = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of files in progress; default: one per CPU.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the shuffle.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert a data set's raw files to shuffled sample files. Run the same command again to resume."""
    from solo_vlm.data.catalog.convert import convert as run

    with progress_bar(name) as on_progress:
        report = run(name, raw, out, executor, workers, on_progress, seed)
    print_json(report) if json else _show_report(report)


def _show_report(report: dict[str, Any]) -> None:
    STDOUT.print(
        f"{report['out']}: {report['samples']:,} samples with {report['images']:,} images", highlight=False
    )
    for reason, count in report["rejected"].items():
        example = report["examples"][reason][0]
        STDOUT.print(f"  {count:,} rejected: {example}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def preview(
    source: Annotated[str, typer.Argument(help="File, folder, glob pattern or URL, as in a recipe.")],
    format: Annotated[str, typer.Option(help="Format of the rows; default: recognized.")] = "auto",
    images: Annotated[str | None, typer.Option(help="Folder that image paths refer to.")] = None,
    columns: Annotated[
        list[str] | None, typer.Option(help="Column to read, as image=photo; may be repeated.")
    ] = None,
    filter: Annotated[str | None, typer.Option(help="Rows to keep, such as 'stars >= 3'.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder of the model whose tokens to show; default: none.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of rows to show.")] = 3,
    json: Json = False,
) -> None:
    """Show the first rows of a source as the model will read them, before there is a recipe."""
    quiet_libraries()
    from solo_vlm.data.encode import load_encoder
    from solo_vlm.data.mixture import SourceSettings
    from solo_vlm.data.survey.preview import preview as run

    for column in columns or []:
        if "=" not in column:
            raise SoloError(f"--columns {column}: expected the format's name and yours, such as image=photo")
    named = dict(column.split("=", 1) for column in columns or [])
    options = {"path": source, "format": format, "images": images, "columns": named, "filter": filter}
    settings = SourceSettings.parse(options, origin=source)
    found = run(settings.open(), load_encoder(model) if model else None, rows)
    print_json(found.as_dict()) if json else _show_preview(found)


def _show_preview(found: Preview) -> None:
    unread = f"; not read: {', '.join(found.unread)}" if found.unread else ""
    _print(f"{found.source}: rows read as {found.format}; columns {', '.join(found.columns)}{unread}")
    if found.filtered:
        _print(f"{found.filtered:,} rows left out by the filter")
    for row in found.rows:
        _print(f"\n{row.where}" + (f"\n  skipped: {row.error}" if row.error else ""))
        for part in row.parts:
            if part.type == "image":
                grid = f"{part.rows} x {part.columns} patches, {part.tokens} tokens"
                _print(f"  {part.role}: image of {part.width} x {part.height} pixels, {grid}")
            else:
                _print(f"  {part.role}{' (supervised)' if part.supervised else ''}: {part.text}")
        if row.runs:
            supervised = sum(run.tokens for run in row.runs if run.kind == "supervised")
            total = sum(run.tokens for run in row.runs)
            _print(f"  {total:,} tokens, {supervised:,} supervised, those in [[ ]]:")
            _print(f"  {''.join(map(_shown_run, row.runs))!r}")


def _shown_run(run: Run) -> str:
    if run.kind == "vision":
        return f"({run.tokens} vision tokens)"
    return f"[[{run.text}]]" if run.kind == "supervised" else run.text


@app.command()
def stats(
    mixture: MixtureFile,
    overrides: Overrides = None,
    exact: Annotated[bool, typer.Option("--exact", help="Read all rows instead of a sample.")] = False,
    samples: Annotated[
        int, typer.Option(min=10, help="Number of rows to draw from each source for an estimate.")
    ] = 1000,
    json: Json = False,
) -> None:
    """Count packed sequences, images, text and vision tokens of each source: the paper's Table 1."""
    from solo_vlm.data.survey.stats import mixture_stats

    settings, encoder = _load(mixture, overrides)
    with progress_bar("reading") as on_progress:
        facts = mixture_stats(settings, encoder, None if exact else samples, on_progress).as_dict()
    if json:
        print_json(facts)
        return
    _print_counts(facts)
    _print_notes(facts)


def _print_counts(facts: dict[str, Any]) -> None:
    total = facts["total"]
    shares = [f"{total[name]:.2%}" for name in ("text_share", "vision_share")]
    rows = [_cells(source["source"], source, source["share"]) for source in facts["sources"]]
    rows += [_cells("total", total, 1.0), ["share", *[""] * (len(_COUNTS) + 1), *shares, "", "", ""]]
    columns = ["source", *_COUNTS, "share", "text tokens", "vision tokens", "fill", "skipped"]
    if total["filtered"]:
        columns.append("filtered")
    print_table(None, columns, [row[: len(columns)] for row in rows], rules_before={len(facts["sources"])})


def _cells(name: str, facts: dict[str, Any], share: float) -> list[str]:
    return [
        name,
        *(f"{facts[count]:,}" for count in _COUNTS),
        f"{share:.2%}",
        f"{facts['text_tokens']:,}",
        f"{facts['vision_tokens']:,}",
        f"{facts['fill']:.4f}",
        f"{sum(facts['skipped'].values()):,}",
        f"{facts['filtered']:,}",
    ]


def _print_notes(facts: dict[str, Any]) -> None:
    total = facts["total"]
    if total["skipped"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in total["skipped"].items())
        STDOUT.print(f"skipped: {reasons}", highlight=False)
    for source in facts["sources"]:
        if source["shuffle"] < _WELL_SHUFFLED:
            STDOUT.print(
                f"shuffle {source['shuffle']:.2f}: a packed sequence of {source['source']} has that share of "
                "the shards of a perfect shuffle: if its files are sorted, convert it or write smaller ones",
                highlight=False,
            )
    if facts["exact"]:
        return
    intervals = {name: f"{low:,} to {high:,}" for name, (low, high) in total["interval_95"].items()}
    STDOUT.print(
        f"Estimate from up to {facts['rows_drawn']:,} rows per source; --exact reads everything. "
        f"95% intervals of the totals:\n  tokens {intervals['tokens']}\n"
        f"  text tokens {intervals['text_tokens']}\n  vision tokens {intervals['vision_tokens']}\n"
        f"  images {intervals['images']}",
        highlight=False,
    )


@app.command()
def view(
    mixture: MixtureFile,
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
    overrides: Overrides = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Number of samples in total, divided among the sources.")
    ] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random selection.")] = 0,
    json: Json = False,
) -> None:
    """Write an HTML page of samples: image patches, tokens, and which tokens are supervised."""
    from solo_vlm.data.survey.view import write_gallery

    settings, encoder = _load(mixture, overrides)
    shown = write_gallery(out, settings, encoder, samples, seed)
    if json:
        print_json({"out": str(out), "samples": shown})
        return
    STDOUT.print(f"{out}: {shown} samples", highlight=False, markup=False)


@app.command()
def verify(
    mixture: MixtureFile,
    overrides: Overrides = None,
    report: Annotated[Path | None, typer.Option(help="JSON Lines file for all unusable rows.")] = None,
    json: Json = False,
) -> None:
    """Read every row once, as training does. Exit code 1 if more than data.max_skipped are unusable."""
    from solo_vlm.data.survey.verify import verify_mixture

    settings, encoder = _load(mixture, overrides)
    with progress_bar("reading") as on_progress:
        verification = verify_mixture(settings, encoder, report, on_progress)
    print_json(verification.as_dict()) if json else _show_verification(verification.as_dict())
    if not verification.passed:
        raise typer.Exit(1)


def _show_verification(facts: dict[str, Any]) -> None:
    for source in facts["sources"]:
        _print(f"{source['source']}: {source['samples']:,} samples with {source['images']:,} images")
        if source["filtered"]:
            _print(f"  {source['filtered']:,} left out by its filter")
        for reason, count in source["rejected"].items():
            _print(f"  {count:,} {reason}, such as")
            for example in source["examples"][reason]:
                _print(f"    {example}")
    verdict = "within" if facts["passed"] else "MORE than"
    _print(
        f"{facts['rejected']:,} of {facts['rows']:,} rows cannot be used: {verdict} data.max_skipped = "
        f"{facts['max_skipped']:g}"
    )


def _print(line: str) -> None:
    STDOUT.print(line, highlight=False, markup=False)


def _load(mixture: str, overrides: list[str] | None) -> tuple[Mixture, Encoder]:
    """Load a mixture and the encoder of its model."""
    quiet_libraries()
    from solo_vlm.data.encode import load_encoder
    from solo_vlm.data.mixture import Mixture

    settings = Mixture.load(mixture, overrides or [])
    return settings, load_encoder(settings.model_source())
