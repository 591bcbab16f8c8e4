"""Tiny random models of the causal-LM families of transformers: architectures without their weights."""

from __future__ import annotations

from functools import cache
from itertools import cycle, islice
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from solo_vlm.models.packed.kernels import compute_without_kernels_on_cpu
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.modeling_solo import SoloForConditionalGeneration

Model = TypeVar("Model", bound=PreTrainedModel)

WINDOW = 8
"""Tokens of attention windows and chunks: fewer than a document has, so that they matter."""

_NOISE = 0.1  # standard deviation of weights, and of what else would be constant
_VOCABULARY = 320

# An indexer has many heads, because scores of few of them tie at zero, where its choice is arbitrary.
_SIZES = {
    64: """
        hidden_size d_model n_embd embedding_size word_embed_proj_dim lru_width emb_dim embedding_dim
        ple_embed_dim
    """,
    96: """
        intermediate_size ffn_dim ffn_hidden_size n_inner dim_ff dff intermediate_size_mlp
        dense_intermediate_size
    """,
    32: """
        moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        shared_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size kv_lora_rank
        q_lora_rank router_hidden_size moe_latent_size hc_lowrank o_lora_rank
    """,
    4: """
        num_hidden_layers n_layer n_layers num_layers num_blocks num_attention_heads n_head n_heads
        num_heads linear_num_value_heads linear_num_heads swa_num_attention_heads num_experts
        n_routed_experts num_local_experts moe_num_experts zero_expert_num
    """,
    2: """
        num_key_value_heads num_kv_heads n_head_kv swa_num_key_value_heads linear_num_key_heads
        num_experts_per_tok num_experts_per_token moe_topk top_k_experts moe_k max_window_layers
        n_shared_experts n_mamba_heads mamba_n_groups mamba_ngroups n_groups
    """,
    1: """
        n_group topk_group num_expert_group num_shared_experts first_k_dense_replace num_dense_layers
        num_kv_shared_layers
    """,
    16: """
        head_dim swa_head_dim qk_rope_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim
        linear_head_dim index_head_dim indexer_head_dim mamba_d_state mamba_dt_rank state_size
        time_step_rank ssm_state_size chunk_size mamba_chunk_size kv_channels hidden_size_per_layer_input
        laurel_rank d_rel index_topk indexer_budget index_n_heads
        indexer_n_heads
    """,
    24: "v_head_dim",
    512: """
        max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length
        original_max_position_embeddings rel_extent
    """,
    WINDOW: """
        mamba_n_heads mamba_num_heads block_size rotary_dim sliding_window attention_chunk_size
        sliding_window_size window_size attention_window_size local_attention swa_window_size
    """,
    _VOCABULARY: "vocab_size vocab_size_per_layer_input",
}
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names.split()}
# Here None stands for "derived from other sizes", elsewhere for "this family has no such part".
_DERIVED = {
    "num_key_value_heads",
    "head_dim",
    "num_experts_per_tok",
    "n_routed_experts",
    "n_shared_experts",
    "n_group",
    "topk_group",
}
_PATTERNS = ("layer_types", "mlp_layer_types", "layers_block_type")
# Far from their neutral values, so that leaving one out is visible.
_FACTORS = {
    "initializer_range": _NOISE,
    "init_std": _NOISE,
    "attention_multiplier": 0.5,
    "embedding_multiplier": 2.0,
    "key_multiplier": 0.5,
    "lm_head_multiplier": 0.5,
    "residual_multiplier": 0.5,
    "logit_scale": 0.5,
    "logits_scaling": 0.5,
    "logits_mup_width_multiplier": 2.0,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 2.0,
    "logits_soft_cap": 2.0,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "eod_token_id": 2}

# What the rules do not reach: patterns of layers, and sizes that depend on each other.
_RECURRENT_AND_FULL = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
}
_CONV_AND_FULL = {"layer_types": ["conv", "full_attention"] * 2}
_WINDOWED_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_ZAMBA = {
    "num_hidden_layers": 5,
    "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        **_WINDOWED_AND_FULL,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_top_k": 2},
    },
    "deepseek_v4": {"num_key_value_heads": 1},
    "dots3_note_text": {
        "per_layer_config": {
            layer: {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32} for layer in (1, 3)
        }
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16, "ssm_multipliers": [0.5, 1.5, 0.8, 1.2, 2.0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": _RECURRENT_AND_FULL,
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 1},
    "laguna": _WINDOWED_AND_FULL,
    "lfm2": _CONV_AND_FULL,
    "lfm2_moe": _CONV_AND_FULL,
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mellum": _WINDOWED_AND_FULL,
    "minimax_m3_vl_text": {"index_n_heads": 4, "layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "ministral": _WINDOWED_AND_FULL,
    "qwen4_exp_text": {
        "eos_token_id": 2,
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 100,
        "split_ngram_parts": 1,
    },
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA,
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid", "hybrid_sliding"] * 2,
        "sliding_window": WINDOW,
    },
}
_VISION_TOKENS = ("image_token_id", "vision_start_token_id", "vision_row_token_id", "vision_end_token_id")
_DESIGN = (
    *("image_attention", "image_positions", "rope_base_2d", "patch_embedding", "vision_patch_size"),
    "lm_head_bias",
)
_NOT_CAUSAL = {"cpmant": "bidirectional within the prompt", "xlnet": "permutation language model"}


def text_families() -> list[str]:
    """Return the model types of the causal language models of transformers, decoders for text only."""
    return [family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if why_not_text(family) is None]


@cache
def why_not_text(family: str) -> str | None:
    """Return the reason why a family of `AutoModelForCausalLM` is no decoder for text; None if it is one."""
    kind = CONFIG_MAPPING[family]
    parts = {name.removesuffix("_config") for name in kind.sub_configs}
    if getattr(kind, "is_encoder_decoder", False) or "decoder" in parts:
        return "part of an encoder-decoder"
    if family in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "bidirectional encoder"
    if hasattr(kind, "is_decoder") and (
        hasattr(kind, "add_cross_attention") or hasattr(kind, "cross_attention_hidden_size")
    ):
        return "part of an encoder-decoder"
    if parts & {"text", "vision", "audio"}:
        return "multimodal"
    if kind.model_type != family:
        return f"another name of {kind.model_type}"
    return _NOT_CAUSAL.get(family)


def tiny_config(family: str, **settings: Any) -> PreTrainedConfig:
    """Return the configuration of a family with layers of every kind, of a few thousand weights each."""
    default = CONFIG_MAPPING[family]()
    known, own = vars(default), _OF_FAMILY.get(family, {})
    sizes: dict[str, Any] = {
        name: size
        for name, size in _SIZE_OF.items()
        if known.get(name) is not None or (name in known and name in _DERIVED)
    }
    if "kv_lora_rank" in known:  # latent attention has no grouped heads
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    layers = own.get("num_hidden_layers", 4)
    for name in _PATTERNS:
        if isinstance(kinds := known.get(name), list):
            sizes[name] = list(islice(cycle(dict.fromkeys(kinds)), layers))
    if "use_sliding_window" in known:
        sizes |= {"use_sliding_window": True, "sliding_window": WINDOW}
        sizes |= {"layer_types": None} if "layer_types" in known else {}
    tokens = {name: token for name, token in _TOKENS.items() if known.get(name) is not None}
    factors = {name: factor for name, factor in _FACTORS.items() if name in known}
    return type(default)(**{**sizes, **tokens, **factors, **own, **settings})


def tiny_llm(family: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Make a tiny random causal language model in float32, in which every parameter matters.

    Parameters that start constant, such as norms, biases and sinks, are made random as well.
    """
    torch.manual_seed(seed)
    return _noisy(AutoModelForCausalLM.from_config(tiny_config(family, **settings), dtype=torch.float32))


def tiny_solo(config: SoloConfig) -> SoloForConditionalGeneration:
    """Make a tiny random SOLO model with the family of a configuration, and its way of reading images."""
    tokens = dict(zip(_VISION_TOKENS, range(_VOCABULARY - len(_VISION_TOKENS), _VOCABULARY), strict=True))
    design = {name: getattr(config, name) for name in _DESIGN}
    tiny = SoloConfig(text_config=tiny_config(config.text_config.model_type), **design, **tokens)
    torch.manual_seed(0)
    model = _noisy(SoloForConditionalGeneration(tiny).float())
    model.generation_config.suppress_tokens = list(tiny.vision_token_ids)
    return model


@torch.no_grad()
def _noisy(model: Model) -> Model:
    for parameter in model.parameters():
        if parameter.numel() > 1 and parameter.min() == parameter.max():
            parameter.add_(torch.randn_like(parameter), alpha=_NOISE)
    compute_without_kernels_on_cpu(model)
    return model.eval()
