"""Multi-turn conversation about images, with saving and loading."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from solo_vlm.data.sample import SampleError, parse_sample
from solo_vlm.data.values import load_json, locate_images
from solo_vlm.generate.pipeline import GenerationOutput, GenerationPipeline, open_images, user_turn
from solo_vlm.models.solo.processing_solo import Message
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_file
from solo_vlm.utils.json_lines import json_line


class Conversation:
    """Turns between a user and a model, and images pending for the next question.

    A failed call leaves the conversation unchanged.

    Args:
        pipeline: Model with its processor; with a prefix cache, only new tokens are computed.
    """

    def __init__(self, pipeline: GenerationPipeline) -> None:
        self.turns: list[Message] = []
        self._pipeline = pipeline
        self._pending_images: list[dict[str, Any]] = []

    def add_images(self, sources: Sequence[str]) -> None:
        """Add images to the next question, by path or URL.

        Raises:
            SoloError: An image cannot be read; none is added.
        """
        self._pending_images += _image_parts(sources)

    def ask(self, question: str, on_text: Callable[[str], None], **options: Any) -> GenerationOutput:
        """Answer a question about the pending images and all earlier turns.

        Args:
            on_text, **options: See `GenerationPipeline.stream`.

        Raises:
            SoloError: The conversation exceeds the context length.
        """
        turn = user_turn(question, [])
        turn["content"] = [*self._pending_images, *turn["content"]]
        output = self._pipeline.stream([*self.turns, turn], on_text, **options)
        self.turns += [turn, {"role": "assistant", "content": output.text}]
        self._pending_images = []
        return output

    def reset(self) -> None:
        """Drop all turns and pending images."""
        self.turns, self._pending_images = [], []

    def save(self, path: Path) -> None:
        """Write the turns as JSON with the paths of the images, which is also a training sample.

        Raises:
            SoloError: The file cannot be written.
        """
        turns = [{**turn, "content": _without_pixels(turn["content"])} for turn in self.turns]
        try:
            with new_file(path) as partial:
                partial.write_bytes(json_line({"messages": turns}))
        except OSError as error:
            raise SoloError(f"cannot write {path}: {error.strerror}") from error

    def load(self, path: Path) -> None:
        """Replace the conversation by a saved one.

        Raises:
            SoloError: The file is not a conversation, or an image has moved.
        """
        try:
            row = load_json(path.read_bytes())
            sample = parse_sample(locate_images(row, str(path.parent.absolute())))
        except OSError as error:
            raise SoloError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, TypeError, SampleError) as error:
            raise SoloError(f"{path} is not a conversation: {error}") from error
        images = iter(_image_parts([str(source) for source in sample.images]))
        turns = [
            {
                **message,
                "content": [next(images) if part["type"] == "image" else part for part in message["content"]],
            }
            for message in sample.messages
        ]
        self.turns, self._pending_images = turns, []


def _image_parts(sources: Sequence[str]) -> list[dict[str, Any]]:
    images = open_images(sources)
    return [
        {"type": "image", "image": image, "path": _absolute(source)}
        for source, image in zip(sources, images, strict=True)
    ]


def _absolute(source: str) -> str:
    is_url = "://" in source or source.lower().startswith(("data:", "file:"))
    return source if is_url else str(Path(source).absolute())


def _without_pixels(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [{key: value for key, value in part.items() if key != "image"} for part in content]
