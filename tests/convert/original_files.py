"""Tiny checkpoints in the formats of the original SOLO code (SOLO-7B) and of Megatron-LLM.

Written from descriptions of the formats, independently of the code under test.
"""

from __future__ import annotations

import io
import json
from argparse import Namespace
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from transformers.convert_slow_tokenizer import import_protobuf

VISION = ["<vision>", "<vpatch>", "<vrow_sep>", "<vframe_sep>", "</vision>"]
LOCATIONS = [f"<loc_{i}>" for i in range(1, 1025)]
CHAT = ["<|im_start|>", "<|im_end|>"]
TEXT_TOKENS = 400
WORDS = (
    "a red circle left of blue square what is this seven hello world [INST] [/INST] the cat sat on a mat "
    "answer yes no it shows two dogs"
)


def write_sentencepiece(folder: Path, new_tokens: list[str]) -> sentencepiece.SentencePieceProcessor:
    """Train a SentencePiece model like Mistral's and append new pieces as the original code did."""
    lines = [" ".join(WORDS.split()[i % 7 :: 1 + i % 5]) + " .?!,"[i % 5] for i in range(120)]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=trained,
        vocab_size=TEXT_TOKENS,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    model = import_protobuf().ModelProto.FromString(trained.getvalue())
    for token in new_tokens:
        model.pieces.add(piece=token, score=0.0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def original_settings(rows: int, **changes) -> dict:
    """Return an original `config.json`."""
    settings = {
        "architectures": ["SoloForCausalLM"],
        "model_type": "mistral",
        "vocab_size": rows,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "vision_patch_size": 32,
    }
    return settings | changes


def original_weights(settings: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random weights under the original names."""
    generator = torch.Generator().manual_seed(seed)
    hidden, mlp, rows = settings["hidden_size"], settings["intermediate_size"], settings["vocab_size"]
    head = hidden // settings["num_attention_heads"]
    kv = settings["num_key_value_heads"] * head
    shapes = {
        "model.embed_tokens.weight": (rows, hidden),
        "model.embed_vision_patch.weight": (hidden, 3072),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (rows, hidden),
    }
    for layer in range(settings["num_hidden_layers"]):
        of_layer = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    dtype = getattr(torch, settings["torch_dtype"])
    return {
        name: (0.2 * torch.randn(shape, generator=generator)).to(dtype).contiguous()
        for name, shape in shapes.items()
    }


def write_original(
    folder: Path, weights: dict, settings: dict, suffix: str = "safetensors", shards: int = 1
) -> Path:
    """Write an original folder: `config.json` and weights, in one file or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    save = save_file if suffix == "safetensors" else torch.save
    if shards == 1:
        save(weights, folder / f"{stem}.{suffix}")
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        shard = {key: weights[key] for key in list(weights)[number::shards]}
        save(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    (folder / f"{stem}.{suffix}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def write_megatron(
    folder: Path,
    weights: dict,
    settings: dict,
    tensor: int,
    pipeline: int,
    padded_rows: int,
    interleaved: bool = True,
    is_trained: bool = True,
    extra: dict | None = None,
) -> Path:
    """Split original weights as Megatron-LLM does, into `tensor` x `pipeline` pickles.

    Deliberately loops over heads and rows, where the code under test works with shapes.

    Args:
        is_trained: Whether to use the names of a checkpoint saved in training (`encoder`, nested), not those
            of one that was converted but not yet trained (`transformer`, flat).
        extra: Further members of every pickle.
    """
    iteration = folder / "iter_0000300"
    heads, groups = settings["num_attention_heads"], settings["num_key_value_heads"]
    size = settings["hidden_size"] // heads
    layers_per_stage = settings["num_hidden_layers"] // pipeline
    body, attention = ("encoder", "self_attention") if is_trained else ("transformer", "attention")

    def rows(whole: torch.Tensor, rank: int) -> torch.Tensor:
        share = whole.shape[0] // tensor
        return whole[rank * share : (rank + 1) * share].clone()

    def columns(whole: torch.Tensor, rank: int) -> torch.Tensor:
        return rows(whole.T, rank).T.contiguous()

    def padded(whole: torch.Tensor) -> torch.Tensor:
        return torch.cat([whole, *[whole[-1:]] * (padded_rows - len(whole))])

    def interleave(head: torch.Tensor) -> torch.Tensor:
        """Put row i of the second half after row i of the first."""
        if not interleaved:
            return head
        return torch.stack([head[half * (size // 2) + i] for i in range(size // 2) for half in (0, 1)])

    def query_key_value(layer: str) -> torch.Tensor:
        q, k, v = (weights[f"{layer}.self_attn.{name}_proj.weight"].split(size) for name in "qkv")
        pieces = []
        for group in range(groups):
            pieces += [interleave(q[group * (heads // groups) + i]) for i in range(heads // groups)]
            pieces += [interleave(k[group]), v[group]]
        return torch.cat(pieces)

    for rank in range(tensor):
        for stage in range(pipeline):
            decoder = {}
            for number in range(layers_per_stage):
                layer = f"model.layers.{stage * layers_per_stage + number}"
                own = {
                    "input_layernorm": weights[f"{layer}.input_layernorm.weight"],
                    f"{attention}.query_key_value": rows(query_key_value(layer), rank),
                    f"{attention}.dense": columns(weights[f"{layer}.self_attn.o_proj.weight"], rank),
                    "post_attention_layernorm": weights[f"{layer}.post_attention_layernorm.weight"],
                    "mlp.dense_h_to_4h": torch.cat(
                        [rows(weights[f"{layer}.mlp.{name}_proj.weight"], rank) for name in ("up", "gate")]
                    ),
                    "mlp.dense_4h_to_h": columns(weights[f"{layer}.mlp.down_proj.weight"], rank),
                }
                decoder |= {f"layers.{number}.{name}.weight": value for name, value in own.items()}
            model = {body: decoder}
            patches = rows(weights["model.embed_vision_patch.weight"], rank)
            words = rows(padded(weights["model.embed_tokens.weight"]), rank)
            if is_trained:  # every stage has a patch embedding; only the first one is trained
                model["embed_vision_patch"] = {"weight": patches if stage == 0 else torch.zeros_like(patches)}
            elif stage == 0:
                model["embed_vision_patch"] = patches
            if stage == 0:
                model["embedding"] = (
                    {"word_embeddings": {"weight": words}}
                    if is_trained
                    else {"word_embeddings.weight": words}
                )
            if stage == pipeline - 1:
                decoder["final_layernorm.weight"] = weights["model.norm.weight"]
                model["lm_head"] = rows(padded(weights["lm_head.weight"]), rank)
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
            (iteration / name).mkdir(parents=True)
            content = {
                "checkpoint_version": 3.0,
                "iteration": 300,
                "args": megatron_arguments(settings, tensor, pipeline, padded_rows),
                "model": {"language_model": model},
                **(extra or {}),
            }
            torch.save(content, iteration / name / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("300")
    return folder


def megatron_arguments(settings: dict, tensor: int, pipeline: int, padded_rows: int) -> Namespace:
    """Return the training arguments that Megatron saves with the weights."""
    return Namespace(
        num_layers=settings["num_hidden_layers"],
        hidden_size=settings["hidden_size"],
        ffn_hidden_size=settings["intermediate_size"],
        num_attention_heads=settings["num_attention_heads"],
        num_attention_heads_kv=settings["num_key_value_heads"],
        max_position_embeddings=settings["max_position_embeddings"],
        seq_length=settings["max_position_embeddings"],
        layernorm_epsilon=settings["rms_norm_eps"],
        rope_theta=settings["rope_theta"],
        sliding_window_size=settings["sliding_window"],
        vision_patch_size=settings["vision_patch_size"],
        padded_vocab_size=padded_rows,
        make_vocab_size_divisible_by=128,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        params_dtype=torch.bfloat16,
        glu_activation="swiglu",
    )
