"""`solo chat`: a conversation in the terminal, with images."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.prompt import Prompt

from solo_vlm.cli._console import STDOUT, quiet_libraries
from solo_vlm.errors import SoloError

_HELP = """/image PATH   show the model an image with your next message
/reset        forget the conversation
/save FILE    write the conversation as JSON
/quit         leave (so does Ctrl-D)"""


def chat(
    model: Annotated[str, typer.Option(help="Folder or hub id of a SOLO model.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest answer.")] = 0.0,
) -> None:
    """Talk with a model about images."""
    quiet_libraries()
    from solo_vlm.generate import Answerer

    conversation = _Conversation(Answerer.load(model), max_new_tokens, temperature)
    STDOUT.print(_HELP, highlight=False)
    while True:
        try:
            line = Prompt.ask("[bold]you[/bold]", console=STDOUT).strip()
        except EOFError:
            return
        if line == "/quit":
            return
        try:
            conversation.take(line)
        except SoloError as error:
            STDOUT.print(f"{error}", style="red", highlight=False)


class _Conversation:
    """The turns so far, and images that wait for the next message."""

    def __init__(self, answerer: Any, max_new_tokens: int, temperature: float) -> None:
        self._answerer = answerer
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._turns: list[dict[str, Any]] = []
        self._images: list[tuple[str, Any]] = []

    def take(self, line: str) -> None:
        """Obey a command, or answer a message."""
        command, _, rest = line.partition(" ")
        match command:
            case "":
                return
            case "/image":
                self._add_image(rest)
            case "/reset":
                self._turns, self._images = [], []
            case "/save":
                self._save(rest)
            case _ if command.startswith("/"):
                STDOUT.print(_HELP, highlight=False)
            case _:
                self._answer(line)

    def _add_image(self, rest: str) -> None:
        from solo_vlm.generate import open_images

        paths = shlex.split(rest)
        self._images += zip(paths, open_images(paths), strict=True)

    def _answer(self, message: str) -> None:
        from solo_vlm.generate import user_turn

        turn = user_turn(message, [image for _, image in self._images])
        STDOUT.print("[bold]solo[/bold]: ", end="")
        result = self._answerer.stream(
            [*self._turns, turn],
            lambda text: STDOUT.print(text, end="", markup=False, highlight=False),
            self._max_new_tokens,
            self._temperature,
        )
        STDOUT.print()
        for part, (path, _) in zip(turn["content"], self._images, strict=False):
            part["path"] = path
        self._turns += [turn, {"role": "assistant", "content": result["answer"]}]
        self._images = []

    def _save(self, rest: str) -> None:
        """Write the turns with the images' paths: a sample that training can read."""
        from solo_vlm.files import new_file

        if not rest:
            raise SoloError("say where: /save FILE")
        with new_file(Path(rest)) as partial:
            partial.write_text(json.dumps({"messages": [_plain(turn) for turn in self._turns]}) + "\n")
        STDOUT.print(f"saved to {rest}", highlight=False)


def _plain(turn: dict[str, Any]) -> dict[str, Any]:
    if isinstance(turn["content"], str):
        return turn
    parts = [{key: value for key, value in part.items() if key != "image"} for part in turn["content"]]
    return {**turn, "content": parts}
