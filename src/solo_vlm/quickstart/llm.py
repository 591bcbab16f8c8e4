"""The quickstart's LLM: a byte-level tokenizer, and a small Qwen3 with random weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

from solo_vlm.data.sample import parse_sample
from solo_vlm.data.sources import all_rows
from solo_vlm.utils.files import new_folder


def write_untrained_llm(out: Path, texts: Iterable[str], seed: int = 0) -> None:
    """Train a tokenizer on `texts`, and save it with a randomly initialized Qwen3 of a million parameters."""
    tokenizer = train_tokenizer(texts)
    set_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=40,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with new_folder(out) as folder:
        Qwen3ForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode any string."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "[INST]", "[/INST]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def training_texts(data: Path, names: Sequence[str] = ("text", "sft")) -> Iterator[str]:
    """Yield the tokenizer's training texts: toy data, with chats formatted as by the chat template."""
    for name in names:
        for row in all_rows(data / f"{name}.parquet"):
            for message in parse_sample(row).messages:
                text = "".join(part.get("text", "") for part in message["content"])
                yield f"[INST] {text} [/INST]" if message["role"] == "user" else text
