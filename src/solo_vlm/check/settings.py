"""Agreement of a model's settings with its tokenizer, and with those of the LLM it was made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from solo_vlm.check.probe import Probe
from solo_vlm.check.properties import Finding
from solo_vlm.models.load import stop_ids

# What making a SOLO model of an LLM changes, and what no output depends on.
_FREE = {
    *("vocab_size", "tie_word_embeddings", "dtype", "architectures", "transformers_version", "use_cache"),
    *("bos_token_id", "eos_token_id", "output_router_logits", "initializer_range"),
}


def settings(probe: Probe) -> Finding:
    """Compare the settings of answers with the tokenizer, and those of the decoder with its LLM's.

    Nothing that is computed shows them on short texts: they decide where answers end, which tokens they can
    have, and what happens beyond a window or a context.
    """
    if not probe.encoder:
        return Finding("skipped", "no tokenizer")
    if fault := _fault_of_generation(probe) or _fault_of_decoder(probe):
        return Finding("fails" if probe.sees_images else "differs", fault)
    ends = probe.encoder.tokenizer.convert_ids_to_tokens(stop_ids(probe.model.generation_config))
    note = "; the LLM's settings" if probe.llm else ""
    return Finding("holds", f"answers end at {' '.join(ends)}{note}")


def _fault_of_generation(probe: Probe) -> str | None:
    """Return which tokens of generation_config.json contradict the tokenizer and its chat template."""
    assert probe.encoder
    generation, tokenizer = probe.model.generation_config, probe.encoder.tokenizer
    rows = probe.model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        return f"the tokenizer has {len(tokenizer):,} tokens, the model's embedding {rows:,}"
    ends = set(stop_ids(generation))
    needed = {*getattr(probe.encoder.processor, "end_of_turn_ids", ()), tokenizer.eos_token_id}
    known = needed | tokenizer.added_tokens_decoder.keys() - set(probe.encoder.vision_ids.tolist())
    known |= set(stop_ids(probe.llm.generation_config)) if probe.llm else set()
    if missing := sorted(needed - ends):
        return f"eos_token_id lacks {_named(tokenizer, missing)}, where the chat template ends answers"
    if others := sorted(ends - known):
        return f"eos_token_id has {_named(tokenizer, others)}, where no answer ends"
    if not probe.sees_images:
        return None
    for name in ("bos_token_id", "pad_token_id"):
        if getattr(generation, name) not in (None, own := getattr(tokenizer, name)):
            return f"{name} = {getattr(generation, name)}, but the tokenizer's is {own}"
    suppressed = set(generation.suppress_tokens or [])
    images = set(probe.encoder.vision_ids.tolist()) | set(range(len(tokenizer), rows))
    if missing := sorted(images - suppressed - ends):
        what = f"suppress_tokens lacks {_named(tokenizer, missing)}"
        return f"{what}: answers may have tokens of images, or rows of padding"
    return f"suppress_tokens has {_named(tokenizer, both)}, an end" if (both := ends & suppressed) else None


def _fault_of_decoder(probe: Probe) -> str | None:
    """Return which setting of the decoder is not that of the LLM it was made of."""
    if probe.llm is None:
        return None
    ours, own = (each.config.get_text_config().to_dict() for each in (probe.model, probe.llm))
    for name in sorted(ours.keys() | own.keys()):
        is_free = name.startswith("_") or name in _FREE
        if not is_free and ours.get(name) != own.get(name):
            return f"{name} = {ours.get(name)} in config.json, but {own.get(name)} in the LLM's"
    return None


def _named(tokenizer: Any, ids: Iterable[int]) -> str:
    first, *others = sorted(ids)
    token = tokenizer.convert_ids_to_tokens(first) or "a token of no text"
    return f"{token!r} ({first})" + (f" and {len(others)} more" if others else "")
