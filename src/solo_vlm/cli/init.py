"""`solo init`: make a SOLO model from an LLM."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from solo_vlm.cli._common import STDOUT, JsonOption, parse_pixels, print_json, quiet_libraries
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from solo_vlm.check.certificate import Certificate
    from solo_vlm.models.from_llm import SoloModelAndProcessor
    from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ImageAttention = Literal["causal", "bidirectional"]
ImagePositions = Literal["1d", "2d"]
PatchEmbedding = Literal["linear", "conv"]

logger = logging.getLogger(__name__)


def init(
    llm: Annotated[str, typer.Option(help="Hub ID or local folder of a causal language model.")],
    out: Annotated[Path, typer.Option(help="New folder for the model.")],
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file in that folder.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the weights; auto: as stored.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed for the new weights.")] = 0,
    image_size: Annotated[
        str,
        typer.Option(help="Maximum long side in pixels, or WIDTHxHEIGHT to stretch all images to."),
    ] = "1024",
    max_patches: Annotated[
        int | None, typer.Option(min=1, help="Budget of patches per image; larger images shrink.")
    ] = None,
    image_attention: Annotated[
        ImageAttention, typer.Option(help="Whether patches also attend to later patches of their image.")
    ] = "causal",
    image_positions: Annotated[
        ImagePositions, typer.Option(help="Whether patches have a row and a column, or only an index.")
    ] = "1d",
    rope_base_2d: Annotated[
        float | None,
        typer.Option(help="Base of the RoPE frequencies of rows and columns.", show_default="the LLM's"),
    ] = None,
    patch_embedding: Annotated[
        PatchEmbedding, typer.Option(help="One linear layer, or two convolutions within a patch.")
    ] = "linear",
    json: JsonOption = False,
) -> None:
    """Make a SOLO model from an LLM: add four tokens and one linear layer; text logits stay the same."""
    quiet_libraries()
    from solo_vlm.models.checks import check_weights
    from solo_vlm.models.from_llm import ImageDesign, from_llm
    from solo_vlm.models.solo.configuration_solo import SoloConfig
    from solo_vlm.models.solo.modeling_solo import SoloForConditionalGeneration
    from solo_vlm.models.stops import stop_ids
    from solo_vlm.utils.files import check_new

    check_new(out)
    images = _image_processor(image_size, max_patches)
    design = ImageDesign(image_attention, image_positions, rope_base_2d, patch_embedding)
    solo = from_llm(llm, gguf_file, dtype, seed, images, design)
    certificate = _checked(solo, llm)
    solo.save(out)
    check_weights(out, lambda: SoloForConditionalGeneration(SoloConfig.from_pretrained(str(out))))
    config = solo.model.config
    facts = {
        "out": str(out),
        "llm": config.text_config.model_type,
        "parameters": solo.model.num_parameters(),
        "patch_embedding": sum(p.numel() for p in solo.model.model.embed_vision_patch.parameters()),
        "vocabulary": config.text_config.vocab_size,
        "vision_token_ids": list(config.vision_token_ids),
        "chat_template": solo.chat_template,
        "stop_tokens": solo.processor.tokenizer.convert_ids_to_tokens(stop_ids(solo.model.generation_config)),
        "checks": certificate.as_dict()["properties"],
    }
    if json:
        return print_json(facts)
    STDOUT.print(
        f"{out}: {facts['llm']} with {facts['parameters']:,} parameters, of which "
        f"{facts['patch_embedding']:,} embed patches; train it next: solo train RECIPE model={out}\n"
        "checked: text logits, settings, chat template, labels, patches, weights on disk, and a tiny model "
        f"of the family; all properties of this one: solo check {out} --llm {llm}\n"
        f"chat template: {solo.chat_template_name}; answers end at {' '.join(facts['stop_tokens'])}",
        markup=False,
    )


def _checked(solo: SoloModelAndProcessor, llm: str) -> Certificate:
    """Check a new model before it is saved; what its family cannot do is a warning."""
    from solo_vlm.check.certificate import OF_INIT, PROPERTIES, certify_init

    certificate = certify_init(solo.model, solo.processor, llm)
    for name, finding in certificate.findings.items():
        if finding.status != "fails":
            continue
        what = f"{PROPERTIES[name][0]}: not so: {finding.detail}"
        if name in OF_INIT:
            raise SoloError(f"{llm}: {what}; please report this LLM")
        logger.warning("a tiny %s fails a check: %s", solo.model.config.text_config.model_type, what)
    return certificate


def _image_processor(size: str, max_patches: int | None) -> SoloImageProcessor:
    from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor

    if size.isdecimal():
        settings = {"longest_edge": int(size)}
    else:
        width, height = parse_pixels("--image-size", size)
        settings = {"height": height, "width": width}
    try:
        return SoloImageProcessor(size=settings, max_patches=max_patches)
    except ValueError as error:
        budget = f" --max-patches {max_patches}" if max_patches else ""
        raise SoloError(f"--image-size {size}{budget}: {error}") from error
