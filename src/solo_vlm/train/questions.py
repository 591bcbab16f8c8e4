"""Answers of a model in training to held-out questions, by greedy generation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel

from solo_vlm.evaluate.questions import Answer, Question, load_questions
from solo_vlm.generate import ContextError, GenerationPipeline
from solo_vlm.models.packed.isolation import unpacked_attention
from solo_vlm.models.solo.image_loading_solo import ImageError
from solo_vlm.models.solo.processing_solo import SoloProcessor
from solo_vlm.train.model import autocast
from solo_vlm.train.parallel.context import DistributedContext
from solo_vlm.train.parallel.sharding import gather_outside_layers, reshard
from solo_vlm.train.recipe import Recipe, ValidationSettings
from solo_vlm.utils.errors import SoloError

BATCH_SIZE = 8
"""Questions that a process answers together."""


class QuestionValidator:
    """Answers to a recipe's questions.

    Each data-parallel group answers its share with the sharded model. All groups take part in every call of
    the model, because each gathers weights: shares are filled up with questions of others to equal size, and
    a group whose answers have ended waits in `generate` for the rest. Questions are encoded once.

    Attributes:
        questions: Questions of each file, by its name.

    Raises:
        SoloError: A file cannot be read, an image is missing, or a question leaves no room for an answer.
    """

    def __init__(
        self, recipe: Recipe, model: PreTrainedModel, processor: Any, context: DistributedContext
    ) -> None:
        settings = recipe.validation
        assert settings is not None
        if not isinstance(processor, SoloProcessor):
            raise SoloError("validation.questions: a plain LLM has no chats with images; ask a SOLO model")
        self.questions = context.broadcast_from_rank0(lambda: _load(recipe, settings))
        self._recipe, self._context = recipe, context
        self._all = list(chain.from_iterable(self.questions.values()))
        groups, total = context.dims.dp, len(self._all)
        rounds = -(-total // groups)
        self._share = [(context.dp_rank + groups * round) % total for round in range(rounds)]

        # The pipeline adds end tokens, which training shall not export.
        own = model.generation_config
        model.generation_config = deepcopy(own)
        self._pipeline = GenerationPipeline(model, processor, in_training=True)  # type: ignore[arg-type]
        self._generation_config, model.generation_config = model.generation_config, own
        self._max_new_tokens = settings.max_new_tokens
        if (length := self._pipeline.context_length) is not None:
            self._max_new_tokens = min(self._max_new_tokens, length // 2)  # as `BatchGenerator` does
        self._batches = self._encode(model)

    def answer(self, model: PreTrainedModel) -> dict[str, list[Answer]]:
        """Return the model's answers to the questions of each file; a collective call.

        Leaves the model in training mode, as it was.
        """
        texts: list[str] = []
        with self._generating(model):
            for inputs in self._batches:
                inputs = inputs.to(model.device)
                is_shared = self._context.dims.world_size > 1
                sequences, _ = self._pipeline.generate(inputs, self._max_new_tokens, synced_gpus=is_shared)
                texts += [output.text or "" for output in self._pipeline.decode(sequences, inputs)]
        shares = self._context.gather(dict(zip(self._share, texts, strict=True)))
        by_place = {place: text for share in shares for place, text in share.items()}
        answers = iter(Answer.of(question, by_place[place]) for place, question in enumerate(self._all))
        return {name: [next(answers) for _ in asked] for name, asked in self.questions.items()}

    def _encode(self, model: PreTrainedModel) -> list[Any]:
        """Return the inputs of the share's questions in batches, in main memory."""
        alone = [self._encoded(self._all[place]) for place in self._share]
        longest = max(inputs["input_ids"].shape[1] for inputs in alone) + self._max_new_tokens
        with self._generating(model):  # measured, for some families
            may_batch = self._pipeline.may_batch(self._context.max(longest))
        if not may_batch:
            return alone
        batches = []
        while alone:  # consumed, as the inputs of each are copied into a batch
            batches.append(self._pipeline.join(alone[:BATCH_SIZE]))
            del alone[:BATCH_SIZE]
        return batches

    def _encoded(self, question: Question) -> Any:
        room = (self._pipeline.context_length or sys.maxsize) - self._max_new_tokens
        try:
            inputs = self._pipeline.encode([question.chat]).to("cpu")
            if (length := inputs["input_ids"].shape[1]) > room:
                raise ContextError(
                    f"its {length} tokens leave less than {self._max_new_tokens} for the answer"
                )
        except (SoloError, ImageError) as error:
            raise SoloError(f"validation.questions, {question.where}: {error}") from error
        return inputs

    @contextmanager
    def _generating(self, model: PreTrainedModel) -> Iterator[None]:
        """Let the model generate as one that was loaded; afterwards, it is as before."""
        own = model.generation_config
        model.generation_config = self._generation_config
        model.eval()
        gather_outside_layers(model)
        try:
            # Compiled layers are for packed rows, not for growing caches.
            with (
                unpacked_attention(model),
                torch.compiler.set_stance("force_eager"),
                autocast(self._recipe, self._context),
            ):
                yield
        finally:
            model.generation_config = own
            model.train()
            reshard(model)


def _load(recipe: Recipe, settings: ValidationSettings) -> dict[str, list[Question]]:
    return {
        name: load_questions(source, settings.samples, settings.questions[name].metric)[0]
        for name, source in recipe.open_questions().items()
    }
