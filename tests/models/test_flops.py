"""FLOPs and parameters against torch's counter, brute force, and models on the meta device."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.factories import LLM_CONFIGS, SIZES
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    GPT2Config,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    T5Config,
)

from solo_vlm.check.tiny import text_families, tiny_config
from solo_vlm.models.flops import (
    AttentionLayer,
    Flops,
    ModelShape,
    count_parameters,
    forward_flops,
    image_flops,
    text_flops,
    training_flops,
)
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.modeling_solo import SoloForConditionalGeneration
from solo_vlm.models.solo.processing_solo import num_image_tokens
from solo_vlm.train.activation_checkpointing import prepare_layers
from solo_vlm.utils.errors import SoloError

TOKENS = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS = {
    **LLM_CONFIGS,
    "granite": lambda **sizes: GraniteConfig(**sizes),
    "phi3": lambda **sizes: Phi3Config(**sizes),
    "qwen2": lambda **sizes: Qwen2Config(**sizes),
    "smollm3": lambda **sizes: SmolLM3Config(mlp_bias=True, attention_bias=True, **sizes),
}
# Large enough that matrices dominate uncounted operations, and attention is not negligible.
DECODER = LlamaConfig(
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    **TOKENS,
)
LENGTH = 256


@pytest.mark.parametrize("family", CONFIGS)
def test_parameter_counts_match_the_model(family):
    text = CONFIGS[family](**TOKENS, **SIZES)
    config = SoloConfig(text_config=text)
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(text)
        solo = SoloForConditionalGeneration(config)
    assert count_parameters(text).total == sum(parameter.numel() for parameter in llm.parameters())
    assert count_parameters(config).total == sum(parameter.numel() for parameter in solo.parameters())
    layers = sum(p.numel() for name, p in llm.named_parameters() if ".layers." in name)
    counts = count_parameters(text)
    assert counts.attention + counts.mlp + counts.norms - text.hidden_size == layers


def test_encoder_decoder_is_rejected():
    with pytest.raises(SoloError, match="cannot count t5: it is not a causal language model"):
        count_parameters(T5Config())


@pytest.mark.parametrize("window", [None, 1, 8, 40])
def test_attention_flops_match_visible_positions(window):
    text = LLM_CONFIGS["mistral"](**TOKENS, **SIZES)
    text.sliding_window = window
    lengths = [1, 7, 8, 9, 40, 100]
    visible = sum(min(i + 1, window or i + 1) for length in lengths for i in range(length))
    flops = forward_flops(ModelShape.of(text), lengths).attention
    assert flops == visible * 2 * text.num_hidden_layers * 2 * text.num_attention_heads * text.head_dim


def test_windows_are_read_per_layer():
    text = LLM_CONFIGS["gemma2"](**TOKENS, **SIZES)
    assert ModelShape.of(text).windows == (8, None)


def test_spans_sum_to_the_document():
    shape = ModelShape.of(SoloConfig(text_config=LLM_CONFIGS["mistral"](**TOKENS, **SIZES)))
    image = num_image_tokens(3, 4)
    assert image == len("<vision>" * 12) // 8 + 3 + 1  # 12 patches, 2 separators, the two ends
    parts = text_flops(shape, 10) + image_flops(shape, 3, 4, before=10) + text_flops(shape, 5, 10 + image)
    assert parts == forward_flops(shape, [15 + image], patches=12, predicted=15)


def test_text_flops_match_the_counter():
    model = AutoModelForCausalLM.from_config(DECODER, attn_implementation="eager")
    ids = torch.randint(320, (1, LENGTH))
    expected = counted(lambda: model(input_ids=ids, use_cache=False).logits.sum())
    flops = forward_flops(ModelShape.of(DECODER), [LENGTH], predicted=LENGTH)
    assert not_causal(flops, LENGTH).training == pytest.approx(expected, rel=0.01)


def test_image_flops_match_the_counter():
    config = SoloConfig(text_config=DECODER, image_token_id=300, vision_patch_size=16)
    model = SoloForConditionalGeneration(config)
    model.set_attn_implementation("eager")
    ids = torch.randint(299, (1, LENGTH))
    ids[0, 4:104] = 300
    labels = torch.full_like(ids, -100)
    labels[0, -60:] = ids[0, -60:]
    pixels = torch.randint(256, (100, 768), dtype=torch.uint8)
    inputs = {"input_ids": ids, "pixel_values": pixels, "labels": labels, "use_cache": False}
    expected = counted(lambda: model.train()(**inputs).loss)
    flops = not_causal(forward_flops(ModelShape.of(config), [LENGTH], 100, 60), LENGTH)
    assert flops.hardware() == pytest.approx(expected, rel=0.01)
    selective = copy.deepcopy(model)
    prepare_layers(model, "full")
    expected = counted(lambda: model(**inputs).loss)
    assert flops.hardware(recomputed=1) == pytest.approx(expected, rel=0.01)
    prepare_layers(selective, "selective")
    expected = (
        counted(lambda: selective(**inputs).loss) - flops.attention
    )  # it includes attention of fused kernels only
    assert flops.hardware() == pytest.approx(expected, rel=0.01)


def test_frozen_decoder_flops_match_the_counter():
    config = SoloConfig(text_config=DECODER, image_token_id=300, vision_patch_size=16)
    model = SoloForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    model.requires_grad_(False).model.embed_vision_patch.requires_grad_(True)
    ids = torch.full((1, LENGTH), 300)
    pixels = torch.randint(256, (LENGTH, 768), dtype=torch.uint8)
    expected = counted(lambda: model(input_ids=ids, pixel_values=pixels, use_cache=False).logits.sum())
    flops = not_causal(forward_flops(ModelShape.of(config), [LENGTH], LENGTH, LENGTH), LENGTH)
    assert flops.training_frozen == pytest.approx(expected, rel=0.01)


def test_solo_7b_counts():
    """SOLO-7B: Mistral-7B (7,241,732,096 parameters), 64 more rows in and out, and the patch embedding."""
    config = SoloConfig()
    assert count_parameters(config).total == 7_241_732_096 + 2 * 64 * 4096 + 3072 * 4096
    matrices = count_parameters(config).total - 32064 * 4096 - 3072 * 4096 - 65 * 4096
    without_attention = training_flops(ModelShape.of(config), [1] * 1000, 0, 1000) / 1000
    assert without_attention == pytest.approx(6 * matrices, rel=1e-3)


def test_qwen3_moe_counts_the_routed_experts():
    config = Qwen3MoeConfig(
        num_hidden_layers=3,
        mlp_only_layers=[1],
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        **TOKENS,
    )
    shape = ModelShape.of(config)
    attention = 3 * 64 * (4 * 16 * 2 + 2 * 2 * 16)
    experts = 2 * (2 * 3 * 64 * 24 + 8 * 64)  # two layers of two experts and the router
    assert shape.projection_flops == 2 * attention
    assert shape.mlp_flops == 2 * (experts + 3 * 64 * 96)
    assert shape.attention == (AttentionLayer(4 * 4 * 16),) * 3
    assert shape.active_parameters == shape.parameters.total - 2 * 6 * 3 * 64 * 24
    assert shape.parameters.total == meta_parameters(config)


def test_deepseek_v3_counts_wider_keys_than_values():
    config = DeepseekV3Config(
        num_hidden_layers=3,
        first_k_dense_replace=1,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=24,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        **TOKENS,
    )
    shape = ModelShape.of(config)
    queries = 64 * 32 + 32 * 4 * (16 + 8)
    keys_and_values = 64 * (16 + 8) + 16 * 4 * (16 + 12)
    assert shape.projection_flops == 2 * 3 * (queries + keys_and_values + 4 * 12 * 64)
    assert shape.mlp_flops == 2 * (3 * 64 * 96 + 2 * (3 * 3 * 64 * 24 + 8 * 64))
    assert shape.attention == (AttentionLayer(2 * 4 * (24 + 12)),) * 3
    assert shape.parameters.total == meta_parameters(config)


def test_hybrid_counts_attention_in_some_layers_only():
    config = Lfm2Config(
        num_hidden_layers=3,
        layer_types=["conv", "full_attention", "conv"],
        hidden_size=64,
        intermediate_size=96,
        block_auto_adjust_ff_dim=False,
        num_attention_heads=4,
        num_key_value_heads=2,
        **TOKENS,
    )
    shape = ModelShape.of(config)
    assert shape.attention == (AttentionLayer(4 * 64),)
    convolutions = 2 * 2 * (64 * 3 * 64 + 64 * 64 + 64 * config.conv_L_cache)
    assert shape.projection_flops == pytest.approx(convolutions + 2 * 64 * (2 * 64 + 2 * 32), rel=0.05)
    assert shape.mlp_flops == 2 * 3 * 3 * 64 * 96
    assert shape.parameters.total == meta_parameters(config)


@pytest.mark.parametrize("kind", [GPT2Config, FalconConfig, BloomConfig])
def test_families_with_their_own_attention_match_the_counter(kind):
    config = kind(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, **TOKENS)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.randint(320, (1, LENGTH))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    shape = ModelShape.of(config)
    flops = not_causal(forward_flops(shape, [LENGTH], predicted=LENGTH), LENGTH)
    assert flops.forward == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert shape.parameters.total == meta_parameters(config)


@pytest.mark.parametrize("family", ["gemma2", "mistral", "qwen3"])
def test_full_recomputation_flops_match_the_counter(family):
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 6}
    text = LLM_CONFIGS[family](**{**TOKENS, **SIZES, **sizes, "head_dim": 16})
    text.sliding_window = 4096
    config = SoloConfig(text_config=text, image_token_id=300)
    model = SoloForConditionalGeneration(config).train()
    model.set_attn_implementation("eager")
    prepare_layers(model, "full")
    ids = torch.randint(299, (1, LENGTH))
    expected = counted(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
    flops = not_causal(forward_flops(ModelShape.of(config), [LENGTH], 0, LENGTH - 1), LENGTH)
    assert flops.hardware(recomputed=1) == pytest.approx(expected, rel=0.01)


# Experts with and without shared ones, dense first layers, biases and sinks, latent attention, an indexer;
# state-space, linear-attention and convolution layers.
FAMILIES = (
    *("mixtral", "qwen2_moe", "deepseek_v3", "deepseek_v32", "gpt_oss", "granitemoeshared", "ernie4_5_moe"),
    *("qwen3_next", "lfm2_moe", "bailing_hybrid"),
)
REFUSED = {
    "deepseek_v4": "it compresses keys",
    "dots3_note_text": "num_attention_heads' is a per-layer attribute",
    "jetmoe": "they depend on the values of tokens",
    "qwen4_exp_text": "they depend on the values of tokens",
}
# Llama 4 computes all experts, some experts of Longcat compute nothing, and code of DBRX does not run here.
OTHERWISE = {"llama4_text", "longcat_flash", "dbrx", *REFUSED}


def counts_per_token(family) -> tuple[float, float]:
    """Count a real forward pass with eager attention and experts; return FLOPs per token, and per pair."""
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(tiny_config(family), **options, dtype=torch.float32).eval()
    counts = []
    for length in (64, 128):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=torch.randint(3, 320, (1, length)), use_cache=False)
        counts.append(counter.get_total_flops())
    pairs = (counts[1] - 2 * counts[0]) / (2 * 64**2)
    return counts[0] / 64 - 64 * pairs, pairs


def assert_counts_match(family):
    config = tiny_config(family)
    shape = ModelShape.of(config)
    linear, pairs = counts_per_token(family)
    head = 2 * shape.hidden * shape.vocabulary
    assert shape.projection_flops + shape.mlp_flops + head == pytest.approx(linear, rel=0.015)
    # Mamba 2 in PyTorch combines all pairs of chunks, and there are many where chunks have 16 tokens.
    is_mamba = hasattr(config, "mamba_expand") or hasattr(config, "expand")
    assert sum(layer.flops for layer in shape.attention) == pytest.approx(
        pairs, rel=0.3 if is_mamba else 0.01, abs=64
    )
    assert shape.parameters.total == meta_parameters(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_match_the_counter(family):
    assert_counts_match(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*text_families()} - {*FAMILIES} - OTHERWISE))
def test_all_families_match_the_counter(family):
    assert_counts_match(family)


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_cannot_be_counted_are_refused(family):
    with pytest.raises(SoloError, match=f"cannot count.* {family}: .*{REFUSED[family]}"):
        ModelShape.of(tiny_config(family))


@pytest.mark.parametrize("family", ["llama4_text", "dbrx"])
def test_experts_without_implementations_count_as_routed(family):
    config = tiny_config(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    of_layers = [p for name, p in model.named_parameters() if "layers" in name or "blocks" in name]
    matrices = sum(p.numel() for p in of_layers if p.ndim > 1) - experts
    shape = ModelShape.of(config)  # two of four experts per token
    assert shape.projection_flops + shape.mlp_flops == 2 * (matrices + experts // 2)
    assert shape.active_parameters == shape.parameters.total - experts // 2


def test_attention_in_chunks_counts_pairs_within_them():
    shape = ModelShape.of(tiny_config("llama4_text"))
    assert {layer.chunk for layer in shape.attention} == {None, 8}
    lengths = [1, 7, 8, 9, 40, 100]
    visible = {
        None: sum(length * (length + 1) // 2 for length in lengths),
        8: sum(i % 8 + 1 for length in lengths for i in range(length)),
    }
    flops = forward_flops(shape, lengths).attention
    assert flops == sum(layer.flops * visible[layer.chunk] for layer in shape.attention)


def test_counting_preserves_the_random_state():
    before = torch.random.get_rng_state()
    ModelShape.of(DECODER)
    assert torch.equal(torch.random.get_rng_state(), before)


def meta_parameters(config) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def counted(loss) -> int:
    """Count forward and backward pass with torch, whose eager attention computes all pairs."""
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def not_causal(flops: Flops, length: int) -> Flops:
    """Return the count of one document whose tokens all attend to each other, as in eager attention."""
    return replace(flops, attention=flops.attention * 2 * length // (length + 1))
