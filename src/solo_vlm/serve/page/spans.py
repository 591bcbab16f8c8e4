"""Which tokens spell which characters of an answer."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

_INCOMPLETE = "\ufffd"  # stands for a character of which not all bytes have come


def tokens_of(start: int, end: int, text: str, token_ids: NDArray[Any], tokenizer: Any) -> slice:
    """The tokens that spell `text[start:end]`, or a part of it.

    Args:
        start, end: characters of the text, at least one.
        text: what the tokens spell, without white space around it.
        token_ids: (tokens,) of the text, and perhaps of special tokens after it.
        tokenizer: theirs.
    """
    read = [
        tokenizer.decode(token_ids[: count + 1], skip_special_tokens=True) for count in range(len(token_ids))
    ]
    # What precedes the text is white space that a template or tokenizer has put before it.
    offset = max(read[-1].find(text[:end]), 0)
    begun = [len(so_far) for so_far in read]
    complete = [len(so_far.rstrip(_INCOMPLETE)) for so_far in read]
    return slice(_first_above(start + offset, begun), _first_above(end - 1 + offset, complete) + 1)


def _first_above(place: int, lengths: list[int]) -> int:
    """The first token after which so many characters are exceeded; the last one where none does."""
    return next((token for token, length in enumerate(lengths) if length > place), len(lengths) - 1)
