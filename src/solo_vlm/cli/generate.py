"""`solo generate`: one answer about a prompt and images, or one per image of a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from solo_vlm.cli._common import STDOUT, JsonOption, QuantizeOption, print_json, progress_bar, quiet_libraries
from solo_vlm.utils.errors import SoloError


def generate(
    model: Annotated[str, typer.Option(help="Folder or hub ID of a SOLO model.")],
    prompt: Annotated[str, typer.Option(help="Question or instruction.")],
    image: Annotated[list[str] | None, typer.Option(help="Path or URL of an image; repeatable.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder: answer about each of its images.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --images: JSON Lines file of the answers.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --images: images per batch.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=2.0, help="Sampling temperature; 0 decodes greedily.")
    ] = 0.0,
    quantize: QuantizeOption = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the decoding step (on a GPU).")] = False,
    json: JsonOption = False,
) -> None:
    """Answer a prompt about images; the text streams as it is generated.

    With --images, answer about each image of a folder and write the answers to --out. An interrupted run
    resumes where it stopped.
    """
    quiet_libraries()
    from solo_vlm.generate import GenerationPipeline, check_prompt, open_images, user_turn
    from solo_vlm.generate.folder import answer_folder, find_images

    check_prompt(prompt)
    if images is not None:
        if image or temperature or out is None:
            raise SoloError("--images FOLDER needs --out FILE and does not support --image and --temperature")
        names = find_images(images)
        pipeline = GenerationPipeline.from_pretrained(model, quantize=quantize, compile=compile)
        request = {"prompt": prompt, "model": model, "max_new_tokens": max_new_tokens}
        with progress_bar("images") as on_progress:
            counts = answer_folder(pipeline, names, images, request, out, batch_size, on_progress)
        if json:
            return print_json({"out": str(out), **vars(counts)})
        failed = f", {counts.errors} could not be answered (see error)" if counts.errors else ""
        return STDOUT.print(f"{counts.answers} answers in {out}{failed}", markup=False)
    if out is not None:
        raise SoloError("--out needs --images FOLDER")
    opened = open_images(image or [])
    pipeline = GenerationPipeline.from_pretrained(model, quantize=quantize, compile=compile)

    def on_text(text: str) -> None:
        if not json:
            sys.stdout.write(text)
            sys.stdout.flush()

    output = pipeline.stream([user_turn(prompt, opened)], on_text, max_new_tokens, temperature)
    if not json:
        return print()
    print_json(
        {
            "prompt": prompt,
            "images": image or [],
            "answer": output.text,
            "prompt_tokens": output.prompt_tokens,
            "cached_tokens": output.cached_tokens,
            "num_patches": output.num_patches,
            "answer_tokens": output.completion_tokens,
            "finish": output.finish_reason,
            "seconds": {"first_token": output.time_to_first_token, "all": output.total_time},
        }
    )
