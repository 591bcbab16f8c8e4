"""What the page can ask for, without a web server around it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from solo_vlm.data.encode import encode
from solo_vlm.data.sample import parse_sample
from solo_vlm.generate import GenerationPipeline
from solo_vlm.serve.page.attention_map import AttentionMaps, attention_maps
from solo_vlm.serve.page.conversation import Question, Turns, WordQuestion, as_chat, check_turns
from solo_vlm.serve.page.images import ImageStore, read_upload
from solo_vlm.serve.page.limits import Limits
from solo_vlm.serve.page.spans import tokens_of
from solo_vlm.utils.errors import SoloError


class Service:
    """A model, and the images that visitors have uploaded.

    `answer` and `attention` use the model: one call at a time.

    Args:
        pipeline: the model with its processor.
        name: what the page calls the model.
        limits: of one visitor.
    """

    def __init__(self, pipeline: GenerationPipeline, name: str, limits: Limits) -> None:
        self.limits = limits
        self._pipeline = pipeline
        self._name = name
        self._store = ImageStore(limits.held_bytes)
        self._last_maps = lru_cache(maxsize=1)(self._read_again)  # several words of one answer are asked for

    def about(self) -> dict[str, Any]:
        """The model's name and size, and the limits."""
        model = self._pipeline.model
        return {
            "name": self._name,
            "parameters": sum(weights.numel() for weights in model.parameters()),
            "layers": model.config.text_config.num_hidden_layers,
            "context": self._pipeline.context_length,
            "limits": asdict(self.limits),
        }

    def add_image(self, data: bytes) -> dict[str, Any]:
        """Hold an uploaded file; tell its name, and how the model sees it.

        Raises:
            SoloError: it is no image that can be used, or too large.
        """
        image = read_upload(data, self._pipeline.processor, self.limits.pixels)
        return {"id": self._store.add(image), **image.layout.as_dict()}

    def seen_image(self, name: str) -> bytes:
        """PNG of the pixels that the model gets.

        Raises:
            SoloError: the image is no longer held.
        """
        return self._store.get(name).seen

    def remove_image(self, name: str) -> None:
        """Forget an image."""
        self._store.remove(name)

    def check(self, question: Question) -> None:
        """Refuse, before it waits for its turn, what `answer` would refuse.

        Raises:
            SoloError: what is wrong.
        """
        check_turns(question.turns, self.limits, last="user")
        if question.max_new_tokens > self.limits.new_tokens:
            raise SoloError(f"an answer has at most {self.limits.new_tokens} tokens here")
        as_chat(question.turns, self._store)

    def answer(
        self, question: Question, on_text: Callable[[str], None], should_stop: Callable[[], bool]
    ) -> dict[str, Any]:
        """Answer, in pieces and then as a whole.

        Returns:
            What `GenerationPipeline.stream` returns, and `text_tokens` and `vision_tokens` of the prompt (the
            latter with the separators of rows), `first_token_seconds`, and `tokens_per_second` after the
            first token; None for an answer of one.

        Raises:
            SoloError: what is wrong with the chat.
        """
        self.check(question)
        clock = _Clock(should_stop)
        output = self._pipeline.stream(
            as_chat(question.turns, self._store),
            on_text,
            question.max_new_tokens,
            question.temperature,
            should_stop=clock,
        )
        names = [name for turn in question.turns for name in turn.images]
        vision = sum(self._store.get(name).layout.tokens for name in names)
        return {
            "answer": output.text,
            "prompt_tokens": output.prompt_tokens,
            "cached_tokens": output.cached_tokens,
            "num_patches": output.num_patches,
            "answer_tokens": output.completion_tokens,
            "finish": "stopped" if output.finish_reason == "cancelled" else output.finish_reason,
            "text_tokens": (output.prompt_tokens or 0) - vision,
            "vision_tokens": vision,
            **clock.figures(),
        }

    def attention(self, question: WordQuestion) -> dict[str, Any]:
        """Where a word of the last answer looked.

        Returns:
            `images`: for each `rows`, `columns`, `weights` (rows * columns, each a share of the word's
            attention) and `share`, their sum. `text_share` is the rest.

        Raises:
            SoloError: what is wrong with the chat or the word.
        """
        check_turns(question.turns, self.limits, last="assistant")
        text = question.turns[-1].text
        if not question.start < question.end <= len(text):
            raise SoloError(f"characters {question.start} to {question.end} are not in the answer")
        maps = self._last_maps(question.turns)
        if question.layer is not None and question.layer >= len(maps.weights):
            raise SoloError(f"the model has {len(maps.weights)} layers, the first is 0")
        tokenizer = self._pipeline.processor.tokenizer
        tokens = tokens_of(question.start, question.end, text, maps.token_ids, tokenizer)
        images: list[dict[str, Any]] = [
            {
                "rows": len(weights),
                "columns": len(weights[0]),
                "weights": weights.ravel().tolist(),
                "share": float(weights.sum()),
            }
            for weights in maps.of(tokens, question.layer)
        ]
        return {"images": images, "text_share": 1.0 - sum(image["share"] for image in images)}

    def _read_again(self, turns: Turns) -> AttentionMaps:
        sample = parse_sample({"messages": as_chat(turns, self._store)})
        document = encode(sample, self._pipeline.processor)
        context = self._pipeline.context_length
        if context and len(document) > context:
            raise SoloError(f"the chat has {len(document)} tokens, the model's context {context}")
        return attention_maps(self._pipeline.model, document)


class _Clock:
    """Asked after each token whether to stop; knows when the first and the last one came."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop
        self._times = [time.perf_counter()]  # of the start, and of each token

    def __call__(self) -> bool:
        self._times.append(time.perf_counter())
        return self._should_stop()

    def figures(self) -> dict[str, float | None]:
        start, first, *others = self._times
        return {
            "first_token_seconds": first - start,
            "tokens_per_second": len(others) / (others[-1] - first) if others else None,
        }
