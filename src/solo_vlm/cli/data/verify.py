"""`solo data verify`: read all data once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from solo_vlm.cli._common import STDOUT, print_json, progress_bar, quiet_libraries
from solo_vlm.cli.data._arguments import Json, MixtureFile, Overrides


def verify(
    mixture: MixtureFile,
    overrides: Overrides = None,
    report: Annotated[
        Path | None, typer.Option(help="File for all rows that cannot be used, as JSON lines.")
    ] = None,
    json: Json = False,
) -> None:
    """Read every row once, as training would. Exit code 1 where more than data.max_skipped are unusable."""
    quiet_libraries()
    from solo_vlm.data.encode import load_encoder
    from solo_vlm.data.mixture import Mixture
    from solo_vlm.data.survey.verify import verify_mixture

    settings = Mixture.load(mixture, overrides or [])
    encoder = load_encoder(settings.model_source())
    with progress_bar("reading") as on_progress:
        verification = verify_mixture(settings, encoder, report, on_progress)
    print_json(verification.as_dict()) if json else _show(verification.as_dict())
    if not verification.passed:
        raise typer.Exit(1)


def _show(facts: dict[str, Any]) -> None:
    for source in facts["sources"]:
        _print(f"{source['source']}: {source['samples']:,} samples with {source['images']:,} images")
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
