"""A conversation about images: the turns so far, and how they lie on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from solo_vlm.data.image_values import locate_images
from solo_vlm.data.sample import SampleError, parse_sample
from solo_vlm.data.text_values import load_json
from solo_vlm.generate.pipeline import GenerationOutput, GenerationPipeline, open_images, user_turn
from solo_vlm.models.solo.processing_solo import Message
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_file
from solo_vlm.utils.json_lines import json_line


class Conversation:
    """Turns between a user and a model, and images that wait for the next question.

    What fails leaves the conversation as it was.

    Args:
        pipeline: with a prefix cache, so that each question takes only its own tokens.
    """

    def __init__(self, pipeline: GenerationPipeline) -> None:
        self.turns: list[Message] = []
        self._pipeline = pipeline
        self._waiting: list[dict[str, Any]] = []

    def add_images(self, sources: Sequence[str]) -> None:
        """Images for the next question, by path or URL.

        Raises:
            SoloError: naming the one that cannot be read; then none is added.
        """
        self._waiting += _image_parts(sources)

    def ask(self, question: str, on_text: Callable[[str], None], **options: Any) -> GenerationOutput:
        """Answer a question about the images that wait, and all before.

        Args:
            question: the user's.
            on_text: see `GenerationPipeline.stream`, as for `options`.

        Raises:
            SoloError: the conversation is too long.
        """
        turn = user_turn(question, [])
        turn["content"] = [*self._waiting, *turn["content"]]
        output = self._pipeline.stream([*self.turns, turn], on_text, **options)
        self.turns += [turn, {"role": "assistant", "content": output.text}]
        self._waiting = []
        return output

    def reset(self) -> None:
        """Forget all turns and images."""
        self.turns, self._waiting = [], []

    def save(self, path: Path) -> None:
        """Write the turns as JSON, with the images' paths: a sample that training can read, too.

        Raises:
            SoloError: the file cannot be written.
        """
        plain = [{**turn, "content": _without_pixels(turn["content"])} for turn in self.turns]
        try:
            with new_file(path) as partial:
                partial.write_bytes(json_line({"messages": plain}))
        except OSError as error:
            raise SoloError(f"cannot write {path}: {error.strerror}") from error

    def load(self, path: Path) -> None:
        """Go on with a conversation that was saved; the present one is forgotten.

        Raises:
            SoloError: there is none in the file, or an image is no longer where it was.
        """
        try:
            row = load_json(path.read_bytes())
            sample = parse_sample(locate_images(row, str(path.parent.absolute())))
        except OSError as error:
            raise SoloError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, TypeError, SampleError) as error:
            raise SoloError(f"{path} holds no conversation: {error}") from error
        images = iter(_image_parts([str(source) for source in sample.images]))
        turns = [
            {
                **message,
                "content": [next(images) if part["type"] == "image" else part for part in message["content"]],
            }
            for message in sample.messages
        ]
        self.turns, self._waiting = turns, []


def _image_parts(sources: Sequence[str]) -> list[dict[str, Any]]:
    images = open_images(sources)
    return [
        {"type": "image", "image": image, "path": _absolute(source)}
        for source, image in zip(sources, images, strict=True)
    ]


def _absolute(source: str) -> str:
    """A path as one that a file in any folder can hold."""
    is_url = "://" in source or source.lower().startswith(("data:", "file:"))
    return source if is_url else str(Path(source).absolute())


def _without_pixels(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [{key: value for key, value in part.items() if key != "image"} for part in content]
