"""Read an option, yes or no, or a number out of what a model wrote."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

# "The answer is", "**Answer:**", "the correct option should be": what follows is the answer.
_DECLARES = re.compile(
    r"\b(?:answer|option|choice)\b[*_`]*\s*(?:is|are|was|(?:should|must|would|will)\s+be|[:=])[*_`:\s]*",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\boxed\s*\{([^{}]*)\}|<answer>([^<]*)</answer>")
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
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
_NUMBER = re.compile(r"(?<![\w.])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?")
_YES_NO = re.compile(r"\W*+(?:(?:the\s+)?(?:\w+\s+)?answer\b(?:\s+is)?\W*+)?(yes|no)\b", re.IGNORECASE)


def read_choice(response: str, options: Sequence[str], anywhere: bool = True) -> str | None:
    """The letter of the option that a response names, or None: nothing is guessed.

    In this order: the response is a letter, or the text of an option; it begins with a letter set apart, as
    in "B) cat"; it says "the answer is", and then a letter or an option's text, the last time counting; its
    last line is a letter or an option's text; it names one "(B)" or "option B", or ends in "I choose B", and
    names no other; the text of one option and of no other occurs in it.

    Args:
        response: what the model wrote.
        options: texts of the options A, B, C, ...
        anywhere: whether the text of an option counts within a sentence, too.
    """
    text = _unboxed(response)
    return (
        _whole(text, options)
        or _letter(_LETTER_FIRST.match(text), options)
        or _declared(text, options)
        or _whole(text.rpartition("\n")[2], options)
        or _named_once(text, options)
        or (_occurs_once(text, options) if anywhere else None)
    )


def read_yes_no(response: str) -> str | None:
    """Yes or no, where the response begins with the word (after "Answer:", if need be), else None.

    A single y or n counts, too. Words that only begin so do not: "None" and "Nothing" are neither.
    """
    word = response.strip().strip(".").lower()
    if word in ("y", "n"):
        return "yes" if word == "y" else "no"
    match = _YES_NO.match(_unboxed(response))
    return match.group(1).lower() if match else None


def read_number(response: str) -> str | None:
    """The number that a response gives, as text that `float` takes, or None.

    The first number on the line after the last "the answer is", else the last number of all.
    """
    text = _unboxed(response)
    declared = _DECLARES.split(text)[1:]
    if declared and (numbers := _numbers(declared[-1].split("\n")[0])):
        return numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def read_list(response: str) -> str | None:
    """The last Python list in a response, in Python's own spelling, or None."""
    lists = (parse_literal(found) for found in reversed(re.findall(r"\[[^\[\]]*\]", response)))
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


def plain(text: str) -> str:
    """Text without what does not distinguish answers: case, white space, marks around it."""
    return " ".join(text.casefold().split()).strip(" .,;:!*_`\"'“”‘’$")


def _unboxed(response: str) -> str:
    r"""A response without thoughts, in which "\boxed{\text{B}}" and "<answer>B</answer>" are "answer: B"."""
    text = _LATEX_TEXT.sub(r"\1", _THOUGHT.sub("", response))
    return _BOX.sub(r"\nanswer: \1\2\n", text).strip()


def _whole(text: str, options: Sequence[str]) -> str | None:
    return _letter(_LETTER_ALONE.fullmatch(text), options) or _same_text(text, options)


def _letter(match: re.Match[str] | None, options: Sequence[str]) -> str | None:
    if match is None:
        return None
    letter = next(group for group in match.groups() if group).upper()
    return letter if letter in ascii_uppercase[: len(options)] else None


def _same_text(text: str, options: Sequence[str]) -> str | None:
    wanted = plain(text)
    alike = [place for place, option in enumerate(options) if plain(option) == wanted]
    return ascii_uppercase[alike[0]] if len(alike) == 1 else None


def _declared(text: str, options: Sequence[str]) -> str | None:
    for declared in reversed(_DECLARES.split(text)[1:]):
        line = declared.split("\n")[0]
        if letter := _letter(_LETTER_DECLARED.match(line), options) or _same_text(line, options):
            return letter
    return None


def _named_once(text: str, options: Sequence[str]) -> str | None:
    matches = [*_LETTER_NAMED.finditer(text), *_LETTER_LAST.finditer(text)]
    letters = {_letter(match, options) for match in matches} - {None}
    return letters.pop() if len(letters) == 1 else None


def _occurs_once(text: str, options: Sequence[str]) -> str | None:
    """The option whose text stands in the response; one that is part of another that does is left out."""
    words = plain(text)
    found = {
        letter: plain(option)
        for letter, option in zip(ascii_uppercase, options, strict=False)
        if len(plain(option)) > 1 and _has_words(words, plain(option))
    }
    longest = [
        letter
        for letter, option in found.items()
        if not any(option != other and option in other for other in found.values())
    ]
    return longest[0] if len(longest) == 1 else None


def _has_words(text: str, words: str) -> bool:
    return words in text and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def _numbers(text: str) -> list[str]:
    found = (match.group().replace(",", "").replace("−", "-") for match in _NUMBER.finditer(text))
    return [number for number in found if any(character.isdigit() for character in number)]
