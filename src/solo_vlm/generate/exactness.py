"""Errors of generation with a cache, with padding, and after a cached prefix, measured on a loaded model.

Whether a decoder's cache and masks are right depends on code of its family. Prompts are random.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor

from solo_vlm.generate.cache import PrefixCache, preallocated_cache, prompt_key
from solo_vlm.models.solo.modeling_solo import SoloForConditionalGeneration
from solo_vlm.utils.errors import first_line

_PROMPT, _SHORT, _ANSWER = 19, 6, 4  # tokens
_ROWS, _COLUMNS = 2, 3  # patches of the image in a prompt

Inputs = dict[str, Tensor]


def tolerance(model: SoloForConditionalGeneration) -> float:
    """Return the error that rounding explains, relative to the largest logit."""
    return float(torch.finfo(model.dtype).eps) ** 0.5


@torch.no_grad()
def cache_error(model: SoloForConditionalGeneration, static: bool = False) -> float:
    """Return the error of logits computed token by token with the decoder's cache, relative to the largest.

    The reference is computed from the whole sequence, without a cache.

    Args:
        static: Whether to use a static cache, without compiling.
    """
    options = {"cache_implementation": "static", "disable_compile": True} if static else {}
    answer = _answer(model)
    return max(
        _error(_answer_logits(model, inputs, answer, **options), _reference(model, inputs, answer))
        for inputs in (_text(model), _with_image(model))
    )


def cache_fault(model: SoloForConditionalGeneration, static: bool = False) -> str | None:
    """Return why generation with the decoder's cache, or a static one, is not exact; None if it is."""
    try:
        error = cache_error(model, static)
    except Exception as failure:  # model families raise any type
        return first_line(failure)
    return None if error < tolerance(model) else f"logits change by {error:.2g} of the largest"


def reads_padding(model: SoloForConditionalGeneration, use_cache: bool = True) -> bool:
    """Return whether the padding of a batch changes logits by more than rounding."""
    leak = max(torch.finfo(model.dtype).eps, 1e-5)
    is_exact = padding_error(model, use_cache) <= tolerance(model) and padding_leak(model, use_cache) <= leak
    return not is_exact  # NaN is not exact


@torch.no_grad()
def padding_error(model: SoloForConditionalGeneration, use_cache: bool = True) -> float:
    """Return the error of logits in a batch of prompts padded on the left, relative to the largest.

    The reference is computed for each prompt alone.

    Args:
        use_cache: Whether both are computed with the decoder's cache.
    """
    answer, (long, short, batch) = _answer(model), _padded_batch(model)
    together, *alone = (
        _answer_logits(model, inputs, answer, use_cache=use_cache) for inputs in (batch, long, short)
    )
    return _error(together, torch.cat(alone))


@torch.no_grad()
def padding_leak(model: SoloForConditionalGeneration, use_cache: bool = True) -> float:
    """Return the change of logits by other tokens in the padding, relative to the largest.

    Shapes stay the same, so in 16 bits this shows errors that rounding hides from `padding_error`.
    """
    answer, (*_, batch) = _answer(model), _padded_batch(model)
    noise = _random_ids(model, batch["input_ids"].numel(), seed=5).view_as(batch["input_ids"])
    other = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"].bool(), noise)}
    one, two = (_answer_logits(model, inputs, answer, use_cache=use_cache) for inputs in (batch, other))
    return _error(two, one)


@torch.no_grad()
def prefix_cache_error(model: SoloForConditionalGeneration) -> float:
    """Return the error of logits after a cached prefix of any length, relative to the largest.

    Cuts within an image are included if images are causal. The reference is computed from the whole prompt.
    """
    inputs, answer = _with_image(model), _answer(model)
    prompt = prompt_key(inputs, model.config.image_token_id)
    prefixes, cache = PrefixCache(), preallocated_cache()
    model(**inputs, past_key_values=cache, use_cache=True)
    prefixes.add(prompt, cache)
    expected = _reference(model, inputs, answer)
    worst = 0.0
    for length in range(1, len(prompt)):
        known, cache = prefixes.find(prompt[: length + 1])
        assert known == length
        patches = int((prompt[:length] < 0).sum())
        if model.config.image_attention != "causal" and 0 < patches < len(inputs["pixel_values"]):
            continue
        rest = {name: value for name, value in inputs.items() if name != "image_grid_thw"}
        rest["pixel_values"] = rest["pixel_values"][patches:]
        if not len(rest["pixel_values"]):
            del rest["pixel_values"]
        worst = max(worst, _error(_answer_logits(model, rest, answer, past_key_values=cache), expected))
    return worst


def _padded_batch(model: SoloForConditionalGeneration) -> tuple[Inputs, Inputs, Inputs]:
    """Return the inputs of a long prompt, of a short one, and of both, padded on the left."""
    long, short = _text(model), {name: value[:, :_SHORT] for name, value in _text(model, seed=1).items()}
    padding = (_PROMPT - _SHORT, 0)
    return long, short, {name: torch.cat([long[name], F.pad(short[name], padding)]) for name in long}


def _text(model: SoloForConditionalGeneration, seed: int = 0) -> Inputs:
    """Return the inputs of a random prompt of text."""
    ids = _random_ids(model, _PROMPT, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _with_image(model: SoloForConditionalGeneration) -> Inputs:
    """Return the inputs of a random prompt with an image in its middle."""
    patch, start, separator, end = model.config.vision_token_ids
    rows = [token for row in range(_ROWS) for token in [*[separator] * (row > 0), *[patch] * _COLUMNS]]
    ids = _random_ids(model, _PROMPT, seed=2)[0].tolist()
    layout = torch.tensor([[*ids[:_SHORT], start, *rows, end, *ids[_SHORT:]]], device=model.device)
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (_ROWS * _COLUMNS, model.config.patch_dim), generator=generator)
    return {
        "input_ids": layout,
        "attention_mask": torch.ones_like(layout),
        "pixel_values": pixels.to(model.device, torch.uint8),
        "image_grid_thw": torch.tensor([[1, _ROWS, _COLUMNS]], device=model.device),
    }


def _answer(model: SoloForConditionalGeneration) -> Tensor:
    return _random_ids(model, _ANSWER, seed=4)


def _random_ids(model: SoloForConditionalGeneration, count: int, seed: int) -> Tensor:
    """Return (1, count) IDs of text tokens."""
    suppressed = model.generation_config.suppress_tokens or []
    other = {*suppressed, *model.config.vision_token_ids}
    text = torch.tensor([token for token in range(model.config.text_config.vocab_size) if token not in other])
    chosen = torch.randint(len(text), (1, count), generator=torch.Generator().manual_seed(seed))
    return text[chosen].to(model.device)


def _answer_logits(
    model: SoloForConditionalGeneration, inputs: Inputs, answer: Tensor, **options: Any
) -> Tensor:
    """Return the logits, (rows, answer, vocabulary), from which `generate` would choose the tokens."""
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=answer.shape[1],
        eos_token_id=None,
        logits_processor=[_Force(answer[0], inputs["input_ids"].shape[1])],
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return torch.stack(output.logits, dim=1)


def _reference(model: SoloForConditionalGeneration, inputs: Inputs, answer: Tensor) -> Tensor:
    """Return the logits of an answer, (1, answer, vocabulary), from one pass over each sequence."""
    logits = []
    for length in range(answer.shape[1]):
        ids = torch.cat([inputs["input_ids"], answer[:, :length]], dim=1)
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits.append(model(**whole, use_cache=False, logits_to_keep=1).logits)
    return torch.cat(logits, dim=1)


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


class _Force(LogitsProcessor):
    """Logits processor that chooses given tokens."""

    def __init__(self, tokens: Tensor, start: int) -> None:
        self._tokens, self._start = tokens, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._tokens[input_ids.shape[1] - self._start]] = 0.0
        return forced
