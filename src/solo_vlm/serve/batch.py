"""Answers several requests together, each with its own sampling, length and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, StoppingCriteria, TopPLogitsWarper

from solo_vlm.generate import GenerationPipeline
from solo_vlm.generate.pipeline import MIN_TEMPERATURE
from solo_vlm.serve.answer_text import AnswerText
from solo_vlm.serve.job import Finish, FinishReason, Job, Sampling


def answer_together(pipeline: GenerationPipeline, tokenizer: Any, jobs: Sequence[Job]) -> None:
    """Answer jobs in one batch; each is told its text as it comes, and its end when it is reached.

    Args:
        pipeline: the model.
        tokenizer: decodes; no other thread may use it.
        jobs: whose longest prompt and longest answer together do not exceed the model's context.
    """
    rows = [_Row(job, tokenizer, pipeline.eos_token_ids) for job in jobs]
    pipeline.generate(
        merge([job.inputs for job in jobs], tokenizer.pad_token_id),
        max(job.sampling.max_tokens for job in jobs),
        logits_processor=[RowSampler([job.sampling for job in jobs], pipeline.model.device)],
        stopping_criteria=[_Listener(rows)],
    )


def merge(inputs: Sequence[Any], pad_id: int) -> dict[str, Tensor]:
    """Inputs of single chats as those of a batch, padded on the left."""
    merged = {
        name: pad_sequence(
            [one[name][0] for one in inputs], batch_first=True, padding_value=value, padding_side="left"
        )  # (chats, longest)
        for name, value in (("input_ids", pad_id), ("attention_mask", 0))
    }
    for name in ("pixel_values", "image_grid_thw"):
        if parts := [one[name] for one in inputs if name in one]:
            merged[name] = torch.cat(parts)
    return merged


class _Row:
    """The answer to one job, while it grows."""

    def __init__(self, job: Job, tokenizer: Any, end_ids: Sequence[int]) -> None:
        self.done = False
        self._job = job
        self._end_ids = end_ids
        self._text = AnswerText(tokenizer, job.sampling.stop)
        self._tokens = 0

    def take(self, token: int) -> bool:
        """One more token of the answer. Whether it was the last."""
        if self.done:
            return True
        self._tokens += 1
        if self._job.cancelled:
            self.done = True
        elif token in self._end_ids:
            self._finish("stop")
        else:
            self._tell(self._text.add(token))
            if self._text.stopped:
                self._finish("stop")
            elif self._tokens == self._job.sampling.max_tokens:
                self._finish("length")
        return self.done

    def _finish(self, reason: FinishReason) -> None:
        self.done = True
        self._tell(self._text.end())
        # A stop string may only show in what was held back.
        self._job.put(Finish("stop" if self._text.stopped else reason, self._tokens))

    def _tell(self, text: str) -> None:
        if text:
            self._job.put(text)


class _Listener(StoppingCriteria):
    """Sees every new token, and says which rows need no more."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        newest = input_ids[:, -1].tolist()
        done = [row.take(token) for row, token in zip(self._rows, newest, strict=True)]
        return torch.tensor(done, device=input_ids.device)  # (rows,)


class RowSampler(LogitsProcessor):
    """Samples each row in its own way, where greedy search then takes the largest score.

    The largest of the logits with Gumbel noise is a sample of their softmax (Gumbel 1954). The noise of a row
    comes from a generator of its own, so that a seed gives the same answer whatever is answered beside it.
    """

    def __init__(self, samplings: Sequence[Sampling], device: torch.device) -> None:
        self._rows = [
            (row, sampling, _generator(sampling.seed, device), TopPLogitsWarper(sampling.top_p))
            for row, sampling in enumerate(samplings)
            if sampling.temperature
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (rows, vocabulary) both
        for row, sampling, generator, keep_likeliest in self._rows:
            temperature = max(sampling.temperature, MIN_TEMPERATURE)
            logits = keep_likeliest(input_ids[row], scores[row : row + 1] / temperature)
            noise = torch.empty_like(logits).exponential_(generator=generator).log_()
            scores[row] = (logits - noise)[0]
        return scores


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
