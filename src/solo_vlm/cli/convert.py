"""`solo convert`: checkpoints of the original SOLO code, Megatron-LLM and training runs to model folders."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from solo_vlm.cli._common import STDOUT, JsonOption, print_json, quiet_libraries
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from solo_vlm.convert.model_folder import Converted

app = typer.Typer(
    help="Convert checkpoints of the original SOLO code, Megatron-LLM and training runs to model folders.",
    no_args_is_help=True,
)


Layout = Literal["paper", "original"]
Source = Annotated[Path, typer.Argument(metavar="SRC", help="Folder to convert.")]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="New folder.")]


@app.command()
def release(
    src: Source,
    dst: Destination,
    layout: Annotated[
        Layout, typer.Option(help="Token layout of images in chats; SOLO-7B was fine-tuned with 'original'.")
    ] = "original",
    json: JsonOption = False,
) -> None:
    """Convert the folder of SOLO-7B, or of a model fine-tuned from it with the original SOLO code."""
    quiet_libraries()
    from solo_vlm.convert.original import convert_original

    _report(convert_original(src, dst, layout), json)


@app.command()
def megatron(
    src: Source,
    dst: Destination,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder with tokenizer.model. Default: SRC.")] = None,
    vocabulary: Annotated[
        int | None, typer.Option(help="Tokens without padding rows. Default: the tokenizer's.")
    ] = None,
    iteration: Annotated[int | None, typer.Option(help="Iteration. Default: the latest.")] = None,
    layout: Annotated[Layout, typer.Option(help="Token layout of images in chats.")] = "paper",
    rotary: Annotated[
        Literal["interleaved", "halves"],
        typer.Option(help="Row order of queries and keys; Megatron-LLM interleaves."),
    ] = "interleaved",
    json: JsonOption = False,
) -> None:
    """Convert a Megatron-LLM checkpoint of any tensor- and pipeline-parallel size."""
    quiet_libraries()
    from solo_vlm.convert.megatron import convert_megatron

    _report(convert_megatron(src, dst, tokenizer, vocabulary, iteration, layout, rotary), json)


@app.command()
def to_release(src: Source, dst: Destination, json: JsonOption = False) -> None:
    """Convert a model with a Mistral decoder to the format of the original SOLO code."""
    quiet_libraries()
    from solo_vlm.convert.original import convert_to_original

    facts = convert_to_original(src, dst)
    _print(facts, f"{dst}: {facts['tensors']} tensors, {_size(facts['bytes'])}", json)


@app.command()
def checkpoint(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Folder of a training run, or URL of its checkpoints.")
    ],
    dst: Destination,
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint. Default: the newest.")] = None,
    best: Annotated[bool, typer.Option("--best", help="The best by the recipe's validation.best.")] = False,
    json: JsonOption = False,
) -> None:
    """Convert a checkpoint of a training run, which may still be running."""
    if best and step is not None:
        raise SoloError("give either --step or --best")
    quiet_libraries()
    from solo_vlm.train.checkpoint import export_checkpoint

    exported = export_checkpoint(run, dst, step, best)
    _print({"out": str(dst), "step": exported}, f"{dst}: the model after step {exported}", json)


def _report(converted: Converted, json: bool) -> None:
    tokens = "no tokenizer" if converted.tokens is None else f"{converted.tokens:,} tokens"
    text = (
        f"{converted.out}: {converted.tensors} tensors, {_size(converted.bytes)} in {converted.dtype}; "
        f"{converted.vocabulary:,} embedding rows, {tokens}"
    )
    if converted.tokens is not None:
        text += f"; try it: solo generate --model {converted.out} --image FILE --prompt TEXT"
    _print(asdict(converted), text, json)


def _print(facts: dict[str, Any], text: str, json: bool) -> None:
    if json:
        print_json(facts)
    else:
        STDOUT.print(text)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
