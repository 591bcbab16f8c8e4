"""Small models, processors and chats that many tests share."""

from __future__ import annotations

from io import BytesIO

import torch
from PIL import Image
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from solo_vlm.models.from_llm import SoloModelAndProcessor, compose
from solo_vlm.quickstart.llm import train_tokenizer

TEXTS = ["a red circle left of a blue square. what is this? seven. [INST] [/INST] hello world"] * 3
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,  # large enough that attention and images matter
}
LLM_CONFIGS = {
    "mistral": lambda **sizes: MistralConfig(sliding_window=8, **sizes),
    "llama": lambda **sizes: LlamaConfig(tie_word_embeddings=True, **sizes),
    "qwen3": lambda **sizes: Qwen3Config(**sizes),
    "gemma": lambda **sizes: GemmaConfig(**sizes),
    "gemma2": lambda **sizes: Gemma2Config(sliding_window=8, **sizes),
    "gemma3": lambda **sizes: Gemma3TextConfig(sliding_window=8, **sizes),
}


def make_llm(family: str = "llama", seed: int = 0):
    """A tiny random causal language model with a real tokenizer."""
    from transformers import AutoModelForCausalLM

    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    config = LLM_CONFIGS[family](
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        **SIZES,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


def make_solo(family: str = "llama", seed: int = 0) -> SoloModelAndProcessor:
    llm, tokenizer = make_llm(family, seed)
    solo = compose(llm, tokenizer, seed=seed)
    # A patch embedding this small at first would hide mistakes with images from a comparison of logits.
    solo.model.model.embed_vision_patch.weight.data.mul_(20.0)
    return solo


def ask(prompt: str, *images: Image.Image) -> list[dict]:
    """A chat of one user turn."""
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


def png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
