"""`solo inspect`: the patch grid and the tokens of an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from solo_vlm.cli._common import STDOUT, JsonOption, print_json, quiet_libraries


def inspect(
    image: Annotated[str, typer.Option(help="Path or URL of an image.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    model: Annotated[str | None, typer.Option(help="Model folder; default: the paper's settings.")] = None,
    visible: Annotated[
        Path | None, typer.Option(help="PNG file for what the middle patch attends to, and all positions.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Draw the patch grid over the resized image and print its number of tokens."""
    quiet_libraries()
    from solo_vlm.generate import open_images
    from solo_vlm.models.inspect import draw_patch_grid, draw_visibility, summarize_image
    from solo_vlm.models.load import load_config, load_processor
    from solo_vlm.models.solo.configuration_solo import SoloConfig
    from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor
    from solo_vlm.utils.files import new_file

    image_processor = load_processor(model).image_processor if model else SoloImageProcessor()
    picture = open_images([image])[0]
    layout = summarize_image(picture, image_processor)
    with new_file(out) as partial:
        draw_patch_grid(picture, image_processor).save(partial, format="PNG")
    config = load_config(model) if model else SoloConfig()
    if visible:
        with new_file(visible) as partial:
            draw_visibility(picture, image_processor, config).save(partial, format="PNG")
    if json:
        design = {name: getattr(config, name) for name in ("image_attention", "image_positions")}
        written = {"out": str(out), **({"visible": str(visible)} if visible else {})}
        return print_json({"image": image, **written, **design, **layout.as_dict()})
    width, height = layout.original
    STDOUT.print(
        f"{image}: {width} x {height} pixels, resized to {layout.resized[0]} x {layout.resized[1]}\n"
        f"{layout.rows} rows x {layout.columns} columns = {layout.patches} patches, {layout.tokens} tokens\n"
        f"{layout.describe()}\n"
        f"{config.image_attention} attention, {config.image_positions} positions\n"
        f"written to {out}" + (f" and {visible}" if visible else ""),
        markup=False,
    )
