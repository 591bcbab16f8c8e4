"""One sample is one chat. This file says what a chat may look like on disk and reads it into one form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

ImageSource = bytes | str


class SampleError(ValueError):
    """A sample that cannot be used. `reason` is a short, countable name; the message has the details."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class Sample:
    """A chat with its images, in the one form that everything behind the sources works on.

    Attributes:
        messages: `{"role": ..., "content": [{"type": "text", "text": ...} | {"type": "image"}, ...]}`. Only
            assistant turns: a document (pre-training). With user turns: a conversation.
        images: encoded bytes, or a path, http(s) URL or data URL; in order of the image parts.
        id: the data set's name for the sample, where it has one.
    """

    messages: list[dict[str, Any]]
    images: list[ImageSource]
    id: str | None = None


class _TextPart(BaseModel):
    type: Literal["text"]
    text: str


class _ImagePart(BaseModel):
    model_config = ConfigDict(extra="ignore")
    type: Literal["image", "image_url"]
    image: bytes | str | None = None
    path: str | None = None
    url: str | None = None
    base64: str | None = None
    image_url: str | dict[str, Any] | None = None

    def source(self) -> ImageSource | None:
        """The image that the part itself carries, if it does."""
        url = self.image_url["url"] if isinstance(self.image_url, dict) else self.image_url
        return self.image or self.path or self.url or self.base64 or url


class _Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: list[Annotated[_TextPart | _ImagePart, Field(discriminator="type")]]

    @field_validator("content", mode="before")
    @classmethod
    def _string_is_one_text_part(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _StoredImage(BaseModel):
    data: bytes | None = Field(None, alias="bytes")
    path: str | None = None


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore")
    id: str | int | None = None
    messages: list[_Message] = Field(min_length=1)
    images: list[_StoredImage | bytes | str] | None = None


def parse_sample(row: dict[str, Any]) -> Sample:
    """Validate one row and bring it into the form of `Sample`.

    A row has `messages` in OpenAI's style. An image part carries its image (`image`, `path`, `url`, `base64`
    or `image_url`), or takes the next one of the row's `images` (bytes, strings or `{"bytes", "path"}`).

    Raises:
        SampleError: with the field at fault; `reason` is "schema" or "image-count".
    """
    try:
        parsed = _Row.model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(step) for step in first["loc"])
        raise SampleError("schema", f"field {field}: {first['msg']}") from error
    stored = iter([_stored_source(image) for image in parsed.images or []])
    messages, images = [], []
    for message in parsed.messages:
        parts: list[dict[str, str]] = []
        for part in message.content:
            if isinstance(part, _TextPart):
                parts.append({"type": "text", "text": part.text})
                continue
            source = part.source() or next(stored, None)
            if source is None:
                raise SampleError("image-count", "more image parts than images")
            parts.append({"type": "image"})
            images.append(source)
        messages.append({"role": message.role, "content": parts})
    if next(stored, None) is not None:
        raise SampleError("image-count", "more images than image parts")
    return Sample(messages, images, None if parsed.id is None else str(parsed.id))


def _stored_source(image: _StoredImage | bytes | str) -> ImageSource | None:
    return (image.data or image.path) if isinstance(image, _StoredImage) else image
