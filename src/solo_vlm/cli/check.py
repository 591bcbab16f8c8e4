"""`solo check`: the certificate of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from solo_vlm.cli._common import STDOUT, JsonOption, print_json, print_whole, progress_bar, quiet_libraries

if TYPE_CHECKING:
    from solo_vlm.check.certificate import Certificate

_MARKS = {"holds": "yes", "fails": "NO", "differs": "no", "skipped": "-"}


def check(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or hub ID of any model, or a config.json.")
    ],
    llm: Annotated[
        str | None, typer.Option(help="LLM that the SOLO model was made of; compares their text logits.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Compute in this dtype; in 16 bits, small errors are not found."),
    ] = "float32",
    save: Annotated[bool, typer.Option(help="Also save the model to a temporary folder.")] = True,
    json: JsonOption = False,
) -> None:
    """Check that a model computes what it should, in seconds on a CPU. Exit code 1 if a property fails."""
    quiet_libraries()
    from solo_vlm.check.certificate import certify
    from solo_vlm.check.loading import load_probe

    probe = load_probe(model, llm, dtype)
    with progress_bar("checking") as on_progress:
        certificate = certify(probe, model, () if save else ("saving",), on_progress)
    print_json(certificate.as_dict()) if json else _print(certificate)
    if not certificate.passed:
        raise typer.Exit(1)


def _print(certificate: Certificate) -> None:
    from rich.markup import escape
    from rich.table import Table

    from solo_vlm.check.certificate import PROPERTIES

    title = f"{certificate.model}: {certificate.kind}"
    table = Table(title=escape(title), title_justify="left", title_style="bold", show_edge=False)
    table.add_column("property", no_wrap=True)
    table.add_column("")
    table.add_column("difference", justify="right", no_wrap=True)
    table.add_column("compared", overflow="fold")
    reasons = []
    for name, finding in certificate.findings.items():
        property_name, error = PROPERTIES[name][0], finding.difference
        wrong = finding.status in ("fails", "differs")
        if wrong:
            reasons.append(f"{_MARKS[finding.status]}: {property_name}: {finding.detail}")
        compared = (finding.layer or "see below") if wrong else finding.detail
        cells = _MARKS[finding.status], "" if error is None else f"{error:.1g}", escape(compared)
        table.add_row(property_name, *cells, style="bold" if finding.status == "fails" else None)
    print_whole(table)
    for reason in reasons:
        STDOUT.print(reason, markup=False)
    failed = sum(finding.status == "fails" for finding in certificate.findings.values())
    failing = "1 property FAILS" if failed == 1 else f"{failed} properties FAIL"
    verdict = failing if failed else "every property that applies holds"
    STDOUT.print(f"{verdict} ({certificate.seconds:.1f} s)")
