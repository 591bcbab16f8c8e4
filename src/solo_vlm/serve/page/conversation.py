"""What the page sends: the whole conversation each time, with images by their names."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from solo_vlm.models.solo.processing_solo import Message
from solo_vlm.serve.page.images import ImageStore
from solo_vlm.serve.page.limits import Limits
from solo_vlm.utils.errors import SoloError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Turn(_Strict):
    """Of the user or of the model; images stand before the text."""

    role: Literal["user", "assistant"]
    text: str = Field(min_length=1)
    images: tuple[str, ...] = ()


Turns = tuple[Turn, ...]


class Question(_Strict):
    """A chat that ends with the user's turn."""

    turns: Turns
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0.0, le=2.0)


class WordQuestion(_Strict):
    """A chat that ends with an answer, and a stretch of its characters (Unicode code points)."""

    turns: Turns
    start: int = Field(ge=0)
    end: int
    layer: int | None = Field(None, ge=0)


def check_turns(turns: Turns, limits: Limits, last: Literal["user", "assistant"]) -> None:
    """Make sure that user and model alternate, and that the chat keeps within the limits.

    Raises:
        SoloError: what is wrong.
    """
    roles = [turn.role for turn in turns]
    if roles != (["user", "assistant"] * len(roles))[: len(roles)] or roles[-1:] != [last]:
        raise SoloError(f"turns alternate, begin with the user's and end here with the {last}'s")
    if any(turn.images for turn in turns if turn.role == "assistant"):
        raise SoloError("only the user's turns have images")
    if (images := sum(len(turn.images) for turn in turns)) > limits.images:
        raise SoloError(f"{images} images in this chat, {limits.images} are possible: begin a new chat")
    if (length := sum(len(turn.text) for turn in turns)) > limits.characters:
        raise SoloError(
            f"{length:,} characters in this chat, {limits.characters:,} are possible: begin a new chat"
        )


def as_chat(turns: Turns, store: ImageStore) -> list[Message]:
    """Turns as `GenerationPipeline` and the encoder of samples read them.

    Raises:
        SoloError: an image is no longer held.
    """
    return [
        {
            "role": turn.role,
            "content": [
                *({"type": "image", "image": store.get(name).data} for name in turn.images),
                {"type": "text", "text": turn.text},
            ],
        }
        for turn in turns
    ]
