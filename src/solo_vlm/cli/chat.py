"""`solo chat`: a conversation in the terminal, with images."""

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
/load FILE        go on with one that was saved
/quit             leave (so does Ctrl-D); Ctrl-C ends an answer"""


def chat(
    model: Annotated[str, typer.Option(help="Folder or hub id of a SOLO model.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0: the likeliest answer.")] = 0.0,
    quantize: QuantizeOption = None,
) -> None:
    """Talk with a model about images."""
    quiet_libraries()
    _accept_any_bytes()
    from solo_vlm.generate import GenerationPipeline, PrefixCache
    from solo_vlm.generate.conversation import Conversation

    pipeline = GenerationPipeline.from_pretrained(model, quantize=quantize, prefix_cache=PrefixCache())
    conversation = Conversation(pipeline)
    STDOUT.print(_HELP, highlight=False, markup=False)
    while True:
        try:
            line = Prompt.ask("[bold]you[/bold]", console=STDOUT).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            STDOUT.print("\n/quit leaves, and so does Ctrl-D", style="dim")
            continue
        if line == "/quit":
            return
        try:
            _take(conversation, line, {"max_new_tokens": max_new_tokens, "temperature": temperature})
        except SoloError as error:
            STDOUT.print(str(error), style="red", markup=False, highlight=False)
        except KeyboardInterrupt:
            STDOUT.print("\nstopped; the question is forgotten", style="dim")


def _accept_any_bytes() -> None:
    """Let bytes that are no text reach the code that refuses them, rather than end the program."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)


def _take(conversation: Conversation, line: str, options: dict[str, Any]) -> None:
    """Obey a command, or answer a message."""
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
            STDOUT.print(f"saved to {rest.strip()}", markup=False, highlight=False)
        case "/load":
            conversation.load(_path(rest, command))
            STDOUT.print(f"{len(conversation.turns)} turns", highlight=False)
        case _ if command.startswith("/"):
            STDOUT.print(_HELP, highlight=False, markup=False)
        case _:
            _answer(conversation, line, options)


def _answer(conversation: Conversation, message: str, options: dict[str, Any]) -> None:
    from solo_vlm.generate import check_prompt

    check_prompt(message)  # before the answer is announced
    with _interrupts() as interrupted:
        STDOUT.print("[bold]solo[/bold]: ", end="")
        output = conversation.ask(
            message,
            lambda text: STDOUT.print(text, end="", markup=False, highlight=False),
            should_stop=interrupted,
            **options,
        )
    STDOUT.print(" (stopped)" if output.finish_reason == "cancelled" else "", style="dim")


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Yield what tells whether Ctrl-C was pressed; pressed again, it interrupts at once."""
    pressed = False

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    usual = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, usual)


def _sources(text: str) -> list[str]:
    """Paths and URLs as a shell would take them; one path may have blanks without quotes."""
    if not text:
        raise SoloError("say which: /image PATH or URL")
    try:
        words = [text] if Path(text).expanduser().is_file() else shlex.split(text)
    except ValueError as error:
        raise SoloError(f"/image: {str(error).lower()}") from error
    return [str(Path(word).expanduser()) if word.startswith("~") else word for word in words]


def _path(text: str, command: str) -> Path:
    if not text.strip() or "\0" in text:
        raise SoloError(f"say where: {command} FILE")
    return Path(text.strip()).expanduser()
