"""Tiny random models of the causal-LM families of transformers: architectures without their weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WINDOW = 8
"""Tokens of attention windows and chunks: fewer than a document has, so that they matter."""

_SIZES = {
    64: "hidden_size d_model n_embd attention_hidden_size embedding_size word_embed_proj_dim lru_width "
    "emb_dim embedding_dim",
    96: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dim_ff dff ffn_hidden_size "
    "intermediate_size_mlp dense_intermediate_size",
    32: "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
    "shared_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size kv_lora_rank "
    "q_lora_rank router_hidden_size",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_blocks num_attention_heads n_head "
    "n_heads num_heads attention_heads linear_num_value_heads linear_num_heads swa_num_attention_heads "
    "num_experts n_routed_experts num_local_experts moe_num_experts index_n_heads",
    2: "num_key_value_heads num_kv_heads n_head_kv swa_num_key_value_heads linear_num_key_heads "
    "num_experts_per_tok moe_topk top_k_experts moe_k",
    1: "n_group topk_group n_shared_experts first_k_dense_replace",
    16: "head_dim swa_head_dim qk_rope_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim "
    "linear_head_dim index_head_dim mamba_d_state mamba_dt_rank state_size time_step_rank ssm_state_size "
    "chunk_size mamba_chunk_size kv_channels hidden_size_per_layer_input laurel_rank d_rel",
    24: "v_head_dim",
    8: "mamba_n_heads mamba_num_heads block_size",
    512: "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length "
    "original_max_position_embeddings rel_extent index_topk",
    WINDOW: "sliding_window attention_chunk_size sliding_window_size window_size attention_window_size "
    "local_attention swa_window_size",
}
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names.split()}

# What the rules above do not reach: patterns of layers, and sizes that depend on each other.
_OF_FAMILY: dict[str, dict[str, Any]] = {}


def text_families() -> list[str]:
    """Return the model types of all causal language models of transformers, decoders for text only."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str, **settings: Any) -> PreTrainedConfig:
    """Return the configuration of a family with layers of every kind, of a few thousand weights each."""
    kind = CONFIG_MAPPING[family]
    text = type(kind().get_text_config(decoder=True))
    known = text().to_dict()
    sizes = {name: size for name, size in _SIZE_OF.items() if known.get(name) is not None}
    if "kv_lora_rank" in known:  # latent attention has no grouped heads
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    special = {name: None for name in ("pad_token_id",) if name in known}
    tokens = {name: 1 for name in ("bos_token_id", "eos_token_id") if name in known}
    return text(**{**sizes, **special, **tokens, "vocab_size": 320, **_OF_FAMILY.get(family, {}), **settings})


def tiny_llm(family: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Make a tiny random causal language model in float32."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **settings), dtype=torch.float32).eval()
