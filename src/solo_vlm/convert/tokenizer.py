"""The release's tokenizer: a SentencePiece model with new pieces appended, made into a `tokenizer.json`.

It must split text exactly as the release's LlamaTokenizer did: a space is put before every text, also
before one that follows a special token.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from solo_vlm.models.solo.original_solo import CHAT_TOKENS, LOCATION_TOKENS, VISION_TOKENS, vision_token_ids
from solo_vlm.utils.errors import SoloError

logger = logging.getLogger(__name__)

_SENTENCEPIECE = "tokenizer.model"
_FILES = (_SENTENCEPIECE, "tokenizer.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((folder / name).is_file() for name in _FILES)


def copy_sentencepiece(source: Path, folder: Path) -> bool:
    """Keep the SentencePiece model, for the way back and for packed data. Whether there is one."""
    if not (source / _SENTENCEPIECE).is_file():
        return False
    shutil.copy(source / _SENTENCEPIECE, folder)
    return True


def warn_without_tokenizer(source: Path) -> None:
    """Say what a folder without a tokenizer leads to."""
    logger.warning(
        "%s has no tokenizer, so the new folder gets no processor, and its configuration the vision ids of "
        "SOLO-7B (32000 to 32004)",
        source,
    )


def release_tokenizer(
    source: str | Path, rows: int | None = None, most_rows: int | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer of a release folder (or hub id), with every vision token.

    Tokens that the folder lacks are added in the release's order where the model has rows for them; tokens
    that have no row are dropped. `<|im_start|>` and `<|im_end|>` are missing in some releases and have no
    part in its chats.

    Args:
        source: has a `tokenizer.model` or a `tokenizer.json`.
        rows: of the token embedding. Default: as many as there are tokens, with all of the release's own but
            the chat tokens.
        most_rows: the default for `rows` is never more than this.

    Raises:
        SoloError: it cannot be read, or the model has no rows for the vision tokens.
    """
    backend = _backend(source)
    if rows is None:
        rows = max(backend.get_vocab_size(), _base(backend) + len(VISION_TOKENS) + len(LOCATION_TOKENS))
        rows = rows if most_rows is None else min(rows, most_rows)
    if rows < _base(backend) + len(VISION_TOKENS):
        raise SoloError(
            f"{source}: the vision tokens begin at id {_base(backend)}, but the model has {rows} rows of "
            "tokens: tokenizer and weights do not belong together"
        )
    backend = _without_rowless(backend, rows)
    _add_missing(backend, rows)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in VISION_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",  # batches of prompts are padded; attention masks hide what with
        padding_side="left",
    )


def tokenizer_vision_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The vision ids of a `SoloConfig`, as a tokenizer of the release has them."""
    return vision_token_ids(tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)))


def _backend(source: str | Path) -> Tokenizer:
    try:
        if Path(source).is_dir() and not (Path(source) / _SENTENCEPIECE).is_file():
            return AutoTokenizer.from_pretrained(source).backend_tokenizer
        backend = LlamaTokenizer.from_pretrained(source).backend_tokenizer
    except Exception as error:  # sentencepiece and tokenizers raise whatever a broken file leads to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SoloError(f"cannot read the tokenizer of {source}: {reason}") from error
    # SentencePiece puts a space before a text even if one is there; transformers' own rule does not.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    return backend


def _base(backend: Tokenizer) -> int:
    """Tokens of the LLM: what comes before `<vision>`."""
    return first if (first := backend.token_to_id(VISION_TOKENS[0])) is not None else backend.get_vocab_size()


def _without_rowless(backend: Tokenizer, rows: int) -> Tokenizer:
    state = json.loads(backend.to_str())
    vocabulary: dict[str, int] = state["model"]["vocab"]
    rowless = [token for token, token_id in vocabulary.items() if token_id >= rows]
    if not rowless:
        return backend
    logger.warning("the model has no rows for %d tokens (%s): they are dropped", len(rowless), rowless[0])
    state["model"]["vocab"] = {token: i for token, i in vocabulary.items() if i < rows}
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < rows]
    return Tokenizer.from_str(json.dumps(state))


def _add_missing(backend: Tokenizer, rows: int) -> None:
    tokens = [*VISION_TOKENS, *LOCATION_TOKENS]
    if rows == _base(backend) + len(tokens) + len(CHAT_TOKENS):  # else, rows beyond may only be padding
        tokens += CHAT_TOKENS
    for token in tokens:
        if backend.get_vocab_size() == rows:
            return
        if backend.token_to_id(token) is None:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
