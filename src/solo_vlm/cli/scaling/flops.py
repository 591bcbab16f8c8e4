"""`solo scaling flops`: what a model costs, beside LLaVA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from solo_vlm.cli._common import STDOUT, parse_pixels, print_json, quiet_libraries
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from rich.table import Table

    from solo_vlm.experiments.scaling.flops import Comparison

_TERA = 1e12


def flops(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id, of a SOLO model or an LLM; default: SOLO-7B.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A config.json instead of a model.")] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Size in pixels, as 1024x768; may be repeated.")
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Tokens of text after each image.")] = 256,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Count the FLOPs of text and images, for SOLO and for LLaVA with the same decoder."""
    quiet_libraries()
    from solo_vlm.experiments.scaling.flops import IMAGE_SIZES, compare

    if model and config:
        raise SoloError("give --model or --config, not both")
    sizes = [parse_pixels("--image", text) for text in image] if image else IMAGE_SIZES
    comparison = compare(_config(model or config), sizes, text_tokens)
    print_json(comparison.as_dict()) if json else _show(comparison)


def _config(source: str | Path | None) -> Any:
    from solo_vlm.models.load import load_config
    from solo_vlm.models.solo.configuration_solo import SoloConfig

    return load_config(source) if source else SoloConfig()


def _show(comparison: Comparison) -> None:
    facts = comparison.as_dict()
    counts = facts["parameters"]
    STDOUT.print(
        f"SOLO   {counts['solo']:,} parameters: decoder {counts['decoder']:,}, patch embedding "
        f"{counts['patch_embedding']:,}\nLLaVA  {counts['llava']:,} parameters: decoder "
        f"{counts['decoder']:,}, encoder {counts['encoder']:,}, connector {counts['connector']:,}\n",
        highlight=False,
    )
    STDOUT.print(_text_table(facts), _image_table(facts))


def _text_table(facts: dict[str, Any]) -> Table:
    table = _table("Text, TFLOPs; the same for both")
    for column in ("tokens", "forward", "training", "with recompute", "attention", "training a token"):
        table.add_column(column, justify="right", no_wrap=True)
    for sequence in facts["sequences"]:
        table.add_row(
            f"{sequence['length']:,}",
            *(_teras(sequence[name]) for name in ("forward", "training", "hardware_full_recompute")),
            f"{sequence['attention_share']:.1%}",
            _teras(sequence["training_per_token"]),
        )
    return table


def _image_table(facts: dict[str, Any]) -> Table:
    table = _table(
        f"Images, TFLOPs forward; with {facts['text_tokens']:,} tokens of text, forward and in training"
    )
    table.add_column("pixels", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for column in ("tokens", "embed", "decoder", "alone", "with text", "training"):
        table.add_column(column, justify="right", no_wrap=True)
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
            table.add_row(size if name == "SOLO" else "", name, f"{cost['tokens']:,}", *map(_teras, costs))
        table.add_section()
    return table


def _table(title: str) -> Table:
    from rich.table import Table

    return Table(title=title, title_justify="left", show_edge=False)


def _teras(flops: float) -> str:
    """In units of 10^12, four digits."""
    return f"{flops / _TERA:,.4g}" if flops < 1000 * _TERA else f"{flops / _TERA:,.0f}"
