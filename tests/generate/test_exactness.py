"""Generation equals computing every token anew, for every family of transformers that composes."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
import torch
from tests.factories import make_solo

from solo_vlm.check.tiny import text_families, tiny_config
from solo_vlm.generate import GenerationPipeline
from solo_vlm.generate.cache import supports_prefix_cache
from solo_vlm.generate.exactness import (
    _with_image,
    cache_error,
    padding_error,
    prefix_cache_error,
    reads_padding,
)
from solo_vlm.utils.errors import SoloError

KINDS = {
    "gpt_oss": "sinks, windows and experts",
    "deepseek_v3": "latent attention",
    "minimax": "linear attention with a cache of its own",
    "qwen3_5_text": "gated delta rule",
    "lfm2": "short convolutions",
    "kimi_linear": "linear and latent attention",
    "zamba2": "state space and attention in one layer",
    "mamba2": "a state",
    "rwkv": "a state that padding changes",
    "xlstm": "a cache that fails",
    "openai-gpt": "no cache",
    "gemma3n_text": "layers that share keys, embeddings per layer",
    "llama4_text": "chunks",
    "bloom": "ALiBi",
    "opt": "learned positions",
}
NO_BEAMS = {"rwkv", "recurrent_gemma"}  # states that are no cache, or in the layers
EXACT = 1e-4


def make_model(family: str):
    """Make a model without sparse attention, whose choice among equal scores is arbitrary."""
    everything = {
        name: 512 for name in ("index_topk", "indexer_budget") if hasattr(tiny_config(family), name)
    }
    return make_solo(family, **everything)


def check_family(family: str) -> None:
    """Check that whatever a pipeline does with a model is exact."""
    solo = make_model(family)
    pipeline = GenerationPipeline(solo.model, solo.processor)
    if pipeline.use_cache:
        assert cache_error(solo.model) < EXACT
    if pipeline.batches:
        assert padding_error(solo.model, pipeline.use_cache) < EXACT
    if supports_prefix_cache(solo.model.config.text_config):
        assert pipeline.use_cache
        assert prefix_cache_error(solo.model) < EXACT


@pytest.mark.parametrize("family", KINDS)
def test_every_kind_of_layer_generates_exactly(family):
    check_family(family)


@torch.no_grad()
def check_beams(family: str) -> None:
    """Compare beams with those found without a cache, or see that the family rejects them with one."""
    model = make_model(family).model
    ids = torch.randint(3, 300, (1, 11), generator=torch.Generator().manual_seed(0))
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6, "min_new_tokens": 6}
    options |= {
        "attention_mask": torch.ones_like(ids),
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    expected = model.generate(ids, use_cache=False, **options)
    if family == "xlstm":
        with pytest.raises(ValueError, match="the cache of xlstm fails in transformers: set use_cache=False"):
            model.generate(ids, **options)
        return
    if family in NO_BEAMS:
        with pytest.raises(ValueError, match=f"cannot reorder the states of {family}: set num_beams=1"):
            model.generate(ids, **options)
        return
    found = model.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, atol=EXACT, rtol=0)


@pytest.mark.parametrize("family", [*KINDS, *sorted(NO_BEAMS - KINDS.keys())])
def test_beams_with_a_cache_equal_those_without(family):
    check_beams(family)


@pytest.mark.slow
def test_every_family_searches_beams_exactly_or_refuses():
    for family in text_families():
        with suppress(SoloError):
            check_beams(family)


@torch.no_grad()
def check_family_in_transformers(family: str) -> None:
    """Compare answers of plain `generate` with those without a cache, or see that it refuses in one line."""
    model = make_model(family).model
    image = _with_image(model)
    repeated = torch.tensor([[40, 41, 42, 40, 43, 41, 40, 42]]).repeat(1, 4)  # has tokens to look up
    ids = torch.cat([image["input_ids"], repeated], 1)
    inputs = {**image, "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def prefer_repeated(ids, scores):
        return scores.index_add(1, repeated[0, :5], torch.full((len(scores), 5), 50.0))

    options = {"max_new_tokens": 12, "min_new_tokens": 12, "logits_processor": [prefer_repeated]}
    expected = model.generate(**inputs, use_cache=False, **options)
    for mode, refusal in {
        (): "fails in transformers: set use_cache=False",
        (
            ("cache_implementation", "static"),
            ("disable_compile", True),
        ): "with a static cache|use_cache=False",
        (("prompt_lookup_num_tokens", 3),): "with stateful models|requires a cache",
    }.items():
        try:
            found = model.generate(**inputs, **options, **dict(mode))
        except (ValueError, RuntimeError) as error:
            assert re.search(refusal, str(error)), (mode, error)
        else:
            assert torch.equal(found, expected), mode


@pytest.mark.parametrize("family", ["llama", "gpt_neo", "bloom", "zaya", "xlstm", "minimax", "gemma3n_text"])
def test_plain_generate_is_exact_or_refuses(family):
    check_family_in_transformers(family)


@pytest.mark.slow
def test_plain_generate_of_every_family_is_exact_or_refuses():
    for family in text_families():
        with suppress(SoloError):
            check_family_in_transformers(family)


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search is not supported: decode greedily"),
        ({"dola_layers": "low"}, "dola_generation is not supported: decode greedily"),
        ({"num_beams": 2, "force_words_ids": [[5]]}, "constrained_beam_search is not supported"),
        (
            {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
            "group_beam_search is not supported",
        ),
        ({"assistant_early_exit": 1}, "assistant_early_exit is not supported: set prompt_lookup_num_tokens"),
        ({"assistant_model": make_solo().model}, "an assistant_model gets no images from transformers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_mode_of_generate_that_cannot_be_right_is_refused(options, refusal):
    model = make_solo().model
    with pytest.raises(ValueError, match=refusal):
        model.generate(**_with_image(model), **options, trust_remote_code=True, max_new_tokens=4)


def test_assistant_proposes_tokens_for_a_chat_without_images():
    model, assistant = make_solo().model, make_solo(seed=1).model
    ids = torch.tensor([[40, 41, 42] * 5])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "min_new_tokens": 8}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expected)


@pytest.mark.parametrize("family", ["recurrent_gemma", "qwen3_5_text", "mamba2"])
def test_assisted_generation_is_rejected_where_a_past_cannot_be_cut(family):
    model, ids = make_model(family).model, torch.arange(3, 9)[None].repeat(1, 3)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids, attention_mask=torch.ones_like(ids), prompt_lookup_num_tokens=3, max_new_tokens=4)


@pytest.mark.slow
def test_every_family_generates_exactly_or_is_refused():
    exact = 0
    for family in text_families():
        try:
            check_family(family)
        except SoloError:
            continue
        exact += 1
    assert exact >= 120


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "expected"),
    [("rwkv", True), ("recurrent_gemma", True), ("lfm2_moe", False), ("mamba2", False)],
)
def test_padding_that_a_layer_reads_is_noticed(family, expected, dtype):
    """In bfloat16 too, whose rounding is as large as the effect of padding on RecurrentGemma."""
    assert reads_padding(make_model(family).model.to(dtype)) == expected


def test_stale_keys_in_a_prefix_are_noticed():
    """A model that changes after a prompt was cached must not go unnoticed either."""
    model = make_model("gpt_oss").model
    assert prefix_cache_error(model) < EXACT
    keys = model.model.language_model.layers[-1].self_attn.k_proj
    calls = iter(range(10**6))
    keys.register_forward_hook(lambda module, args, out: out + (next(calls) == 0))
    assert prefix_cache_error(model) > 1e-3


def test_random_prompts_are_reproducible_and_free_of_vision_tokens():
    from solo_vlm.generate.exactness import _random_ids

    model = make_model("gpt_oss").model
    ids = _random_ids(model, 1000, seed=0)
    assert torch.equal(ids, _random_ids(model, 1000, seed=0))
    assert not set(ids[0].tolist()) & set(model.generation_config.suppress_tokens)


def test_padding_that_makes_logits_nan_is_noticed():
    model = make_solo().model
    model.get_input_embeddings().weight.data[0] = float("nan")  # of the token that pads
    assert reads_padding(model)
