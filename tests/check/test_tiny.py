import pytest
import torch

from solo_vlm.check.tiny import WINDOW, text_families, tiny_config, tiny_llm, why_not_text

HYBRIDS = {
    "bailing_hybrid": {"linear_attention", "full_attention"},
    "bamba": {"linear_attention", "full_attention"},
    "deepseek_v4": {"compressed_sparse_attention", "heavily_compressed_attention"},
    "gemma3n_text": {"sliding_attention", "full_attention"},
    "gemma4_text": {"sliding_attention", "full_attention"},
    "gpt_oss": {"sliding_attention", "full_attention"},
    "granitemoehybrid": {"linear_attention", "full_attention"},
    "jamba": {"linear_attention", "full_attention"},
    "kimi_linear": {"linear_attention", "full_attention"},
    "lfm2": {"conv", "full_attention"},
    "lfm2_moe": {"conv", "full_attention"},
    "llama4_text": {"chunked_attention", "full_attention"},
    "minimax": {"linear_attention", "full_attention"},
    "nemotron_h": {"linear_attention", "full_attention", "moe", "mlp"},
    "olmo_hybrid": {"linear_attention", "full_attention"},
    "qwen3": {"sliding_attention", "full_attention"},
    "qwen3_5_text": {"linear_attention", "full_attention"},
    "qwen3_next": {"linear_attention", "full_attention"},
    "recurrent_gemma": {"linear_attention", "sliding_attention"},
    "zamba2": {"linear_attention", "hybrid"},
}


@pytest.mark.parametrize("family", text_families())
def test_tiny_model_is_small_finite_and_causal(family):
    model = tiny_llm(family)
    tokens = torch.arange(20, 20 + 3 * WINDOW)[None]
    changed = tokens.clone()
    changed[0, -1] = 7
    with torch.no_grad():
        logits, others = (model(input_ids=ids, use_cache=False).logits for ids in (tokens, changed))
    assert model.num_parameters() < 3_000_000
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.1
    torch.testing.assert_close(logits[:, :-1], others[:, :-1], rtol=0, atol=1e-5)
    assert not torch.equal(logits[:, -1], others[:, -1])


@pytest.mark.parametrize("family", HYBRIDS)
def test_tiny_model_has_layers_of_every_kind(family):
    assert set(tiny_config(family).layer_types) == HYBRIDS[family]


def test_windows_are_shorter_than_documents():
    assert tiny_config("mistral").sliding_window == tiny_config("llama4_text").attention_chunk_size == WINDOW


def test_latent_attention_has_other_sizes_for_queries_and_values():
    config = tiny_config("deepseek_v3")
    assert config.qk_nope_head_dim + config.qk_rope_head_dim != config.v_head_dim


def test_attention_sinks_differ_between_heads():
    sinks = tiny_llm("gpt_oss").model.layers[0].self_attn.sinks
    assert sinks.std() > 0.01


def test_same_seed_makes_same_model():
    first, second = (tiny_llm("llama", seed=1).lm_head.weight for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("family", ["bert", "bart", "gemma3", "gpt-sw3", "xlnet"])
def test_families_other_than_text_decoders_are_left_out_with_a_reason(family):
    assert why_not_text(family)
    assert family not in text_families()
