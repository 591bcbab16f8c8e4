"""Agreement of a model's settings with its tokenizer, and with those of the LLM it was made of."""

from __future__ import annotations

import numpy as np

from solo_vlm.check.chats import answer_ends
from solo_vlm.check.probe import Probe
from solo_vlm.check.properties import Finding
from solo_vlm.models.stops import forbidden_ids, named, stop_fault, stop_ids, unused_ids

# What making a SOLO model of an LLM changes, and what no output depends on.
_FREE = {
    *("vocab_size", "tie_word_embeddings", "dtype", "architectures", "transformers_version", "use_cache"),
    *("bos_token_id", "eos_token_id", "output_router_logits", "initializer_range"),
}
_SHARED = ("begin_suppress_tokens", "bad_words_ids", "forced_bos_token_id", "sequence_bias")


def settings(probe: Probe) -> Finding:
    """Compare the settings of answers with the tokenizer, and those of the decoder with its LLM's.

    Nothing that is computed shows them on short texts: they decide where answers end, which tokens they can
    have, and what happens beyond a window or a context.
    """
    if probe.tokenizer is None:
        return Finding("skipped", "no tokenizer")
    gap = _gap(probe)
    if gap and probe.sees_images:
        return Finding("fails", gap)
    if fault := _fault_of_stops(probe) or _fault_of_forbidden(probe) or _fault_of_llm(probe):
        return Finding("fails", fault)
    if gap:
        return Finding("differs", f"{gap} (solo init does)")
    ends = stop_ids(probe.model.generation_config)
    notes = [f"answers end at {' '.join(probe.tokenizer.convert_ids_to_tokens(ends))}"]
    if probe.tokenizer.pad_token_id in ends:
        notes.append("padding is such an end")
    if more := forbidden_ids(probe.model.generation_config) - _without_text(probe):
        notes.append(f"{len(more)} tokens of text are forbidden")
    return Finding("holds", "; ".join([*notes, *["the LLM's settings"] * (probe.llm is not None)]))


def _fault_of_stops(probe: Probe) -> str | None:
    """Return which stop token would cut answers or is forbidden, or which answers cannot end."""
    generation, rows = probe.model.generation_config, _rows(probe)
    if beyond := [end for end in stop_ids(generation) if not 0 <= end < rows]:
        return f"eos_token_id = {beyond[0]} is not in the vocabulary of {rows:,} tokens: remove it"
    if fault := stop_fault(generation, probe.tokenizer, answer_ends(probe), _without_text(probe)):
        return fault
    for name in ("min_length", "min_new_tokens"):
        if value := getattr(generation, name):
            return f"{name} = {value} of generation_config.json lets no answer end before: remove it"
    return None


def _fault_of_forbidden(probe: Probe) -> str | None:
    """Return which token is forbidden though answers or the LLM have it, or only the LLM forbids."""
    generation, tokenizer = probe.model.generation_config, probe.tokenizer
    forbidden = forbidden_ids(generation)
    for document in probe.encoded:
        if needed := forbidden & set(document.labels[document.labels >= 0].tolist()):
            what = f"suppress_tokens or bad_words_ids has {named(tokenizer, needed)}"
            return f"{what}, which answers need: remove it"
    if probe.llm is None:
        return None
    own = forbidden_ids(probe.llm.generation_config)
    if lost := own - forbidden:
        return f"suppress_tokens lacks {named(tokenizer, lost)}, which the LLM never answers: add it"
    if more := forbidden - own - _without_text(probe):
        return f"suppress_tokens has {named(tokenizer, more)}, which the LLM may answer: remove it"
    for name in _SHARED:
        ours, others = (getattr(each, name) for each in (generation, probe.llm.generation_config))
        if ours != others:
            return f"{name} = {ours} in generation_config.json, but {others} in the LLM's: copy it"
    return None


def _fault_of_llm(probe: Probe) -> str | None:
    """Return which setting of the decoder is not that of the LLM it was made of."""
    if probe.llm is None:
        return None
    ours, own = (each.config.get_text_config().to_dict() for each in (probe.model, probe.llm))
    for name in sorted(ours.keys() | own.keys()):
        is_free = name.startswith("_") or name in _FREE
        if not is_free and ours.get(name) != own.get(name):
            return f"{name} = {ours.get(name)} in config.json, but {own.get(name)} in the LLM's"
    return None


def _gap(probe: Probe) -> str | None:
    """Return what generation_config.json and config.json lack for the tokenizer and its chat template."""
    generation, tokenizer, rows = probe.model.generation_config, probe.tokenizer, _rows(probe)
    if (largest := max(tokenizer.get_vocab().values())) >= rows:
        return f"the tokenizer has {largest + 1:,} tokens, the model's embedding {rows:,}"
    ends = set(stop_ids(generation))
    if missing := answer_ends(probe) - ends:
        what = f"eos_token_id lacks {named(tokenizer, missing)}, where the chat template ends answers"
        return f"{what}: add it to generation_config.json"
    if not probe.sees_images:
        return None
    if others := set(stop_ids(probe.model.config.get_text_config())) - ends:
        what = f"eos_token_id of config.json has {named(tokenizer, others)}, but that of"
        return f"{what} generation_config.json does not: make them agree"
    for name in ("bos_token_id", "pad_token_id"):
        if getattr(generation, name) not in (None, own := getattr(tokenizer, name)):
            return f"{name} = {getattr(generation, name)}, but the tokenizer's is {own}"
    if tokenizer.pad_token_id in probe.model.config.vision_token_ids:
        return f"the padding token {tokenizer.pad_token!r} is one of images: set another pad_token"
    if missing := _without_text(probe) - forbidden_ids(generation) - ends:
        what = f"suppress_tokens lacks {named(tokenizer, missing)}"
        return f"{what}: answers may have tokens of images, or rows of padding"
    return None


def _without_text(probe: Probe) -> set[int]:
    """Return the IDs that stand for no text: tokens of images, and rows of padding."""
    images = probe.encoder.vision_ids if probe.encoder else np.empty(0, int)
    return set(images.tolist()) | unused_ids(probe.tokenizer, _rows(probe))


def _rows(probe: Probe) -> int:
    return int(probe.model.get_input_embeddings().num_embeddings)
