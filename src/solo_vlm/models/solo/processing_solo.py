"""Conversion of chats, texts and images to model inputs, with the same code in training and inference."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .bounded_template import render
from .chat_template import (
    SOLO_CHAT_TEMPLATE,
    ChatTemplateError,
    Message,
    check_roles,
    cut_turns,
    drops_system,
    end_tokens,
    is_original_template,
    original_chat_template,
    with_images,
)

ImageLayout = Literal["paper", "original"]

_PADDING = ("padding", "padding_side", "max_length", "pad_to_multiple_of")
_STAND_IN = "\ue000{index}\ue001"
_MAX_CHECKED_ROLES = 1000  # sequences of roles to remember
_STAND_IN_PATTERN = re.compile("\ue000(\\d+)\ue001")


def num_image_tokens(rows: int, columns: int) -> int:
    """Return the number of tokens of an image: patches, row separators, one token before and one after."""
    return rows * columns + rows + 1


def num_vision_tokens(image_grid_thw: Any) -> int:
    """Return the number of tokens of all images; `image_grid_thw` is an array or tensor, (num_images, 3)."""
    return sum(num_image_tokens(rows, columns) for _, rows, columns in image_grid_thw.tolist())


@dataclass(frozen=True)
class EncodedChat:
    """A tokenized chat.

    Attributes:
        input_ids: (length,) int64, with the tokens of every image.
        supervised: (length,) bool: True at the assistant's text and at the one token that ends each of its
            turns; never at a vision token.
    """

    input_ids: NDArray[np.int64]
    supervised: NDArray[np.bool_]


class SoloProcessor(ProcessorMixin):
    """Tokenizer and image processor with the token layout of images (SOLO paper, section 2).

    An image of R rows and C columns becomes `<vision>`, then C x `<vpatch>` per row with `<vrow_sep>` between
    rows, then `</vision>`: `num_image_tokens(R, C)` tokens. In a prompt string one `<vpatch>` marks an image;
    in a chat, an image part does, and text that spells a special token stays text.

    The original SOLO code fine-tuned SOLO-7B with another layout, which that checkpoint needs: an image ends
    with a second `<vision>`, and the images of a turn precede it, those of the first turn even `<s>`.

    Args:
        tokenizer: The LLM's tokenizer with the four vision tokens added.
        chat_template: Jinja source, or several by name, of which "default" is used.
        image_token: Spelling of `<vpatch>`, which differs where the LLM already had such a token.
        vision_start_token, vision_row_token, vision_end_token: Spelling of `<vision>`, `<vrow_sep>` and
            `</vision>`, which may differ too.
        image_layout: "paper" (the chat template places images), or "original" (the layout of SOLO-7B, with a
            specific chat template).
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<vpatch>",
        vision_start_token: str = "<vision>",
        vision_row_token: str = "<vrow_sep>",
        vision_end_token: str = "</vision>",
        image_layout: str = "paper",
        **kwargs: Any,
    ) -> None:
        if image_layout not in ("paper", "original"):
            raise ValueError(f'image_layout must be "paper" or "original", not {image_layout!r}')
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no EOS token: set eos_token in its tokenizer_config.json")
        self.image_layout = image_layout
        self.image_token = image_token
        self.vision_start_token = vision_start_token
        self.vision_row_token = vision_row_token
        self.vision_end_token = vision_end_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        vision_tokens = (vision_start_token, vision_row_token, vision_end_token)
        self._closing_token = vision_start_token if image_layout == "original" else vision_end_token
        self._start_id, self._row_id, self._closing_id = tokenizer.convert_tokens_to_ids(
            [vision_start_token, vision_row_token, self._closing_token]
        )
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        longest_first = sorted({*special, "\ue000"}, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)))
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        # BOS ends a turn only if it is EOS as well.
        self._control_tokens = added - {tokenizer.bos_token, image_token, *vision_tokens} | {
            tokenizer.eos_token
        }
        self._ends: dict[str | None, set[str]] = {}
        self._checked_roles: set[tuple[str | None, tuple[str, ...]]] = set()
        chat_template = _template_for(image_layout, chat_template, image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    # --- the layout of an image ---------------------------------------------------------------------

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return the tokens of one image as a string, which transformers substitutes for `<vpatch>`."""
        rows, columns = (int(n) for n in image_inputs["image_grid_thw"][image_idx][1:])
        body = self.vision_row_token.join([self.image_token * columns] * rows)
        return f"{self.vision_start_token}{body}{self._closing_token}"

    def image_input_ids(self, rows: int, columns: int) -> NDArray[np.int64]:
        """Return the token IDs of one image, (num_image_tokens,) int64."""
        ids = np.full((rows, columns + 1), self.image_token_id, dtype=np.int64)
        ids[:, -1] = self._row_id
        ids[-1, -1] = self._closing_id
        return np.concatenate([[self._start_id], ids.ravel()])

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Return tokens and patches per image of the given (height, width); part of vLLM's interface."""
        if image_sizes is None:
            return MultiModalData()
        grids = [self.image_processor.get_patch_grid(height, width) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[num_image_tokens(rows, columns) for rows, columns in grids],
            num_image_patches=[rows * columns for rows, columns in grids],
        )

    # --- chats --------------------------------------------------------------------------------------

    def encode_chat(
        self,
        messages: Sequence[Message],
        image_grid_thw: Sequence[Sequence[int] | NDArray[np.int64]] | NDArray[np.int64] = (),
        add_generation_prompt: bool = False,
    ) -> EncodedChat:
        """Tokenize a chat, or a document (assistant turns only), and mark the assistant's tokens.

        A document becomes BOS, its content, EOS. A chat is rendered by the chat template; each assistant turn
        is tokenized apart from the prompt before it, so training sees exactly the prompt tokens of inference.
        `cut_turns` locates and checks the assistant's text in the rendered chat.

        Args:
            messages: `{"role": ..., "content": str or parts}`; a part is `{"type": "text", "text": ...}` or
                `{"type": "image", ...}`.
            image_grid_thw: (num_images, 3): (1, rows, columns) per image, in the order of the image parts.
            add_generation_prompt: End with the prompt for the assistant's next answer.

        Raises:
            ChatTemplateError: The template rejects the chat, leaves out a message, or does not render it turn
                by turn.
            ValueError: The number of image parts and of grids differs.
        """
        protected: list[str] = []
        flat = [{**message, "content": self._flatten(message["content"], protected)} for message in messages]
        if all(message["role"] == "assistant" for message in flat) and not add_generation_prompt:
            segments = self._document_segments(flat)
        else:
            segments = self._chat_segments(flat, add_generation_prompt)

        images = sum(message["content"].count(self.image_token) for message in flat)
        if sum(text.count(self.image_token) for text, _ in segments) != images:
            raise ChatTemplateError("the chat template leaves out, repeats or rewrites an image")

        layouts = iter([self.image_input_ids(int(rows), int(columns)) for _, rows, columns in image_grid_thw])
        pieces: list[NDArray[np.int64]] = []
        marks: list[NDArray[np.bool_]] = []
        for text, supervised in segments:
            ids, is_text = self._tokenize(text, protected, layouts, first=not pieces)
            pieces.append(ids)
            marks.append(is_text & supervised)
        if next(layouts, None) is not None:
            raise ValueError(f"{len(image_grid_thw)} images were given, but the chat has fewer image parts")
        return EncodedChat(np.concatenate(pieces), np.concatenate(marks))

    def _flatten(self, content: str | Sequence[dict[str, Any]], protected: list[str]) -> str:
        """Join content parts: `<vpatch>` for an image, stand-ins for special tokens in text."""

        def stand_in(match: re.Match[str]) -> str:
            protected.append(match.group())
            return _STAND_IN.format(index=len(protected) - 1)

        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        return "".join(
            self._special_pattern.sub(stand_in, part["text"]) if part["type"] == "text" else self.image_token
            for part in content
        )

    def _document_segments(self, messages: list[Message]) -> list[tuple[str, bool]]:
        tokenizer = self.tokenizer
        body = "".join(message["content"] for message in messages)
        return [(tokenizer.bos_token or tokenizer.eos_token, False), (body + tokenizer.eos_token, True)]

    def _chat_segments(self, messages: list[Message], add_generation_prompt: bool) -> list[tuple[str, bool]]:
        """Render a chat and cut it where answers begin and end: [(text, supervised), ...]."""
        bos_token, eos_token = self.tokenizer.bos_token, self.tokenizer.eos_token
        segments = cut_turns(messages, add_generation_prompt, self._render, self._end_tokens(), eos_token)
        kind = (self.chat_template, tuple(message["role"] for message in messages))
        if kind not in self._checked_roles:
            check_roles(kind[1], self._render)
            if len(self._checked_roles) >= _MAX_CHECKED_ROLES:
                self._checked_roles.clear()
            self._checked_roles.add(kind)
        if not segments or segments[0][1]:  # the first token has no label, so an answer must not start there
            segments.insert(0, (bos_token or eos_token, False))
        elif bos_token and not self._begins_with_bos(segments[0][0]):
            segments[0] = (bos_token + segments[0][0], False)
        return segments

    def _begins_with_bos(self, rendered: str) -> bool:
        """Return whether only images precede BOS."""
        bos, image = re.escape(self.tokenizer.bos_token), re.escape(self.image_token)
        return re.match(f"(?:{image})*{bos}", rendered) is not None

    @property
    def end_of_turn_ids(self) -> list[int]:
        """IDs of the tokens that end an answer: EOS and the end-of-turn tokens of the chat template."""
        return sorted(self.tokenizer.convert_tokens_to_ids(list(self._end_tokens())))

    @property
    def drops_system(self) -> bool:
        """Whether the chat template leaves out system messages without rejecting them."""
        return drops_system(self._render)

    def _end_tokens(self) -> set[str]:
        if self.chat_template not in self._ends:
            ends = end_tokens(self._render, self._control_tokens, self.tokenizer.eos_token)
            self._ends[self.chat_template] = ends
        return self._ends[self.chat_template]

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        try:
            template = self.tokenizer.get_chat_template(self.chat_template)
            return render(template, messages, add_generation_prompt, self.tokenizer.special_tokens_map)
        except Exception as error:  # templates raise errors of any type
            raise ChatTemplateError(f"the chat template rejects this chat: {error}") from error

    def _tokenize(
        self, text: str, protected: list[str], layouts: Iterator[NDArray[np.int64]], first: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokenize a segment and expand its images; return ids, and a mask of text tokens."""
        # A text may spell special tokens a hundred thousand times, and each is tokenized by itself.
        encode = cache(partial(self.tokenizer.encode, add_special_tokens=False))
        ids: list[int] = []
        for index, piece in enumerate(_STAND_IN_PATTERN.split(text)):
            if index % 2:  # the split alternates text and stand-in numbers
                ids += _continue(encode, protected[int(piece)], split_special_tokens=True)
            elif piece and index:
                ids += _continue(encode, piece)
            elif piece and first:
                ids += encode(piece)
            elif piece:
                # After a special token, tokenizers do not treat the text as the start of a sequence.
                ids += encode(self.vision_end_token + piece)[1:]
        tokens = np.array(ids, dtype=np.int64)
        is_text = np.ones(len(tokens), dtype=bool)
        places = np.flatnonzero(tokens == self.image_token_id)
        is_text[places] = False
        images = list(islice(layouts, len(places)))
        if len(images) < len(places):
            raise ValueError("the chat has more image parts than images were given")
        repeats = np.ones(len(tokens), dtype=np.int64)
        repeats[places] = [len(image) for image in images]
        is_text = np.repeat(is_text, repeats)
        tokens = np.repeat(tokens, repeats)
        if images:
            tokens[~is_text] = np.concatenate(images)
        return tokens, is_text

    # --- transformers' entry for chats --------------------------------------------------------------

    def apply_chat_template(
        self,
        conversation: list[Message] | list[list[Message]],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Render a chat like transformers' method; with `tokenize=True`, encode it like `encode_chat`.

        With `tokenize=True`: a chat or a list of chats, padded on the tokenizer's padding side, with
        `input_ids`, `attention_mask`, and `pixel_values` (num_patches, 3072) and `image_grid_thw`
        (num_images, 3) if there are images. An image part holds its image under `image`, `url`, `path` or
        `base64`; `image` may also be the pair that `SoloImageProcessor.encode_image` returns. Calls with
        arguments other than those of padding are left to transformers, so that no argument is ignored; text
        spelled like a special token is then that token, as in all processors of transformers.
        """
        given = {name: value for name, value in kwargs.items() if value is not None and value is not False}
        padding = {name: given[name] for name in _PADDING if name in given}
        if not tokenize or chat_template is not None or given.keys() != padding.keys():
            return super().apply_chat_template(
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=tokenize,
                return_dict=return_dict,
                return_tensors=return_tensors,
                **kwargs,
            )
        batched = isinstance(conversation[0], (list, tuple))
        chats: list[Any] = conversation if batched else [conversation]
        images = [[self._encode_part(part) for part in _image_parts(chat)] for chat in chats]
        encoded = [
            self.encode_chat(chat, [grid for _, grid in own], add_generation_prompt)
            for chat, own in zip(chats, images, strict=True)
        ]
        vision = {}
        if pairs := [pair for own in images for pair in own]:
            patches = np.concatenate([patches for patches, _ in pairs])
            vision["pixel_values"] = self.image_processor.normalize_patches(patches)
            vision["image_grid_thw"] = np.stack([grid for _, grid in pairs])
        ids = [chat.input_ids.tolist() for chat in encoded]
        if not return_dict:
            return ids if batched else ids[0]
        if return_tensors is None and not batched:
            text: Any = {"input_ids": ids[0], "attention_mask": [1] * len(ids[0])}
        else:
            text = self.tokenizer.pad({"input_ids": ids}, **{"padding": True, **padding})
        return BatchFeature({**text, **vision}, tensor_type=return_tensors)

    def _encode_part(self, part: dict[str, Any]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        source = _image_source(part)
        return source if isinstance(source, tuple) else self.image_processor.encode_image(source)


def _template_for(
    image_layout: str, chat_template: str | dict[str, str] | None, image_token: str
) -> str | None:
    """Return the chat template of a layout, since a saved processor may be loaded with the other layout."""
    if isinstance(chat_template, dict):
        if "default" not in chat_template:
            raise ValueError(f"none of the chat templates ({', '.join(chat_template)}) is named default")
        chat_template = chat_template["default"]
    if image_layout == "original":
        return original_chat_template(image_token)
    paper = with_images(SOLO_CHAT_TEMPLATE, image_token)
    return paper if is_original_template(chat_template) else chat_template


def _image_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [
        part
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] != "text"
    ]


def _image_source(part: dict[str, Any]) -> Any:
    """Return the image of an image part, or its location."""
    for key in ("image", "url", "path", "base64", "image_url"):
        if (source := part.get(key)) is not None:
            return source["url"] if isinstance(source, dict) else source
    raise ValueError(f"an image part needs an 'image', 'url', 'path' or 'base64', but has {sorted(part)}")


__all__ = [
    "ChatTemplateError",
    "EncodedChat",
    "Message",
    "SoloProcessor",
    "num_image_tokens",
    "num_vision_tokens",
]


def _continue(encode: Callable[..., list[int]], text: str, **options: Any) -> list[int]:
    """Tokenize text that follows other text; some tokenizers prepend a space at the start of a text."""
    for before in ("\n", "x"):
        head = encode(before)
        ids = encode(before + text, **options)
        if ids[: len(head)] == head:  # otherwise the two merged into one token
            return ids[len(head) :]
    return encode(text, **options)
