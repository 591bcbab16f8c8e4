"""The text of an answer, piece by piece, as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what the first bytes of a character decode to


class AnswerText:
    """Turns tokens into text that will not change any more.

    All pieces together are the decoded answer, without white space around it, up to the first complete stop
    string. White space before the first word is no part of the answer, so no stop string begins there.

    Args:
        tokenizer: decodes; no other thread may use it.
        stop: the answer ends before the first of these.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._held = max(map(len, stop), default=1) - 1  # characters that may begin a stop string
        self._ids: list[int] = []
        self._decoded = 0  # tokens whose text is certain
        self._context = 0  # where decoding begins: some tokens earlier, for the space between words
        self._waiting = ""
        self._begun = False

    def add(self, token: int) -> str:
        """The text that is certain with one more token; maybe none."""
        self._ids.append(token)
        return self._emit(self._decode(last=False), last=False)

    def end(self) -> str:
        """The text that was held back, when no more tokens come."""
        return "" if self.stopped else self._emit(self._decode(last=True), last=True)

    def _decode(self, last: bool) -> str:
        """Text of the tokens that have not been decoded; none while a character is incomplete."""
        known = self._text(self._ids[self._context : self._decoded])
        text = self._text(self._ids[self._context :])
        if len(text) <= len(known) or (text.endswith(_INCOMPLETE) and not last):
            return ""
        self._context, self._decoded = self._decoded, len(self._ids)
        return text[len(known) :]

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _emit(self, text: str, last: bool) -> str:
        self._waiting += text
        if not self._begun:
            self._waiting = self._waiting.lstrip()
        found = [(at + len(stop), at) for stop in self._stop if (at := self._waiting.find(stop)) >= 0]
        if found:  # the first to be complete counts, however many characters came at once
            self.stopped = last = True
            self._waiting = self._waiting[: min(found)[1]]
        certain = len(self._waiting) if last else len(self._waiting) - self._held
        ready = self._waiting[: max(certain, 0)].rstrip()  # white space waits for the next word
        self._waiting = self._waiting[len(ready) :]
        self._begun = self._begun or bool(ready)
        return ready
