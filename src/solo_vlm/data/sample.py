"""Samples: validation of chats in all supported row formats, and conversion to one form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from solo_vlm.data.values import (
    COLUMNS,
    PART_KEYS,
    ImageSource,
    check_text,
    data_url,
    image_source,
    image_sources,
    looks_like_image,
    printable,
    sample_id,
)

IMAGE_PLACEHOLDER = "<image>"

_OTHER_PLACEHOLDERS = re.compile(
    r"<\|(image(_\d+|_pad|_start)?|vision_start)\|>|<image[ _]\d+>|<image_placeholder>|<start_of_image>"
    r"|<ImageHere>|\[IMG\]|<img>[^<]*</img>|<(video|audio)>"
)
_UNREAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
_MASKS = ("weight", "train", "loss")  # OpenAI's, axolotl's and ms-swift's

Part = str | tuple[ImageSource | None]  # a text, or an image with its source, if it is known
_WAITING: Part = (None,)


class SampleError(ValueError):
    """Unusable sample. `reason` is a short name for counting; the message has the details."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {printable(detail)}")
        self.reason = reason


class FilteredRow(SampleError):
    """Row that the filter of its source leaves out; it is counted apart from unusable ones."""

    def __init__(self, expression: str) -> None:
        super().__init__("filtered", f"not {expression}")


@dataclass(frozen=True)
class Sample:
    """Chat with its images, in the form that all code after the sources uses.

    Attributes:
        messages: Turns, `{"role": ..., "content": [{"type": "text", "text": ...} | {"type": "image"}, ...]}`.
            Assistant turns alone form a document (pre-training); with user turns, it is a conversation.
        images: Images in order of the image parts: encoded bytes, a path, or a URL (http(s), data, file, or
            one for fsspec).
        id: ID of the sample in its data set, if it has one.
    """

    messages: list[dict[str, Any]]
    images: list[ImageSource]
    id: str | None = None


_Text = Annotated[str, AfterValidator(check_text)]
_Image = Annotated[Any, BeforeValidator(image_source)]
_Images = Annotated[Any, BeforeValidator(image_sources)]


class _TextPart(BaseModel):
    type: Literal["text"]
    text: _Text

    @model_validator(mode="before")
    @classmethod
    def _reject_image(cls, part: dict[str, Any]) -> dict[str, Any]:
        for key in part.keys() & PART_KEYS:
            if image_source(part[key]) is not None:
                raise ValueError(f"a text part has an image in {key}: put the image into a separate part")
        return part


class _ImagePart(BaseModel):
    type: Literal["image", "image_url"]
    image: _Image = None
    path: _Image = None
    url: _Image = None
    base64: Annotated[Any, BeforeValidator(lambda value: image_source(data_url(value)))] = None
    image_url: _Image = None

    @model_validator(mode="before")
    @classmethod
    def _reject_unread_image(cls, part: dict[str, Any]) -> dict[str, Any]:
        for key in part.keys() - {"type", *PART_KEYS}:
            values = part[key].values() if isinstance(part[key], dict) else [part[key]]
            if any(map(looks_like_image, values)):
                raise ValueError(
                    f"an image part has an image in {key}, which is not read: rename it to image"
                )
        return part

    def source(self) -> ImageSource | None:
        """Return the part's own image, if it has one."""
        return next((source for key in PART_KEYS if (source := getattr(self, key)) is not None), None)


class _ImageHolder(BaseModel):
    image: _Images = ()  # pydantic copies a list for every row
    images: _Images = ()

    def own_images(self) -> Sequence[ImageSource]:
        if self.images and any(image not in self.images for image in self.image):
            raise SampleError("image-count", "image and images differ: fill one of them")
        return self.images or self.image


class _Message(_ImageHolder):
    role: Literal["system", "user", "assistant"]
    content: list[Annotated[_TextPart | _ImagePart, Field(discriminator="type")]]

    @field_validator("content", mode="before")
    @classmethod
    def _string_is_one_text_part(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    def parts(self) -> list[Part]:
        """Return the content with the message's own images inserted."""
        parts: list[Part] = [
            part.text if isinstance(part, _TextPart) else (part.source(),) for part in self.content
        ]
        images = self.own_images()
        return _place([parts], images, before=0)[0] if images else parts


class _Row(_ImageHolder):
    messages: list[_Message] = Field(min_length=1)


def parse_sample(row: dict[str, Any]) -> Sample:
    """Validate one row and convert it to a `Sample`.

    A row has `messages` in OpenAI's style. An image part contains its image (`image`, `path`, `url`, `base64`
    or `image_url`), or takes the next one of the row's `images` or `image`. If no message has image parts,
    the images replace `<image>` in the texts; without placeholders, `image` precedes the first text of the
    user, or of a document. A message may have its own `image` or `images`.

    Raises:
        SampleError: The row is invalid; `reason` is "schema", "turn", "text-empty", "image-count" or
            "image-column".
    """
    try:
        parsed = _Row.model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(step) for step in first["loc"])
        raise SampleError("schema", f"field {field}: {first['msg']}") from error
    for message in row["messages"]:
        check_turn(message, message["role"])
    roles = [message.role for message in parsed.messages]
    first_text = roles.index("user") if "user" in roles else 0
    contents = _place(
        [message.parts() for message in parsed.messages],
        parsed.own_images(),
        before=None if parsed.images else first_text,
    )
    images = [part[0] for content in contents for part in content if isinstance(part, tuple)]
    if not images:
        _check_for_lost_image(row, parsed)
    _check_texts(roles, contents, bool(images))
    messages = [
        {"role": role, "content": [_plain(part) for part in content]}
        for role, content in zip(roles, contents, strict=True)
    ]
    return Sample(messages, [image for image in images if image is not None], sample_id(row.get("id")))


def check_turn(turn: Mapping[str, Any], role: str) -> None:
    """Reject a turn of the assistant with parts that are not read, or that must not be learned.

    Raises:
        SampleError: It has tool calls or reasoning beside its content, or a weight ("turn").
    """
    if role != "assistant":
        return
    for name in _UNREAD:
        if turn.get(name) and not isinstance(turn[name], bool):  # some mark turns that have reasoning
            raise SampleError(
                "turn", f"{name} of the assistant is not read: put it into the content, or remove it"
            )
    for name in _MASKS:
        value = turn.get(name)
        is_mask = isinstance(value, bool) or (name == "weight" and isinstance(value, int | float))
        if is_mask and value != 1:
            raise SampleError("turn", f"{name} = {value} of a turn is not read: every answer is supervised")


def _check_texts(roles: Sequence[str], contents: Sequence[list[Part]], has_images: bool) -> None:
    """Reject turns without content, and texts with another program's placeholder of an image."""
    asking = "user" if "user" in roles else "assistant"
    for number, (role, content) in enumerate(zip(roles, contents, strict=True)):
        texts = [part for part in content if isinstance(part, str)]
        if role != "system" and len(texts) == len(content) and not any(map(str.strip, texts)):
            raise SampleError("text-empty", f"turn {number}, of the {role}, is empty")
        found = filter(None, map(_OTHER_PLACEHOLDERS.search, texts))
        if has_images and role == asking and (mark := next(found, None)):
            raise SampleError(
                "image-count",
                f"{mark.group()[:80]} is not read as an image's place: write {IMAGE_PLACEHOLDER}",
            )


def _plain(part: Part) -> dict[str, str]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}


def _place(contents: list[list[Part]], images: Sequence[ImageSource], before: int | None) -> list[list[Part]]:
    """Assign images to parts without one, to placeholders in texts, or to the beginning of a message.

    Args:
        contents: Parts of messages.
        images: Images, one per place.
        before: Index of the message that starts with images without a place; None if they are an error.
    """
    parts = [part for content in contents for part in content]
    waiting = parts.count(_WAITING)
    marks = sum(part.count(IMAGE_PLACEHOLDER) for part in parts if isinstance(part, str))
    if images and all(isinstance(part, str) for part in parts):
        if marks == len(images):
            contents = [[piece for part in content for piece in _split(part)] for content in contents]
            waiting = marks
        elif marks:
            raise SampleError(
                "image-count", f"{marks} {IMAGE_PLACEHOLDER} placeholders for {len(images)} images"
            )
        elif before is not None:
            contents = list(contents)
            contents[before] = [_WAITING] * len(images) + contents[before]
            waiting = len(images)
    if waiting != len(images):
        more, less = ("image parts", "images") if waiting > len(images) else ("images", "image parts")
        raise SampleError("image-count", f"more {more} than {less}")
    sources = iter(images)
    return [[(next(sources),) if part == _WAITING else part for part in content] for content in contents]


def _split(part: Part) -> list[Part]:
    """Split a text at its placeholders into stripped texts and images without a source."""
    if not isinstance(part, str) or IMAGE_PLACEHOLDER not in part:
        return [part]
    pieces: list[Part] = []
    for text in part.split(IMAGE_PLACEHOLDER):
        pieces += [_WAITING, text.strip()]
    return [piece for piece in pieces[1:] if piece]


def _check_for_lost_image(row: dict[str, Any], parsed: _Row) -> None:
    """Reject a row without images if its image is empty or in a column that is not read."""
    asked = [
        part.text
        for message in parsed.messages
        for part in message.content
        if message.role == "user" and isinstance(part, _TextPart)
    ]
    named = {name for holder in (row, *row["messages"]) for name in COLUMNS if name in holder}
    if named and any(IMAGE_PLACEHOLDER in text for text in asked):
        raise SampleError(
            "image-count", f"{IMAGE_PLACEHOLDER} in the text, but {min(named)} is empty: there is no image"
        )
    columns = [(name, value) for name, value in row.items() if name not in ("id", *_Row.model_fields)]
    for number, message in enumerate(row["messages"]):
        columns += [
            (f"messages.{number}.{name}", value)
            for name, value in message.items()
            if name not in _Message.model_fields
        ]
    for name, value in columns:
        if looks_like_image(value):
            raise SampleError(
                "image-column", f"{name} looks like an image; rename it to image or images to use it"
            )
