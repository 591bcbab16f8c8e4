"""`solo init`: make a SOLO model from an LLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from solo_vlm.cli._common import STDOUT, JsonOption, parse_pixels, print_json, quiet_libraries
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor


def init(
    llm: Annotated[str, typer.Option(help="Hub ID or local folder of a causal language model.")],
    out: Annotated[Path, typer.Option(help="New folder for the model.")],
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file in that folder.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed for the new weights.")] = 0,
    image_size: Annotated[
        str,
        typer.Option(help="Maximum long side in pixels, or WIDTHxHEIGHT to stretch all images to."),
    ] = "1024",
    bidirectional_images: Annotated[
        bool, typer.Option(help="Let patches of an image attend to each other in both directions.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Make a SOLO model from an LLM: add four tokens and one linear layer; text logits stay the same."""
    quiet_libraries()
    from solo_vlm.models.from_llm import from_llm
    from solo_vlm.models.load import stop_ids
    from solo_vlm.utils.files import check_new

    check_new(out)
    images = _image_processor(image_size)
    solo = from_llm(llm, gguf_file=gguf_file, dtype=dtype, seed=seed, image_processor=images)
    solo.model.config.bidirectional_images = bidirectional_images
    solo.save(out)
    config = solo.model.config
    facts = {
        "out": str(out),
        "llm": config.text_config.model_type,
        "parameters": solo.model.num_parameters(),
        "patch_embedding": solo.model.model.embed_vision_patch.weight.numel(),
        "vocabulary": config.text_config.vocab_size,
        "vision_token_ids": list(config.vision_token_ids),
        "chat_template": solo.chat_template,
        "stop_tokens": solo.processor.tokenizer.convert_ids_to_tokens(stop_ids(solo.model.generation_config)),
    }
    if json:
        return print_json(facts)
    STDOUT.print(
        f"{out}: {facts['llm']} with {facts['parameters']:,} parameters, of which "
        f"{facts['patch_embedding']:,} embed patches; train it next: solo train RECIPE model={out}\n"
        f"chat template: {solo.chat_template_name}; answers end at {' '.join(facts['stop_tokens'])}",
        markup=False,
    )


def _image_processor(size: str) -> SoloImageProcessor:
    from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor

    if size.isdecimal():
        settings = {"longest_edge": int(size)}
    else:
        width, height = parse_pixels("--image-size", size)
        settings = {"height": height, "width": width}
    try:
        return SoloImageProcessor(size=settings)
    except ValueError as error:
        raise SoloError(f"--image-size {size}: {error}") from error
