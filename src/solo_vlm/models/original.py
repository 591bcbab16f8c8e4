"""Tokenizer, processor and generation settings of original SOLO checkpoints.

The tokenizer is Mistral's SentencePiece model with new pieces appended. Read as a fast tokenizer, it must
split text exactly as the original code's LlamaTokenizer did, which puts a space before every text, even after
a special token.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import AutoTokenizer, GenerationConfig, LlamaTokenizer, PreTrainedTokenizerFast

from solo_vlm.models.checks import check_tokenizer
from solo_vlm.models.solo.chat_template import SOLO_CHAT_TEMPLATE, with_images
from solo_vlm.models.solo.configuration_solo import SoloConfig
from solo_vlm.models.solo.image_processing_solo import SoloImageProcessor
from solo_vlm.models.solo.original_solo import CHAT_TOKENS, LOCATION_TOKENS, VISION_TOKENS, vision_token_ids
from solo_vlm.models.solo.processing_solo import ImageLayout, SoloProcessor
from solo_vlm.utils.errors import SoloError, first_line

logger = logging.getLogger(__name__)

_SENTENCEPIECE = "tokenizer.model"


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder contains a tokenizer."""
    return any((folder / name).is_file() for name in (_SENTENCEPIECE, "tokenizer.json"))


def copy_sentencepiece(source: Path, folder: Path) -> bool:
    """Copy the SentencePiece model, which is needed to convert back and to read packed data.

    Returns:
        Whether `source` has one.
    """
    if not (source / _SENTENCEPIECE).is_file():
        return False
    shutil.copy(source / _SENTENCEPIECE, folder)
    return True


def original_tokenizer(
    source: str | Path, rows: int | None = None, max_rows: int | None = None
) -> PreTrainedTokenizerFast:
    """Return the tokenizer of an original checkpoint, with every vision token.

    Missing tokens are added in the original order as far as the embedding has rows for them; tokens without a
    row are dropped. Some checkpoints lack `<|im_start|>` and `<|im_end|>`, which their chats do not use.

    Args:
        source: Folder or hub ID with a `tokenizer.model` or a `tokenizer.json`.
        rows: Rows of the token embedding. Default: the number of tokens, counting all vision and location
            tokens.
        max_rows: Upper bound for the default of `rows`.

    Raises:
        SoloError: The tokenizer cannot be read, or the embedding has no rows for the vision tokens.
    """
    backend = _backend(source)
    if rows is None:
        rows = max(backend.get_vocab_size(), _base(backend) + len(VISION_TOKENS) + len(LOCATION_TOKENS))
        rows = rows if max_rows is None else min(rows, max_rows)
    if rows < _base(backend) + len(VISION_TOKENS):
        raise SoloError(
            f"{source}: the vision tokens start at ID {_base(backend)}, but the model has {rows} rows of "
            "tokens: tokenizer and weights do not match"
        )
    backend = _drop_rowless(backend, rows)
    _add_missing(backend, rows)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in VISION_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",  # any token does: the attention mask hides padding
        padding_side="left",
    )


def tokenizer_vision_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return the vision token IDs of a `SoloConfig` as an original tokenizer has them."""
    return vision_token_ids(tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)))


def original_processor(
    tokenizer: PreTrainedTokenizerFast, patch_size: int, layout: ImageLayout
) -> SoloProcessor:
    """Return the processor of a model with the original vocabulary."""
    return SoloProcessor(
        image_processor=SoloImageProcessor(patch_size=patch_size),
        tokenizer=tokenizer,
        chat_template=with_images(SOLO_CHAT_TEMPLATE, "<vpatch>"),
        image_token="<vpatch>",
        image_layout=layout,
    )


def original_generation_config(config: SoloConfig) -> GenerationConfig:
    """Return greedy generation settings that suppress the added tokens and padding rows of the vocabulary."""
    text = config.text_config
    generation = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.eos_token_id
    )
    generation.suppress_tokens = list(range(config.vision_start_token_id, text.vocab_size)) or None
    return generation


def _backend(source: str | Path) -> Tokenizer:
    check_tokenizer(source)
    try:
        if Path(source).is_dir() and not (Path(source) / _SENTENCEPIECE).is_file():
            return AutoTokenizer.from_pretrained(source).backend_tokenizer
        backend = LlamaTokenizer.from_pretrained(source).backend_tokenizer
    except Exception as error:  # sentencepiece and tokenizers raise any type on a broken file
        reason = first_line(error)
        raise SoloError(f"cannot read the tokenizer of {source}: {reason}") from error
    # SentencePiece puts a space before a text even if it starts with one; transformers does not.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    return backend


def _base(backend: Tokenizer) -> int:
    """Return the number of tokens of the LLM, those before `<vision>`."""
    return first if (first := backend.token_to_id(VISION_TOKENS[0])) is not None else backend.get_vocab_size()


def _drop_rowless(backend: Tokenizer, rows: int) -> Tokenizer:
    state = json.loads(backend.to_str())
    vocabulary: dict[str, int] = state["model"]["vocab"]
    rowless = [token for token, token_id in vocabulary.items() if token_id >= rows]
    if not rowless:
        return backend
    logger.warning("dropping %d tokens that have no row in the model (%s, ...)", len(rowless), rowless[0])
    state["model"]["vocab"] = {token: i for token, i in vocabulary.items() if i < rows}
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < rows]
    return Tokenizer.from_str(json.dumps(state))


def _add_missing(backend: Tokenizer, rows: int) -> None:
    tokens = [*VISION_TOKENS, *LOCATION_TOKENS]
    if rows == _base(backend) + len(tokens) + len(CHAT_TOKENS):  # otherwise further rows may be padding
        tokens += CHAT_TOKENS
    for token in tokens:
        if backend.get_vocab_size() == rows:
            return
        if backend.token_to_id(token) is None:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
