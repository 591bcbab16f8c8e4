"""Evaluation on held-out data while training: loss, answers to questions, the best checkpoint, early stop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel

from solo_vlm.data.collate import model_inputs, num_supervised_tokens
from solo_vlm.data.mixture import make_loader
from solo_vlm.data.sources import Source
from solo_vlm.evaluate.questions import Answer, summarize
from solo_vlm.train.checkpoint import Best, TrainState
from solo_vlm.train.model import autocast
from solo_vlm.train.parallel.context import DistributedContext
from solo_vlm.train.parallel.sharding import reshard
from solo_vlm.train.questions import QuestionValidator
from solo_vlm.train.recipe import Recipe, ValidationSettings


@dataclass(frozen=True)
class ValidationResult:
    """Result of one evaluation, the same in all processes.

    Attributes:
        metrics: `validation_loss`; `NAME/accuracy` with its 95% interval of each file of questions.
        answers: Answers to the questions of each file, by its name.
    """

    metrics: dict[str, float]
    answers: dict[str, list[Answer]]

    def describe(self, state: TrainState) -> str:
        """Return a line about the evaluation of a step."""
        parts = []
        if "validation_loss" in self.metrics:
            parts.append(f"validation loss {self.metrics['validation_loss']:.4f}")
        for name, answers in self.answers.items():
            score = summarize(answers)
            parts.append(
                f"{name} {score.value:.1%} ({score.low:.1%} to {score.high:.1%}, {score.n:,} questions)"
            )
        if state.best and state.best.step == state.step:
            parts.append(f"best {state.best.metric} so far")
        return f"step {state.step:,}: {', '.join(parts)}"


class Validation:
    """Evaluation of a recipe's `validation` settings."""

    def __init__(
        self,
        recipe: Recipe,
        held_out: list[Source],
        model: PreTrainedModel,
        processor: Any,
        context: DistributedContext,
    ) -> None:
        assert recipe.validation is not None
        self._settings, self._context = recipe.validation, context
        self._loss = LossValidator(recipe, held_out, processor, context) if held_out else None
        asks = recipe.validation.questions
        self._questions = QuestionValidator(recipe, model, processor, context) if asks else None

    def evaluate(self, model: PreTrainedModel, state: TrainState) -> ValidationResult:
        """Evaluate the model of a step; note in the state whether it is the best, and whether to stop.

        A collective call, which leaves the model in training mode.
        """
        started = time.perf_counter()
        metrics: dict[str, float] = {}
        if self._loss:
            metrics["validation_loss"] = self._loss.loss(model)
        answers = self._questions.answer(model) if self._questions else {}
        for name, answered in answers.items():
            score = summarize(answered)
            metrics[f"{name}/accuracy"] = score.value
            metrics[f"{name}/accuracy_low"], metrics[f"{name}/accuracy_high"] = score.low, score.high
        metrics["validation_seconds"] = time.perf_counter() - started
        # Tensor-parallel replicas may differ by rounding, but must not decide differently.
        metrics = self._context.broadcast_from_rank0(lambda: metrics)
        note_best(state, self._settings, metrics)
        return ValidationResult(metrics, answers)


def note_best(state: TrainState, settings: ValidationSettings, metrics: dict[str, float]) -> None:
    """Update the best evaluation in a state, and the reason to stop if it has not improved for long."""
    if settings.best is None:
        return
    value, best = metrics[settings.best], state.best
    sign = -1 if settings.best == "validation_loss" else 1
    if math.isfinite(value) and (best is None or sign * value > sign * best.value):
        state.best, state.stale_evaluations = Best(settings.best, value, state.step), 0
        return
    state.stale_evaluations += 1
    if settings.patience is not None and state.stale_evaluations >= settings.patience:
        than = f"than {best.value:.4g} at step {best.step} " if best else ""
        state.stopped = f"{settings.best} was not better {than}in {state.stale_evaluations} evaluations"


class LossValidator:
    """Mean loss over the supervised tokens of held-out sequences, packed like the training data.

    The sequences are the same for any number of processes; each process reads all and evaluates its part.
    """

    def __init__(
        self, recipe: Recipe, held_out: list[Source], processor: Any, context: DistributedContext
    ) -> None:
        assert recipe.validation is not None and recipe.validation_mixture is not None
        self._recipe, self._mixture, self._context = recipe, recipe.validation_mixture, context
        self._sequences = recipe.validation.sequences
        self._processor = processor
        self._sources = held_out

    @torch.no_grad()
    def loss(self, model: PreTrainedModel) -> float:
        """Return the mean loss; leaves the model in training mode."""
        loader = make_loader(self._mixture, self._processor, self._sources)
        sequences = islice(loader, self._sequences)
        dp, dp_rank = self._context.dims.dp, self._context.dp_rank
        model.eval()
        total = supervised = 0.0
        # All processes take part in every round, because a sharded model gathers its weights in each.
        while self._context.max(len(batches := list(islice(sequences, dp)))):
            batch = batches[dp_rank] if dp_rank < len(batches) else loader.empty_batch()
            with autocast(self._recipe, self._context):
                inputs = model_inputs(model, batch, self._context.cp_rank, self._context.dims.cp)
                total += model(**inputs, use_cache=False, num_items_in_batch=1, logits_to_keep=1).loss.item()
            supervised += num_supervised_tokens([batch])
        model.train()
        reshard(model)
        (total,) = self._context.sum_slices(total)
        total, supervised = self._context.sum(total, supervised)
        return total / max(supervised, 1)
