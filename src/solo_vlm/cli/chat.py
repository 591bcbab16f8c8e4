"""`solo chat`: multi-turn conversation about images in the terminal."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.prompt import Prompt

from solo_vlm.cli._common import STDOUT, QuantizeOption, quiet_libraries
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from solo_vlm.generate.conversation import Conversation

_HELP = """/image PATH|URL   show the model an image with your next message
/reset            forget the conversation
/save FILE        write the conversation as JSON
/load FILE        resume a saved conversation
/quit             quit (or Ctrl-D); Ctrl-C ends an answer"""


def chat(
    model: Annotated[str, typer.Option(help="Folder or hub ID of a SOLO model.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=2.0, help="Sampling temperature; 0 decodes greedily.")
    ] = 0.0,
    quantize: QuantizeOption = None,
) -> None:
    """Chat with a model about images."""
    quiet_libraries()
    _accept_any_bytes()
    from solo_vlm.generate import GenerationPipeline, PrefixCache
    from solo_vlm.generate.conversation import Conversation

    pipeline = GenerationPipeline.from_pretrained(model, quantize=quantize, prefix_cache=PrefixCache())
    conversation = Conversation(pipeline)
    STDOUT.print(_HELP, markup=False)
    while True:
        try:
            line = Prompt.ask("[bold]you[/bold]", console=STDOUT).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            STDOUT.print("\ntype /quit or press Ctrl-D to quit", style="dim")
            continue
        if line == "/quit":
            return
        try:
            _handle(conversation, line, {"max_new_tokens": max_new_tokens, "temperature": temperature})
        except SoloError as error:
            STDOUT.print(str(error), style="red", markup=False)
        except KeyboardInterrupt:
            STDOUT.print("\nstopped; the question was dropped", style="dim")


def _accept_any_bytes() -> None:
    """Let invalid UTF-8 reach the code that rejects it with a message, instead of crashing the input loop."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)


def _handle(conversation: Conversation, line: str, options: dict[str, Any]) -> None:
    """Run a command, or answer a message."""
    command, _, rest = line.partition(" ")
    match command:
        case "":
            return
        case "/image":
            conversation.add_images(_sources(rest.strip()))
        case "/reset":
            conversation.reset()
        case "/save":
            conversation.save(_path(rest, command))
            STDOUT.print(f"saved to {rest.strip()}", markup=False)
        case "/load":
            conversation.load(_path(rest, command))
            STDOUT.print(f"{len(conversation.turns)} turns")
        case _ if command.startswith("/"):
            STDOUT.print(_HELP, markup=False)
        case _:
            _answer(conversation, line, options)


def _answer(conversation: Conversation, message: str, options: dict[str, Any]) -> None:
    from solo_vlm.generate import check_prompt

    check_prompt(message)  # before the prefix "solo:" is printed
    with _catch_interrupt() as interrupted:
        STDOUT.print("[bold]solo[/bold]: ", end="")
        output = conversation.ask(
            message,
            lambda text: STDOUT.print(text, end="", markup=False),
            should_stop=interrupted,
            **options,
        )
    STDOUT.print(" (stopped)" if output.finish_reason == "cancelled" else "", style="dim")


@contextmanager
def _catch_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed; the second press raises KeyboardInterrupt."""
    pressed = False

    def on_sigint(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    previous = signal.signal(signal.SIGINT, on_sigint)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def _sources(text: str) -> list[str]:
    """Split paths and URLs as a shell does; a single path may contain unquoted spaces."""
    if not text:
        raise SoloError("/image needs a path or URL")
    try:
        words = [text] if Path(text).expanduser().is_file() else shlex.split(text)
    except ValueError as error:
        raise SoloError(f"/image: {str(error).lower()}") from error
    return [str(Path(word).expanduser()) if word.startswith("~") else word for word in words]


def _path(text: str, command: str) -> Path:
    if not text.strip() or "\0" in text:
        raise SoloError(f"{command} needs a file name")
    return Path(text.strip()).expanduser()
