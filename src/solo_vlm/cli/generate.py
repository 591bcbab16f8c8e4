"""`solo generate`: one answer about a prompt and images, or one about every image of a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from solo_vlm.cli._common import STDOUT, QuantizeOption, print_json, progress_bar, quiet_libraries
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from solo_vlm.generate import GenerationPipeline


def generate(
    model: Annotated[str, typer.Option(help="Folder or hub id of a SOLO model.")],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[list[str] | None, typer.Option(help="Path or URL; may be repeated.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder: ask about each of its images.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --images: the answers, as JSON lines.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --images: images answered at once.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0: the likeliest answer.")] = 0.0,
    quantize: QuantizeOption = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the decoding (on a GPU).")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer a prompt about images; the text streams as it is generated.

    With --images, ask it about each image of a folder, and write the answers to --out. A run that was stopped
    goes on where it stood.
    """
    quiet_libraries()
    from solo_vlm.generate import GenerationPipeline, check_prompt, open_images

    check_prompt(prompt)
    if images is None:
        if out is not None:
            raise SoloError("--out goes with --images FOLDER")
        opened = open_images(image or [])
        pipeline = GenerationPipeline.from_pretrained(model, quantize=quantize, compile=compile)
        _one(pipeline, prompt, image or [], opened, max_new_tokens, temperature, json)
        return
    if image or temperature or out is None:
        raise SoloError("--images FOLDER needs --out FILE, and goes with neither --image nor --temperature")
    from solo_vlm.generate.folder import find_images

    names = find_images(images)
    pipeline = GenerationPipeline.from_pretrained(model, quantize=quantize, compile=compile)
    request = {"prompt": prompt, "model": model, "max_new_tokens": max_new_tokens}
    _folder(pipeline, names, images, request, out, batch_size, json)


def _one(
    pipeline: GenerationPipeline,
    prompt: str,
    names: list[str],
    images: list[Any],
    max_new_tokens: int,
    temperature: float,
    json: bool,
) -> None:
    from solo_vlm.generate import user_turn

    def on_text(text: str) -> None:
        if not json:
            sys.stdout.write(text)
            sys.stdout.flush()

    output = pipeline.stream([user_turn(prompt, images)], on_text, max_new_tokens, temperature)
    if json:
        print_json(
            {
                "prompt": prompt,
                "images": names,
                "answer": output.text,
                "prompt_tokens": output.prompt_tokens,
                "cached_tokens": output.cached_tokens,
                "num_patches": output.num_patches,
                "answer_tokens": output.completion_tokens,
                "finish": output.finish_reason,
                "seconds": {"first_token": output.time_to_first_token, "all": output.total_time},
            }
        )
    else:
        print()


def _folder(
    pipeline: GenerationPipeline,
    names: list[str],
    folder: Path,
    request: dict[str, Any],
    out: Path,
    batch_size: int,
    json: bool,
) -> None:
    from solo_vlm.generate.folder import answer_folder

    with progress_bar("images") as on_progress:
        counts = answer_folder(pipeline, names, folder, request, out, batch_size, on_progress)
    if json:
        print_json({"out": str(out), **vars(counts)})
    else:
        faults = f", {counts.errors} could not be answered about (see error)" if counts.errors else ""
        STDOUT.print(f"{counts.answers} answers in {out}{faults}", markup=False, highlight=False)
