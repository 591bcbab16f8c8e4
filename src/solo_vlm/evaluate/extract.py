"""Read an option, yes or no, or a list out of what a model wrote."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from solo_vlm.evaluate.response_text import DECLARES, clean, plain

# Possessive, because a model that runs wild may write ten thousand asterisks.
_OPEN, _CLOSE = r"[(\[{*_`\"'$\s]*+", r"[)\]}*_`\"'$.:,;!\s]*+"
_WORD = r"(?:(?:the\s+)?(?:option|choice|letter|answer)\s*+:?)?"
_LETTER = rf"{_OPEN}{_WORD}{_OPEN}([A-Z])"
_LETTER_ALONE = re.compile(_LETTER + _CLOSE, re.IGNORECASE)
# A mark or the end of the line sets the letter apart: "B) cat", "B. cat", "B, since ...", "B - cat".
_LETTER_FIRST = re.compile(
    _LETTER + r"(?:[)\]}:*]|\.(?!\w)|,(?!\s*[A-Z]\b)|[ \t]*\n|\s+[-–—]"
    r"|\s+(?:because|since|is\s+(?:the\s+)?(?:right|correct|best))\b)"
    r"(?!\s*is\s+(?:not|wrong|incorrect|false)\b|\s*(?:or|and)\s*\()",
    re.IGNORECASE,
)
# Not "a cat" and not "A cat": between the letter and a further word stands a mark or a conjunction.
_LETTER_DECLARED = re.compile(
    _LETTER + r"(?![\w-]|['’]\w)(?![ \t]+(?!(?:because|since|as|for|which|and)\b)\w)", re.IGNORECASE
)
_LETTER_NAMED = re.compile(r"\(([A-Za-z])\)|\b(?i:option|choice)\s+[(\[*_`\"']*([A-Zb-z]\b|a\b(?!\s+\w))")
# "It's C", "So, C.", "I would go with C": a capital letter as the last word.
_LETTER_LAST = re.compile(
    r"\b(?i:it['’]s|is|so|thus|therefore|with|choose|pick|select)[,:]?\s+\(?([A-Z])\)?[.!]?$"
)
# Letters one after the other: "A, B", "A and B", "A. dog B. cat". A word behind a letter makes it an article.
_LISTED = re.compile(_LETTER + r"(?!\w|['’]\w|-\w\w)", re.IGNORECASE)
_LISTED_FURTHER = re.compile(
    rf"{_OPEN}(?:(?:the\s+)?(?:option|choice|letter)\s*+:?)?{_OPEN}([A-Z])(?!\w|['’]\w|-\w\w)", re.IGNORECASE
)
_MARKED = re.compile(r"(?:^|(?<=[\s,;(*]))([A-Z])([).:])(?=[\s*])")
_WORD_FOLLOWS = re.compile(r"[ \t]+(?!(?i:and|or)\b|[A-Z]\b)\w")
_MARKS = re.compile(r"[()\[\]}*_`\"'$.:,;!\s–—-]*+")
_SEPARATORS = re.compile(r"(?:[)\]}*_`\"'$.:,;!\s/|&+–—-]|\b(?:and|or)\b)*+", re.IGNORECASE)
_LINE_ENDS = re.compile(r"[)\]}*_`\"'$.:,;! \t]*+(?:\n|$)")
_REJECTED_AFTER = re.compile(
    r"[)\]}*_`\"'$]*\s*(?:is|are|was)?(?:n['’]t|\s*\b(?:not|wrong|incorrect|false)\b)", re.IGNORECASE
)
_REJECTED_BEFORE = re.compile(
    r"(?:(?:\b(?:not|no|never|neither|nor|cannot|without|exclude|eliminate|than|out)|n['’]t)\s+(?:[\w]+\s+){0,3}"
    r"|\b(?:wrong|incorrect|false)\s+(?:answer|option|choice)\s*(?:(?:is|was|:)\s*)?(?:an?\s+|the\s+)?)$",
    re.IGNORECASE,
)
_YES_NO = re.compile(
    r"\W*+(?:(?:the\s+)?(?:(?!wrong|incorrect|false)\w+\s+)?answer\b(?:\s+is)?\W*+)?(yes|no)\b", re.IGNORECASE
)
# Digits on both sides of these marks, or a sign, belong to one number: "2.5 cm" is not "5 cm".
_NO_NUMBER_BEFORE = r"(?<![-+−–—‐‑‒±√^])(?<!\d[.,:/'’ ])"
_NO_NUMBER_AFTER = r"(?![.,:/'’−–—‐‑‒-]\d|\s?\^| \d{3}(?!\d))"
_OTHER_OF_YES_NO = re.compile(r"(?:[\s,;/|&.*_]|\b(?:and|or)\b)*+(yes|no)\b(?![ \t]+\w)", re.IGNORECASE)


def read_choice(response: str, options: Sequence[str], anywhere: bool = True) -> str | None:
    """The letter of the option that a response names, or None: nothing is guessed.

    In this order: the response is a letter, or the text of an option; it begins with a letter set apart, as
    in "B) cat"; it says "the answer is", and then a letter or an option's text, the last time counting; its
    last line is a letter or an option's text; it names one "(B)" or "option B", or ends in "I choose B", and
    names no other; the text of one option and of no other occurs in it. Where two different letters stand
    side by side, as in "A, B", neither is read.

    Args:
        response: what the model wrote.
        options: texts of the options A, B, C, ...; an empty one can be chosen by its letter only.
        anywhere: whether the text of an option counts within a sentence, too.
    """
    text = clean(response)
    letters = (
        _whole(text, options)
        or _begins(text, options)
        or _declared(text, options)
        or _last_line(text, options)
        or _named(text, options)
        or (_occurring(text, options) if anywhere else set())
    )
    return letters.pop() if len(letters) == 1 else None


def read_yes_no(response: str) -> str | None:
    """Yes or no, where the response begins with the word (after "Answer:", if need be), else None.

    A single y or n counts, too. Words that only begin so do not: "None" and "Nothing" are neither. Nor is
    "yes or no" an answer.
    """
    text = clean(response)
    word = text.strip(".").lower()
    if word in ("y", "n"):
        return "yes" if word == "y" else "no"
    match = _YES_NO.match(text)
    if match is None:
        return None
    answer = match.group(1).lower()
    other = _OTHER_OF_YES_NO.match(text, match.end())
    return answer if other is None or other.group(1).lower() == answer else None


def read_list(response: str) -> str | None:
    """The last Python list in a response, in Python's own spelling, or None."""
    lists = (parse_literal(found) for found in reversed(re.findall(r"\[[^\[\]]*\]", clean(response))))
    return next((str(found) for found in lists if found is not None), None)


def parse_literal(text: str) -> Any:
    """The value that a text spells as Python, or None where it spells none."""
    try:
        return ast.literal_eval(text)
    except (
        ValueError,
        SyntaxError,
        TypeError,
        MemoryError,
        RecursionError,
    ):  # all that its documentation names
        return None


def same_text(text: str, options: Sequence[str]) -> int | None:
    """The place of the one option with this text, or None: to the letter, else up to case and marks.

    "mW" and "MW" are two options, and "mw" is neither.
    """
    for form in (str.strip, plain):
        wanted = form(text)
        alike = [place for place, option in enumerate(options) if wanted and form(option) == wanted]
        if alike:
            return alike[0] if len(alike) == 1 else None
    return None


# Each rule gives the letters that it finds: none where it does not apply, several where it is not clear.


def _whole(text: str, options: Sequence[str]) -> set[str]:
    alone = _letter(_LETTER_ALONE.fullmatch(text), options) or _of_same_text(text, options)
    if alone:
        return alone
    letters, complete = _listed(text, options)
    return letters if complete else set()


def _begins(text: str, options: Sequence[str]) -> set[str]:
    """Letters at the beginning; where all options are repeated there, a declared answer comes first."""
    listed, _ = _listed(text, options)
    letters = _letter(_LETTER_FIRST.match(text), options)
    if letters:
        first, *lines = [line for line in text.split("\n") if line.strip()]
        letters |= _marked_alike(first, options)
        if not _LETTER_ALONE.fullmatch(first):  # else what follows is the explanation
            for line in lines:
                further = _letter(_LETTER_FIRST.match(line + "\n"), options)
                if not further:
                    break
                letters |= further
    if len(listed) > 1:
        letters |= listed
    return letters if len(letters) < 2 else _declared(text, options) or letters


def _marked_alike(line: str, options: Sequence[str]) -> set[str]:
    """Letters "A) ... B) ..." of a line that begins with one; behind "A." comes "B.", not "vitamin C."."""
    marked = [match.groups() for match in _MARKED.finditer(line) if _letter(match, options)]
    found: list[str] = []
    for letter, mark in marked:
        is_next = not found or ascii_uppercase.index(letter) == ascii_uppercase.index(found[-1]) + 1
        if mark == marked[0][1] and (is_next or mark != "."):
            found.append(letter)
    return set(found)


def _declared(text: str, options: Sequence[str]) -> set[str]:
    for declared in reversed(DECLARES.split(text)[1:]):
        listed, _ = _listed(declared, options)
        if len(listed) > 1:
            return listed
        line = declared.split("\n")[0]
        if letters := _letter(_LETTER_DECLARED.match(line), options) or _of_same_text(line, options):
            return letters
    return set()


def _last_line(text: str, options: Sequence[str]) -> set[str]:
    """Letter or option on the last line; two last lines with a letter each give two."""
    letters: set[str] = set()
    for line in reversed(text.split("\n")):
        if line.strip():
            found = _letter(_LETTER_ALONE.fullmatch(line), options)
            if not found:
                break
            letters |= found
    return letters or _whole(text.rpartition("\n")[2], options)


def _named(text: str, options: Sequence[str]) -> set[str]:
    matches = [*_LETTER_NAMED.finditer(text), *_LETTER_LAST.finditer(text)]
    return {letter for match in matches if not _rejected(match) for letter in _letter(match, options)}


def _occurring(text: str, options: Sequence[str]) -> set[str]:
    """Options whose text stands in the response, other than within the text of a longer one that does."""
    words = plain(text)
    letters: dict[str, set[str]] = {}
    for letter, option in zip(ascii_uppercase, map(plain, options), strict=False):
        letters.setdefault(option, set()).add(letter)
    found: set[str] = set()
    rejected = True
    for option in sorted(letters, key=len, reverse=True):
        pattern = _as_words(option)
        if len(option) > 1 and option in words and (matches := list(pattern.finditer(words))):
            found |= letters[option]
            rejected = rejected and all(map(_rejected, matches))
            words = pattern.sub("\0" * len(option), words)  # a shorter one within it does not count
    return set() if len(found) == 1 and rejected else found


def _as_words(option: str) -> re.Pattern[str]:
    """Finds an option's text where no word and no number goes on."""
    before = _NO_NUMBER_BEFORE if option[:1].isdigit() else ""
    after = _NO_NUMBER_AFTER if option[-1:].isdigit() else ""
    return re.compile(rf"(?<!\w){before}{re.escape(option)}(?!\w){after}")


def _rejected(match: re.Match[str]) -> bool:
    """Whether a match is named as what the answer is not: "option B is wrong", "not a cat"."""
    before = match.string[max(0, match.start() - 40) : match.start()]
    return bool(_REJECTED_BEFORE.search(before) or _REJECTED_AFTER.match(match.string, match.end()))


def _letter(match: re.Match[str] | None, options: Sequence[str]) -> set[str]:
    if match is None:
        return set()
    letter = next(group for group in match.groups() if group).upper()
    return {letter} if letter in ascii_uppercase[: len(options)] else set()


def _of_same_text(text: str, options: Sequence[str]) -> set[str]:
    place = same_text(text, options)
    return set() if place is None else {ascii_uppercase[place]}


def _listed(text: str, options: Sequence[str]) -> tuple[set[str], bool]:
    """Letters that a text begins with, each maybe with its option's text; whether there is nothing else."""
    letters: set[str] = set()
    place, first_is_alone = 0, False
    while (match := (_LISTED_FURTHER if letters else _LISTED).match(text, place)) and _letter(match, options):
        option = options[ascii_uppercase.index(match.group(1).upper())].strip()
        alone = _LINE_ENDS.match(text, match.end()) is not None
        if letters and first_is_alone and not alone and "\n" in text[place - 1 : match.start(1)]:
            break  # a letter alone on the first line, explained on the next ones
        end = _end(_MARKS, text, match.end())
        if option and _begins_with(text, end, option):
            end += len(option)
        elif _WORD_FOLLOWS.match(text, match.end()):
            break
        first_is_alone = first_is_alone or (not letters and alone)
        letters |= _letter(match, options)
        place = _end(_SEPARATORS, text, end)
    return letters, place == len(text)


def _begins_with(text: str, place: int, option: str) -> bool:
    end = place + len(option)
    return text[place:end].lower() == option.lower() and not text[end : end + 1].isalnum()


def _end(pattern: re.Pattern[str], text: str, place: int) -> int:
    match = pattern.match(text, place)
    return match.end() if match else place
