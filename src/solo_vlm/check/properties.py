"""Properties that a model must have to be trained and used without silent errors, one function each."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from solo_vlm.check.layers import (
    Parting,
    Trace,
    attention,
    difference,
    first_parting,
    isolated,
    narrow_windows,
    trace,
)
from solo_vlm.check.probe import Probe, changed_after, make_images, pad_left, png
from solo_vlm.data.collate import collate, model_inputs
from solo_vlm.data.encode import IGNORE_INDEX, Document, encode
from solo_vlm.data.sample import Sample
from solo_vlm.generate.cache import PrefixCache
from solo_vlm.generate.pipeline import GenerationPipeline
from solo_vlm.models.checks import check_processor
from solo_vlm.models.load import save_model
from solo_vlm.models.stops import stop_ids
from solo_vlm.utils.errors import SoloError

Status = Literal["holds", "fails", "differs", "skipped"]

_NOISE = 1e-5  # of equal computations in equal shapes, relative
_NEW_TOKENS = 6
_WHOLE_PROMPT = "tokens of a prompt see each other in both directions (use_bidirectional_attention)"
_CHOOSERS = (".experts.", ".indexer.")  # experts that no token chose, and choices without a gradient
_MAX_SAVED_BYTES = 2**32


@dataclass(frozen=True)
class Finding:
    """Result of checking one property.

    Attributes:
        status: "holds", "fails", "differs" (outside of what solo-vlm uses) or "skipped" (does not apply).
        detail: Inputs that were compared, or the fault.
        difference: Largest difference found, relative; None if no numbers were compared.
        layer: First layer whose outputs differ.
    """

    status: Status
    detail: str
    difference: float | None = None
    layer: str | None = None


def text_logits(probe: Probe) -> Finding:
    """Compare the logits of text with those of the LLM that the model was made of."""
    if probe.llm is None:
        return Finding("skipped", "no LLM to compare with: give --llm PATH")
    rows = probe.llm.get_input_embeddings().num_embeddings
    ids = torch.arange(3, 35, device=probe.model.device)[None] * (rows // 40) % rows
    ours, own = trace(probe.model, {"input_ids": ids}), trace(probe.llm, {"input_ids": ids})
    vocabulary = min(ours.logits.shape[-1], own.logits.shape[-1])
    for each in (ours, own):
        each.states["logits"] = each.logits[..., :vocabulary]
    return _compared(first_parting(ours, own, probe.tolerance), f"{ids.shape[1]} tokens", ours, own)


def causality(probe: Probe) -> Finding:
    """Change later tokens and images, and compare the outputs before them."""
    document = probe.documents[0]
    noise = max(_NOISE, probe.tolerance / 10)
    with narrow_windows(probe.model):
        before = trace(probe.model, probe.inputs(document))
        for cut in _cuts(probe, document):
            changed = changed_after(document, cut, probe.model.config)
            after = trace(probe.model, probe.inputs(changed)).part(stop=cut)
            if parting := first_parting(after, before.part(stop=cut), noise):
                what = f"token {cut} changes the outputs before it: {parting}"
                status: Status = "differs" if probe.sees_whole_prompt else "fails"
                what += f"; by design: {_WHOLE_PROMPT}" if probe.sees_whole_prompt else ""
                return Finding(status, what, parting.difference, parting.layer)
    return Finding("holds", f"{len(document)} tokens", 0.0)


def packing(probe: Probe) -> Finding:
    """Compare packed documents, as in training, with each one alone, by the model's eager attention."""
    if probe.is_foreign:
        return Finding("skipped", "solo train trains SOLO models and plain LLMs")
    with isolated(probe.model):
        return _packing(probe)


def packing_by_transformers(probe: Probe) -> Finding:
    """Compare documents that only `position_ids` keep apart, as for Trainer and TRL, with each one alone."""
    finding = _packing(probe, use_positions_only=True)
    if finding.status != "fails":
        return finding
    advice = "" if probe.is_foreign else "; solo train does not use this path"
    return Finding("differs", finding.detail + advice, finding.difference, finding.layer)


def slices(probe: Probe, count: int) -> Finding:
    """Compare slices of a packed row with the row, where each token attends to itself alone.

    Processes exchange what attention needs; nothing else may look at other tokens.
    """
    length = math.ceil(sum(map(len, probe.documents)) / count) * count
    batch = collate(probe.documents, length, int(probe.documents[0].input_ids[0]))
    with isolated(probe.model), torch.no_grad():
        row: Any = probe.model.packed_row
        row.attend_across = lambda _, query, key, value, sinks: value.repeat_interleave(
            query.shape[1] // value.shape[1], 1
        )
        whole, *parts = (
            probe.model(**model_inputs(probe.model, batch, *part), use_cache=False, num_items_in_batch=1)
            for part in ((0, 1), *((index, count) for index in range(count)))
        )
    error = max(
        difference(torch.cat([part.logits for part in parts], 1), whole.logits),
        abs(sum(float(part.loss) for part in parts) / float(whole.loss) - 1),
    )
    if not error <= probe.tolerance:
        what = f"slices of a row differ from the row by {error:.2g}: tokens look at others outside attention"
        return Finding("fails", what, error)
    return Finding("holds", f"{count} slices of {length} tokens", error)


def labels(probe: Probe) -> Finding:
    """Compare the loss with an independent cross entropy of the logits at t for the label at t + 1."""
    documents = probe.encoded or probe.documents
    with isolated(probe.model) if not probe.is_foreign else attention(probe.model, "eager"):
        batch = probe.packed(documents) if not probe.is_foreign else _labeled(probe, documents[0])
        with torch.no_grad():
            output = probe.model(**batch, use_cache=False)
    loss, own = _loss(probe.model, output), _cross_entropy(output.logits, batch["labels"])
    error = abs(loss - own) / max(own, 1e-12)
    count = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    if not error <= probe.tolerance:
        what = f"the loss of {count} labels is {loss:.6f}, but that of the logits at t for the label at t + 1"
        return Finding("fails", f"{what} is {own:.6f}: labels are not shifted exactly once", error)
    return Finding("holds", f"loss of {count} labels", error)


def supervision(probe: Probe) -> Finding:
    """Compare the tokens that have a label with the assistant's answers in the samples."""
    if not probe.encoder:
        return Finding("skipped", "no tokenizer")
    if fault := _label_fault(probe):
        return Finding("fails", fault)
    tokenizer = probe.encoder.tokenizer
    runs = [tokenizer.decode(run).strip() for run in _runs(probe.encoded[0])]
    return Finding("holds", f"on {' | '.join(runs)}")


def batching(probe: Probe) -> Finding:
    """Compare generation in a padded batch with that of each prompt alone."""
    if probe.sees_whole_prompt:
        return Finding("skipped", _WHOLE_PROMPT)
    prompts = [probe.inputs(document) for document in probe.documents[:2]]
    with narrow_windows(probe.model):
        alone = [_generate(probe.model, prompt) for prompt in prompts]
        together = _generate(probe.model, _padded(probe, prompts))
    side = getattr(probe.encoder.tokenizer, "padding_side", "left") if probe.encoder else "left"
    note = f"; padded on the {side}, as the tokenizer's padding_side says" if side != "left" else ""
    worst = 0.0
    for row, own in enumerate(alone):
        for step in range(_NEW_TOKENS):
            error = difference(together.logits[step][row].float(), own.logits[step][0].float())
            worst = max(worst, error)
            if error > probe.tolerance:
                what = f"prompt {row} of {len(alone)}, new token {step}: logits differ by {error:.2g}{note}"
                return Finding("fails", what, error, _layer(_layer_of_padding, probe, prompts, row))
            if together.logits[step][row].argmax() != own.logits[step][0].argmax():
                break  # equal up to rounding, but a tie: the rest may differ
    note = "; its tokenizer pads on the right" if side != "left" else ""
    return Finding("holds", f"{len(prompts)} prompts, {_NEW_TOKENS} new tokens{note}", worst)


def caching(probe: Probe) -> Finding:
    """Compare generation with a cache with the model's logits without one."""
    if probe.sees_whole_prompt:
        return Finding("skipped", _WHOLE_PROMPT)
    document = probe.documents[0]
    prompt, worst = probe.inputs(document), 0.0
    with narrow_windows(probe.model):
        generated = _generate(probe.model, prompt)
        whole = {**prompt, "input_ids": generated.sequences[:, :-1]}
        uncached = trace(probe.model, whole)
        for step, logits in enumerate(generated.logits):
            own = uncached.logits[:, len(document) - 1 + step]
            worst = max(worst, error := difference(logits.float(), own))
            if error > probe.tolerance:
                layer = _layer(_layer_of_cache, probe, whole, len(document), uncached)
                what, chosen = f"new token {step}: logits differ by {error:.2g}", _chosen_tokens(probe)
                if chosen and chosen < len(document):
                    what += f"; sparse attention (index_topk={chosen}) breaks ties of its scores in any order"
                    return Finding("differs", what, error, layer)
                return Finding("fails", what, error, layer)
        paths = ["generate"]
        # In 16 bits, rounding decides between tokens.
        if probe.sees_images and probe.encoder and probe.model.dtype == torch.float32:
            paths += ["solo generate", "prefix cache"]
            prefix_cache = PrefixCache()
            for cache, name in ((None, paths[1]), (prefix_cache, paths[1]), (prefix_cache, paths[2])):
                pipeline = GenerationPipeline(probe.model, probe.encoder.processor, cache)
                sequences, _ = pipeline.generate(
                    {**prompt, "attention_mask": torch.ones_like(prompt["input_ids"])},
                    _NEW_TOKENS,
                    min_new_tokens=_NEW_TOKENS,
                )
                if not torch.equal(sequences, generated.sequences):
                    return Finding("fails", f"{name}: other tokens than without a cache")
    return Finding("holds", f"{_NEW_TOKENS} new tokens: {', '.join(paths)}", worst)


def patches(probe: Probe) -> Finding:
    """Compare what the decoder receives at `<vpatch>` with patches cut, normalized and embedded here.

    The model and its processor also have to agree about tokens and normalization.
    """
    if probe.is_foreign:
        return _image_places(probe)
    if not (probe.sees_images and probe.encoder):
        return Finding("skipped", "no processor" if probe.sees_images else "no images")
    processor, model = probe.encoder.processor, probe.model
    try:
        check_processor(model.config, processor)
    except SoloError as error:
        return Finding("fails", str(error))
    images = make_images(processor.image_processor)
    if not images:
        return Finding("skipped", "the image processor resizes images of every size")
    content: list[dict[str, Any]] = [{"type": "image"}] * len(images) + [{"type": "text", "text": "?"}]
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "!"}]},
    ]
    document = encode(Sample(chat, [png(pixels) for pixels in images]), processor)
    received = _decoder_input(model, probe.inputs(document))[0]  # (length, hidden)
    places = np.flatnonzero(document.input_ids == model.config.image_token_id)
    expected = _embedded_patches(model, images).to(received)
    shapes = ", ".join(
        "{} x {}".format(*processor.image_processor.get_patch_grid(*i.shape[:2])) for i in images
    )
    if len(places) != len(expected):
        return Finding("fails", f"{len(places)} <vpatch> tokens for {len(expected)} patches ({shapes})")
    errors = [difference(received[place], own) for place, own in zip(places, expected, strict=True)]
    if (worst := max(errors)) > probe.tolerance:
        first = next(number for number, error in enumerate(errors) if error > probe.tolerance)
        what = f"patch {first} of {len(errors)} (grids {shapes}) is not the image's there: off by {worst:.2g}"
        return Finding("fails", what, worst, "embeddings")
    return Finding("holds", f"grids {shapes} in reading order", worst)


def gradients(probe: Probe) -> Finding:
    """Find trainable parameters that get no gradient from the training loss, or one that is not finite."""
    documents = [*probe.documents, *(document for document in probe.encoded if len(document) < 512)]
    with isolated(probe.model) if not probe.is_foreign else attention(probe.model, "eager"):
        batch = probe.packed(documents) if not probe.is_foreign else _labeled(probe, documents[0])
        if probe.image_inputs:
            batch = {**probe.image_inputs, "labels": probe.image_inputs["input_ids"]}
        text_only = probe.model.get_decoder() if probe.is_foreign and not probe.image_inputs else None
        missing, broken, count = _without_gradient(probe.model, batch, text_only)
    if broken:
        rows = probe.model.get_input_embeddings().weight[batch["input_ids"]]  # type: ignore[index]
        zeros = batch["input_ids"][(rows == 0).all(-1)]
        note = f"; the embedding of token {int(zeros[0])} is zero: initialize it" if len(zeros) else ""
        return Finding("fails", f"not finite (NaN or infinite) for {_some(broken)}{note}")
    idle = [name for name in missing if any(part in name for part in _CHOOSERS)]
    missing = [name for name in missing if name not in idle]
    note = f"; none reaches {len(idle)} of experts or indexers ({idle[0]}, ...)" if idle else ""
    if missing:
        return Finding("differs" if probe.is_foreign else "fails", f"none reaches {_some(missing)}{note}")
    note += " of the decoder; without a processor, there are no images" if text_only else ""
    return Finding("holds", f"{count - len(idle)} parameters{note}")


def saving(probe: Probe) -> Finding:
    """Compare the model, bit for bit, with itself after saving and loading."""
    size, where = sum(values.nbytes for values in probe.model.state_dict().values()), tempfile.gettempdir()
    if size > min(_MAX_SAVED_BYTES, shutil.disk_usage(where).free // 2):
        return Finding("skipped", f"{size / 2**30:.1f} GiB of weights are too many for {where}")
    with tempfile.TemporaryDirectory() as temporary:
        if probe.encoder:
            save_model(Path(temporary), probe.model, probe.encoder.processor)
        else:
            probe.model.save_pretrained(temporary)
        loaded = type(probe.model).from_pretrained(temporary, dtype=probe.model.dtype).eval()
    loaded = loaded.to(probe.model.device)
    saved, reloaded = probe.model.state_dict(), loaded.state_dict()
    changed = [
        name
        for name, values in saved.items()
        if name not in reloaded or not torch.equal(values, reloaded[name].to(values.device))
    ]
    if changed or len(saved) != len(reloaded):
        names = changed or sorted(reloaded.keys() - saved.keys())
        return Finding("fails", f"{names[0]} differs, one of {len(names)} weights")
    inputs = probe.inputs(probe.documents[0])
    one, other = trace(loaded, inputs), trace(probe.model, inputs)
    return _compared(first_parting(one, other, _NOISE), f"{len(saved)} weights", one, other)


# ------------------------------------------------------------------------------------ parts of properties


def _compared(parting: Parting | None, what: str, trace: Trace, reference: Trace) -> Finding:
    if parting:
        return Finding("fails", f"{what}: {parting}", parting.difference, parting.layer)
    return Finding("holds", what, difference(trace.logits, reference.logits))


def _cuts(probe: Probe, document: Document) -> list[int]:
    """Return positions of text near the start, in the middle and at the end of a document."""
    vision = probe.model.config.vision_token_ids if probe.sees_images else ()
    places = np.flatnonzero(np.isin(document.input_ids, vision, invert=True))
    return [int(places[number]) for number in (2, len(places) // 2, -1)]


def _packing(probe: Probe, use_positions_only: bool = False) -> Finding:
    documents, model = probe.documents, probe.model
    with narrow_windows(model):
        packed = _trace_packed(probe, documents, use_positions_only)
        with attention(model, "eager"):
            alone = [trace(model, probe.inputs(document)) for document in documents]
        start, worst = 0, 0.0
        for number, (document, own) in enumerate(zip(documents, alone, strict=True), 1):
            ours = packed.part(start=start, stop=start + len(document))
            if parting := first_parting(ours, own, probe.tolerance):
                what = f"document {number} of {len(documents)} {parting}"
                return Finding("fails", what, parting.difference, parting.layer)
            worst = max(worst, difference(ours.logits, own.logits))
            start += len(document)
        # A leak below the tolerance shows where nothing may change at all.
        changed = [changed_after(documents[0], 0, model.config), *documents[1:]]
        after = _trace_packed(probe, changed, use_positions_only)
    start, stop = len(documents[0]), sum(map(len, documents))
    noise = max(_NOISE, probe.tolerance / 10)
    parting = first_parting(after.part(start=start, stop=stop), packed.part(start=start, stop=stop), noise)
    if parting:
        what = f"document 1 changes the outputs of the next: {parting}"
        return Finding("fails", what, parting.difference, parting.layer)
    lengths = ", ".join(str(len(document)) for document in documents)
    return Finding("holds", f"documents of {lengths} tokens", worst)


def _trace_packed(probe: Probe, documents: list[Document], use_positions_only: bool) -> Trace:
    inputs = probe.packed(documents)
    del inputs["labels"]
    if use_positions_only:
        names = ("input_ids", "position_ids", "pixel_values", "image_grid_thw")
        inputs = {name: inputs[name] for name in names if name in inputs}
    return trace(probe.model, inputs)


def _label_fault(probe: Probe) -> str | None:
    """Return what is wrong with the labels of the encoder, or None."""
    assert probe.encoder
    tokenizer, ends = probe.encoder.tokenizer, set(stop_ids(probe.model.generation_config))
    ends |= {tokenizer.eos_token_id, *getattr(probe.encoder.processor, "end_of_turn_ids", ())}
    for sample, document in zip(probe.samples, probe.encoded, strict=True):
        supervised = document.labels != IGNORE_INDEX
        if not np.array_equal(document.labels[supervised], document.input_ids[supervised]):
            return "a label is not the token at its own position"
        if np.isin(document.labels, probe.encoder.vision_ids).any():
            return "a token of an image has a label"
        answers = [_text(message) for message in sample.messages if message["role"] == "assistant"]
        runs = _runs(document)
        for run, answer in zip(runs, answers, strict=False):
            spelled = tokenizer.decode(tokenizer.encode(answer, add_special_tokens=False))
            if _letters(tokenizer.decode(run[:-1])) != _letters(spelled):
                return f"labels on {tokenizer.decode(run)!r}, where the answer is {answer!r}"
            if run[-1] not in ends:
                return f"the answer {answer!r} ends at {tokenizer.decode(run[-1:])!r}, which ends no turn"
        if len(runs) != len(answers):
            return f"{len(runs)} supervised parts for {len(answers)} answers"
    return None


def _runs(document: Document) -> list[NDArray[np.int64]]:
    """Return the runs of supervised tokens."""
    supervised = np.concatenate([[False], document.labels != IGNORE_INDEX, [False]])
    edges = np.flatnonzero(supervised[1:] != supervised[:-1])
    return [document.input_ids[start:stop] for start, stop in edges.reshape(-1, 2)]


def _text(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def _letters(text: str) -> str:
    return "".join(text.split())


def _labeled(probe: Probe, document: Document) -> dict[str, Any]:
    labels = torch.from_numpy(document.labels)[None].to(probe.model.device)
    return {**probe.inputs(document), "labels": labels}


def _loss(model: PreTrainedModel, output: Any) -> float:
    """Return the loss of the labels, without the auxiliary loss of a router."""
    loss = output.loss.double()
    if getattr(output, "aux_loss", None) is not None:
        loss = loss - model.config.get_text_config().router_aux_loss_coef * output.aux_loss.double()
    return float(loss)


def _cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Return the mean cross entropy, in float64, of the logits at t for the label at t + 1."""
    logits, targets = logits[:, :-1].double(), labels[:, 1:].to(logits.device)
    chosen = targets != IGNORE_INDEX
    log_probabilities = logits[chosen] - logits[chosen].logsumexp(-1, keepdim=True)
    return float(-log_probabilities.gather(1, targets[chosen][:, None]).mean())


@torch.no_grad()
def _generate(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    """Generate greedily with the model's default cache; return sequences and logits of each step."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    return model.generate(
        **{**inputs, "attention_mask": mask},
        max_new_tokens=_NEW_TOKENS,
        min_new_tokens=_NEW_TOKENS,
        do_sample=False,
        pad_token_id=int(inputs["input_ids"][0, 0]),
        return_dict_in_generate=True,
        output_logits=True,
    )


def _padded(probe: Probe, prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return prompts as one batch: padded as the processor of a SOLO model does it, else on the left."""
    rows = [prompt["input_ids"] for prompt in prompts]
    if probe.sees_images and probe.encoder:
        padded = probe.encoder.tokenizer.pad(
            {"input_ids": [row[0].tolist() for row in rows]}, return_tensors="pt"
        )
        batch = {name: padded[name].to(rows[0].device) for name in ("input_ids", "attention_mask")}
    else:
        batch = pad_left(rows, int(rows[0][0, 0]))
    for name in ("pixel_values", "image_grid_thw"):
        if values := [prompt[name] for prompt in prompts if name in prompt]:
            batch[name] = torch.cat(values)
    return batch


def _chosen_tokens(probe: Probe) -> int | None:
    """Return how many tokens each query of a sparse attention chooses by scores that may be equal."""
    chosen: int | None = getattr(probe.model.config.get_text_config(), "index_topk", None)
    return chosen


def _layer(find: Callable[..., str | None], *arguments: Any) -> str | None:
    """Return the layer of a fault that is already known; None if the family takes other arguments."""
    try:
        return find(*arguments)
    except Exception:  # of any type, from the code of any family
        return None


def _layer_of_padding(probe: Probe, prompts: list[dict[str, Any]], row: int) -> str | None:
    """Return the first layer that computes something else for a prompt in a padded batch, if one does."""
    batch = _padded(probe, prompts)
    mask = batch["attention_mask"]
    if "position_ids" in signature(probe.model.forward).parameters:
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    start = int(mask[row].argmax())
    with narrow_windows(probe.model):
        together = trace(probe.model, batch).part(row, start, start + int(mask[row].sum()))
        parting = first_parting(together, trace(probe.model, prompts[row]), probe.tolerance)
    return parting.layer if parting else None


def _layer_of_cache(probe: Probe, whole: dict[str, Any], length: int, uncached: Trace) -> str | None:
    """Return the first layer that computes something else with a cache of the prompt, if one does."""
    prompt = {**whole, "input_ids": whole["input_ids"][:, :length]}
    with torch.no_grad():
        cache = getattr(probe.model(**prompt, use_cache=True), "past_key_values", None)
    if cache is None:
        return None
    for place in range(length, whole["input_ids"].shape[1]):
        token = {"input_ids": whole["input_ids"][:, place : place + 1], "past_key_values": cache}
        own = uncached.part(start=place, stop=place + 1)
        if parting := first_parting(trace(probe.model, token), own, probe.tolerance):
            return parting.layer
    return None


class _Received(Exception):
    """Ends a forward pass at the decoder's first layer."""


def _decoder_input(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Return the embeddings that the decoder receives, (1, length, hidden), without running it."""
    received: list[Tensor] = []

    def receive(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        received.append(kwargs["inputs_embeds"])
        raise _Received

    with _hooked(model.get_decoder(), receive), torch.no_grad(), suppress(_Received):
        model(**inputs, use_cache=False)
    return received[0].float()


def _image_places(probe: Probe) -> Finding:
    """Compare what the decoder of another image-text model receives for two images."""
    inputs, config = probe.image_inputs, probe.model.config
    token_id = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if inputs is None or token_id is None:
        return Finding("skipped", "no processor")
    one = _decoder_input(probe.model, inputs)[0]
    pixels = inputs["pixel_values"]
    other = _decoder_input(probe.model, {**inputs, "pixel_values": pixels.flip(-1) + 0.5})[0]
    changed, places = (one != other).any(-1), inputs["input_ids"][0] == token_id
    what = f"{int(places.sum())} image tokens"
    if not bool(torch.equal(changed, places)):
        wrong = int((changed != places).nonzero()[0])
        return Finding("fails", f"{what}, but another image changes other places, such as token {wrong}")
    return Finding("holds", f"another image changes the {what}, and no other place")


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _embedded_patches(model: Any, images: list[NDArray[np.uint8]]) -> Tensor:
    """Cut, normalize and embed images patch by patch, (num_patches, hidden) float64."""
    config, side = model.config, model.config.vision_patch_size
    mean, std = np.array(config.image_mean)[:, None, None], np.array(config.image_std)[:, None, None]
    patches = []
    for pixels in images:
        height, width, _ = pixels.shape
        for top in range(0, height, side):
            for left in range(0, width, side):
                patch = pixels[top : top + side, left : left + side].transpose(2, 0, 1) / 255.0
                patches.append(((patch - mean) / std).reshape(-1))
    token = model.model.embed_tokens(torch.tensor([config.image_token_id], device=model.device))
    layer, values = model.get_submodule("model.embed_vision_patch"), torch.from_numpy(np.stack(patches))
    if isinstance(layer, nn.Linear):
        embedded = values @ layer.weight.double().cpu().T
    else:
        embedded = layer(values.to(token)).double().cpu()
    return embedded + token.double().cpu()


def _without_gradient(
    model: PreTrainedModel, batch: dict[str, Any], part: nn.Module | None = None
) -> tuple[list[str], list[str], int]:
    """Return the trainable parameters without a gradient, and with one that is not finite, and their count.

    Only those of `part` count, if it is given. Gradients are dropped as soon as they are seen, so that those
    of a large model do not add up.
    """
    reached: set[int] = set()
    broken: set[int] = set()

    def see(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        if not bool(parameter.grad.isfinite().all()):
            broken.add(id(parameter))
        if bool(parameter.grad.any()):
            reached.add(id(parameter))
        parameter.grad = None

    counted = {id(each) for each in (part or model).parameters() if each.requires_grad}
    trainable = {name: each for name, each in model.named_parameters() if id(each) in counted}
    handles = [each.register_post_accumulate_grad_hook(see) for each in trainable.values()]
    model.train()
    try:
        with torch.enable_grad():
            model(**batch, use_cache=False).loss.backward()
    finally:
        model.eval()
        for handle in handles:
            handle.remove()
    missing = [name for name, each in trainable.items() if id(each) not in reached]
    return missing, [name for name, each in trainable.items() if id(each) in broken], len(trainable)


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
