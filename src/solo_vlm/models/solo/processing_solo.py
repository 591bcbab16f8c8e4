"""From chats, texts and images to what the model reads. The same code serves training and inference."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .chat_template import SOLO_CHAT_TEMPLATE, is_release_template, release_chat_template, with_images
from .chat_turns import ChatTemplateError, Message, check_roles, cut_turns, end_tokens

Grid = tuple[int, int]
Layout = Literal["clean", "release"]

_PADDING = ("padding", "padding_side", "max_length", "pad_to_multiple_of")
_STAND_IN = "\ue000{index}\ue001"
_STAND_IN_PATTERN = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class EncodedChat:
    """A chat as tokens.

    Attributes:
        input_ids: (length,) int64, images expanded to their layout.
        supervised: (length,) bool: what the assistant says, and the one token that ends its turn. Never a
            vision token.
    """

    input_ids: NDArray[np.int64]
    supervised: NDArray[np.bool_]


class SoloProcessor(ProcessorMixin):
    """Tokenizer and image processor in one, with the token layout of an image (SOLO paper, section 2).

    An image of R rows and C columns becomes `<vision>`, then C x `<vpatch>` a row with `<vrow_sep>`
    between rows, then `</vision>`: R * C + R + 1 tokens. In a prompt string one `<vpatch>` stands for an
    image; in a chat, an image part does, and text that spells a special token stays text.

    The release fine-tuned SOLO-7B with another layout, on which its answers depend: an image ends with a
    second `<vision>`, and the images of a turn stand before it, those of the first turn before `<s>`.

    Args:
        image_processor: a `SoloImageProcessor`.
        tokenizer: the LLM's tokenizer with the four vision tokens added.
        chat_template: Jinja source.
        image_token: spelling of `<vpatch>`; it differs where the LLM owned that token already.
        vision_start_token: likewise for `<vision>`.
        vision_row_token: likewise for `<vrow_sep>`.
        vision_end_token: likewise for `</vision>`.
        layout: "clean" (the chat template says where images stand), or "release" (its own chat template).
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<vpatch>",
        vision_start_token: str = "<vision>",
        vision_row_token: str = "<vrow_sep>",
        vision_end_token: str = "</vision>",
        layout: str = "clean",
        **kwargs: Any,
    ) -> None:
        if layout not in ("clean", "release"):
            raise ValueError(f'the layout is "clean" or "release", not {layout!r}')
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no EOS token: set eos_token in its tokenizer_config.json")
        self.layout = layout
        self.image_token = image_token
        self.vision_start_token = vision_start_token
        self.vision_row_token = vision_row_token
        self.vision_end_token = vision_end_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        vision_tokens = (vision_start_token, vision_row_token, vision_end_token)
        self._closing_token = vision_start_token if layout == "release" else vision_end_token
        self._start_id, self._row_id, self._closing_id = tokenizer.convert_tokens_to_ids(
            [vision_start_token, vision_row_token, self._closing_token]
        )
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        longest_first = sorted({*special, "\ue000"}, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)))
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        # BOS may end a turn only where it is EOS, too.
        self._control_tokens = added - {tokenizer.bos_token, image_token, *vision_tokens} | {
            tokenizer.eos_token
        }
        self._ends: dict[str | None, set[str]] = {}
        self._checked_roles: set[tuple[str | None, tuple[str, ...]]] = set()
        chat_template = _template_for(layout, chat_template, image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    # --- the layout of an image ---------------------------------------------------------------------

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Layout of one image as a string; transformers puts it where the prompt has `<vpatch>`."""
        rows, columns = (int(n) for n in image_inputs["image_grid_thw"][image_idx][1:])
        body = self.vision_row_token.join([self.image_token * columns] * rows)
        return f"{self.vision_start_token}{body}{self._closing_token}"

    def image_layout(self, rows: int, columns: int) -> NDArray[np.int64]:
        """Layout of one image as ids, (rows * columns + rows + 1,) int64."""
        ids = np.full((rows, columns + 1), self.image_token_id, dtype=np.int64)
        ids[:, -1] = self._row_id
        ids[-1, -1] = self._closing_id
        return np.concatenate([[self._start_id], ids.ravel()])

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Tokens and patches of images of these (height, width); vLLM asks."""
        if image_sizes is None:
            return MultiModalData()
        grids = [self.image_processor.get_patch_grid(height, width) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[rows * columns + rows + 1 for rows, columns in grids],
            num_image_patches=[rows * columns for rows, columns in grids],
        )

    # --- chats --------------------------------------------------------------------------------------

    def encode_chat(
        self, messages: Sequence[Message], grids: Sequence[Grid] = (), add_generation_prompt: bool = False
    ) -> EncodedChat:
        """Encode a chat, or a document (assistant turns alone), with what the assistant says marked.

        A document is BOS, its content, EOS. A chat is what the chat template makes of it; each assistant
        turn is tokenized apart from the prompt before it, so that training sees exactly the prompt tokens
        that inference will. What the assistant says is found and checked in the rendered chat, see
        `cut_turns`.

        Args:
            messages: `{"role": ..., "content": str or parts}`; a part is `{"type": "text", "text": ...}` or
                `{"type": "image", ...}`.
            grids: (rows, columns) of each image, in order of the image parts.
            add_generation_prompt: end where the assistant's next answer would begin.

        Raises:
            ChatTemplateError: the template refuses the chat, leaves out a message, or does not render it turn
                by turn.
            ValueError: image parts and grids differ in number.
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

        layouts = iter([self.image_layout(*grid) for grid in grids])
        pieces: list[NDArray[np.int64]] = []
        marks: list[NDArray[np.bool_]] = []
        for text, supervised in segments:
            ids, is_text = self._tokenize(text, protected, layouts, first=not pieces)
            pieces.append(ids)
            marks.append(is_text & supervised)
        if next(layouts, None) is not None:
            raise ValueError(f"{len(grids)} images given, but the chat has fewer image parts")
        return EncodedChat(np.concatenate(pieces), np.concatenate(marks))

    def _flatten(self, content: str | Sequence[dict[str, Any]], protected: list[str]) -> str:
        """Content parts as one string: `<vpatch>` for an image, stand-ins for special tokens in texts."""

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
        """The rendered chat, cut where an answer begins and ends: [(text, supervised), ...]."""
        bos_token, eos_token = self.tokenizer.bos_token, self.tokenizer.eos_token
        segments = cut_turns(messages, add_generation_prompt, self._render, self._end_tokens(), eos_token)
        kind = (self.chat_template, tuple(message["role"] for message in messages))
        if kind not in self._checked_roles:
            check_roles(kind[1], self._render)
            self._checked_roles.add(kind)
        if not segments or segments[0][1]:  # no label is lost at the first token
            segments.insert(0, (bos_token or eos_token, False))
        elif bos_token and not self._begins_with_bos(segments[0][0]):
            segments[0] = (bos_token + segments[0][0], False)
        return segments

    def _begins_with_bos(self, rendered: str) -> bool:
        """Whether nothing but images stands before BOS."""
        bos, image = re.escape(self.tokenizer.bos_token), re.escape(self.image_token)
        return re.match(f"(?:{image})*{bos}", rendered) is not None

    @property
    def end_of_turn_ids(self) -> list[int]:
        """Ids of the tokens that end an answer: EOS, and those that the chat template ends answers with."""
        return sorted(self.tokenizer.convert_tokens_to_ids(list(self._end_tokens())))

    def _end_tokens(self) -> set[str]:
        if self.chat_template not in self._ends:
            ends = end_tokens(self._render, self._control_tokens, self.tokenizer.eos_token)
            self._ends[self.chat_template] = ends
        return self._ends[self.chat_template]

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # jinja's, and whatever a template's raise_exception makes of it
            raise ChatTemplateError(f"the chat template refuses this chat: {error}") from error

    def _tokenize(
        self, text: str, protected: list[str], layouts: Iterator[NDArray[np.int64]], first: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Ids of a segment with images expanded, and which of them are text."""
        ids: list[int] = []
        for index, piece in enumerate(_STAND_IN_PATTERN.split(text)):
            if index % 2:  # the split alternates text and the number of a stand-in
                ids += self._continue(protected[int(piece)], split_special_tokens=True)
            elif piece and index:
                ids += self._continue(piece)
            elif piece and first:
                ids += self.tokenizer.encode(piece, add_special_tokens=False)
            elif piece:
                # After a special token, no tokenizer takes the text for the beginning of a text.
                ids += self.tokenizer.encode(self.vision_end_token + piece, add_special_tokens=False)[1:]
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

    def _continue(self, text: str, **options: Any) -> list[int]:
        """Ids of text that other text precedes: some tokenizers put a space where a text begins."""
        for before in ("\n", "x"):
            head = self.tokenizer.encode(before, add_special_tokens=False)
            ids = self.tokenizer.encode(before + text, add_special_tokens=False, **options)
            if ids[: len(head)] == head:  # else the two have merged
                return ids[len(head) :]
        return self.tokenizer.encode(text, add_special_tokens=False, **options)

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
        """As transformers' method; a tokenized chat goes the way of `encode_chat`, images included.

        With `tokenize=True`: a chat or a list of chats, padded on the tokenizer's padding side, with
        `input_ids`, `attention_mask`, and `pixel_values` (patches, 3072) and `image_grid_thw` (images, 3)
        where there are images. A chat's images are its image parts' `image`, `url`, `path` or `base64`.
        Arguments other than those of padding are left to transformers, so that none is dropped; text spelled
        like a special token is then one, as in all of its processors.
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
        images = [[_image_source(part) for part in _image_parts(chat)] for chat in chats]
        vision = self.image_processor([i for own in images for i in own]) if any(images) else {}
        grids = iter([(int(r), int(c)) for _, r, c in vision.get("image_grid_thw", ())])
        encoded = [
            self.encode_chat(chat, [next(grids) for _ in own], add_generation_prompt)
            for chat, own in zip(chats, images, strict=True)
        ]
        ids = [chat.input_ids.tolist() for chat in encoded]
        if not return_dict:
            return ids if batched else ids[0]
        if return_tensors is None and not batched:
            text: Any = {"input_ids": ids[0], "attention_mask": [1] * len(ids[0])}
        else:
            text = self.tokenizer.pad({"input_ids": ids}, **{"padding": True, **padding})
        return BatchFeature({**text, **vision}, tensor_type=return_tensors)


def _template_for(layout: str, chat_template: str | None, image_token: str) -> str | None:
    """The chat template that goes with a layout: a saved processor may be loaded with the other one."""
    if layout == "release":
        return release_chat_template(image_token)
    paper = with_images(SOLO_CHAT_TEMPLATE, image_token)
    return paper if is_release_template(chat_template) else chat_template


def _image_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [
        part
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] != "text"
    ]


def _image_source(part: dict[str, Any]) -> Any:
    """What an image part holds: an image, or where to find one."""
    for key in ("image", "url", "path", "base64", "image_url"):
        if (source := part.get(key)) is not None:
            return source["url"] if isinstance(source, dict) else source
    raise ValueError(f"an image part needs an 'image', 'url', 'path' or 'base64', but has {sorted(part)}")


__all__ = ["ChatTemplateError", "EncodedChat", "Message", "SoloProcessor"]
