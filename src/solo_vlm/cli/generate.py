"""`solo generate`: one answer about a prompt and images."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from solo_vlm.cli._console import print_json, quiet_libraries


def generate(
    model: Annotated[str, typer.Option(help="Folder or hub id of a SOLO model.")],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[list[str] | None, typer.Option(help="Path or URL; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest answer.")] = 0.0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer a prompt about images; the text streams as it is generated."""
    quiet_libraries()
    from solo_vlm.generate import Answerer, open_images, user_turn

    images = open_images(image or [])
    answerer = Answerer.load(model)
    times = [time.perf_counter()]

    def on_text(text: str) -> None:
        times.append(time.perf_counter())
        if not json:
            sys.stdout.write(text)
            sys.stdout.flush()

    result = answerer.stream([user_turn(prompt, images)], on_text, max_new_tokens, temperature)
    if json:
        seconds = {
            "first_token": times[min(1, len(times) - 1)] - times[0],
            "all": time.perf_counter() - times[0],
        }
        print_json({"prompt": prompt, "images": image or [], **result, "seconds": seconds})
    else:
        print()
