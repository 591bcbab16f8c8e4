"""Extraction of an option, yes or no, or a list from a response, without special tokens and markup."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any
from unicodedata import normalize

# "The answer is", "**Answer:**", "the correct option should be": the answer follows, unless it is "the wrong
# answer is".
DECLARES = re.compile(
    r"\b(?<!wrong )(?<!incorrect )(?<!false )(?:answer|option|choice)\b"
    r"[*_`]*\s*(?:is|are|was|(?:should|must|would|will)\s+be|[:=])[*_`:\s]*",
    re.IGNORECASE,
)

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # "Ｂ", "：", "（", "１" and so on
_INVISIBLE = dict.fromkeys((0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), 0x2060, 0xFEFF))
_PLAIN_CHARACTERS = {
    **_FULL_WIDTH,
    **_INVISIBLE,
    **str.maketrans("、【】「」『』", ',[]""""'),
}
_FULL_STOP = re.compile(r"[．。](?![\d０-９])")

_START_OF_TURN = re.compile(
    r"(?:\s|</?s>|<bos>|<\|(?:begin_of_text|endoftext|assistant)\|>|<\|im_start\|>(?:assistant\b)?"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>|<start_of_turn>(?:model\b)?)*+"
)
_END_OF_TURN = re.compile(
    r"</s>|<eos>|<end_of_turn>|<｜end▁of▁sentence｜>"
    r"|<\|(?:im_end|im_start|endoftext|end_of_text|eot_id|eom_id|eot|eos|end|return|end_of_turn"
    r"|END_OF_TURN_TOKEN|user)\|>"
)
# Two levels of braces: \boxed{\text{(B) } \frac{1}{2}}.
_BOX = re.compile(
    r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}|<answer>([^<]*)</answer>", re.IGNORECASE
)
_SIDE_BY_SIDE = re.compile(r"[\s$.,;]*(?:(?:and|or|&)[\s$]*)?")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|mathit|textbf|textit|boldsymbol|bm)\s*\{([^{}]*)\}")
_LATEX_BRACKET = re.compile(r"\\([()\[\]])")


def clean(response: str) -> str:
    r"""Return the response up to the end of its turn, without reasoning blocks and markup.

    "\boxed{\text{B}}" and "<answer>B</answer>" become "answer: B" on a separate line. Nothing follows a
    reasoning block that is not closed.
    """
    return _unboxed(without_markup(final_text(response))).strip()


def final_text(response: str) -> str:
    """Return the response without reasoning blocks and special tokens, else as it stands."""
    text = response.rpartition("</think>")[2].partition("<think>")[0]
    start = _START_OF_TURN.match(text).end()  # type: ignore[union-attr]
    text = text[start:] if "<" in text[:start] else text
    return _END_OF_TURN.split(text, maxsplit=1)[0]


def without_markup(text: str) -> str:
    """Return the text with ASCII instead of full-width punctuation, and without LaTeX around words."""
    text = _FULL_STOP.sub(". ", text).translate(_PLAIN_CHARACTERS)
    return _LATEX_BRACKET.sub(r"\1", _LATEX_TEXT.sub(r"\1", text))


def _unboxed(text: str) -> str:
    """Return the text with boxes as "answer: ..."; adjacent boxes are one answer: "answer: A, B"."""
    parts: list[str] = []
    end = 0
    for box in _BOX.finditer(text):
        between = text[end : box.start()]
        joined = parts and _SIDE_BY_SIDE.fullmatch(between)
        parts += [", " if joined else f"{between}\nanswer: ", box.group(1) or box.group(2) or ""]
        end = box.end()
    return "".join([*parts, "\n" if parts else "", text[end:]])


def plain(text: str) -> str:
    """Return the text without case, redundant white space and surrounding punctuation, accents composed."""
    return " ".join(normalize("NFC", without_markup(text)).casefold().split()).strip(" .,;:!*_`\"'“”‘’$")


# ----------------------------------------------------------------------------------------------- options

# Possessive: a degenerate response may hold ten thousand asterisks.
_OPEN, _CLOSE = r"[(\[{*_`\"'$\s]*+", r"[)\]}*_`\"'$.:,;!\s]*+"
_WORD = r"(?:(?:the\s+)?(?:option|choice|letter|answer)\s*+:?)?"
_LETTER = rf"{_OPEN}{_WORD}{_OPEN}([A-Z])"
_LETTER_ALONE = re.compile(_LETTER + _CLOSE, re.IGNORECASE)
# Punctuation or the end of the line sets the letter apart: "B) cat", "B. cat", "B, since ...", "B - cat".
_LETTER_FIRST = re.compile(
    _LETTER + r"(?:[)\]}:*]|\.(?!\w)|,(?!\s*[A-Z]\b)|[ \t]*\n|\s+[-–—]"
    r"|\s+(?:because|since|is\s+(?:the\s+)?(?:right|correct|best))\b)"
    r"(?!\s*is\s+(?:not|wrong|incorrect|false)\b|\s*(?:or|and)\s*\()",
    re.IGNORECASE,
)
# Not "a cat" nor "A cat": punctuation or a conjunction separates the letter from a further word.
_LETTER_DECLARED = re.compile(
    _LETTER + r"(?![\w-]|['’]\w)(?![ \t]+(?!(?:because|since|as|for|which|and)\b)\w)", re.IGNORECASE
)
_LETTER_NAMED = re.compile(r"\(([A-Za-z])\)|\b(?i:option|choice)\s+[(\[*_`\"']*([A-Zb-z]\b|a\b(?!\s+\w))")
# "It's C", "So, C.", "I would go with C": a capital letter as the last word.
_LETTER_LAST = re.compile(
    r"\b(?i:it['’]s|is|so|thus|therefore|with|choose|pick|select)[,:]?\s+\(?([A-Z])\)?[.!]?$"
)
# A list of letters: "A, B", "A and B", "A. dog B. cat". A letter followed by a word is an article.
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
# A sign, or one of these marks between digits, belongs to the number: "2.5 cm" is not "5 cm".
_NO_NUMBER_BEFORE = r"(?<![-+−–—‐‑‒±√^])(?<!\d[.,:/'’ ])"
_NO_NUMBER_AFTER = r"(?![.,:/'’−–—‐‑‒-]\d|\s?\^| \d{3}(?!\d))"
_OTHER_OF_YES_NO = re.compile(r"(?:[\s,;/|&.*_]|\b(?:and|or)\b)*+(yes|no)\b(?![ \t]+\w)", re.IGNORECASE)


def read_choice(response: str, options: Sequence[str], anywhere: bool = True) -> str | None:
    """Return the letter of the option that a response names, or None: nothing is guessed.

    The first rule that applies decides:

    1. The response is a letter, or the text of an option.
    2. It begins with a letter set apart, as in "B) cat".
    3. It states "the answer is" and a letter or an option's text; the last such statement counts.
    4. Its last line is a letter or an option's text.
    5. It names "(B)" or "option B", or ends in "I choose B", and names no other letter.
    6. It contains the text of exactly one option.

    Two different letters side by side, as in "A, B", are not an answer.

    Args:
        response: Text generated by the model.
        options: Texts of the options A, B, C, ...; one with an empty text can be named by its letter only.
        anywhere: Whether rule 6 applies.
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
    """Return "yes" or "no" if the response begins with the word, optionally after "Answer:", else None.

    A single y or n counts too. Neither "None" nor "Nothing" is a no, and "yes or no" is not an answer.
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
    """Return the last Python list in a response, normalized to its repr, or None."""
    lists = (parse_literal(found) for found in reversed(re.findall(r"\[[^\[\]]*\]", clean(response))))
    return next((str(found) for found in lists if found is not None), None)


def parse_literal(text: str) -> Any:
    """Return the value of a Python literal, or None if the text is not a literal."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # as documented by ast
        return None


def same_text(text: str, options: Sequence[str]) -> int | None:
    """Return the index of the only option with this text: exactly, else ignoring case and punctuation.

    "mW" and "MW" are two options, and "mw" is neither.
    """
    for form in (str.strip, plain):
        wanted = form(text)
        alike = [index for index, option in enumerate(options) if wanted and form(option) == wanted]
        if alike:
            return alike[0] if len(alike) == 1 else None
    return None


# Each rule returns a set of letters: empty if it does not apply, several if the response is ambiguous.


def _whole(text: str, options: Sequence[str]) -> set[str]:
    alone = _letter(_LETTER_ALONE.fullmatch(text), options) or _of_same_text(text, options)
    if alone:
        return alone
    letters, complete = _listed(text, options)
    return letters if complete else set()


def _begins(text: str, options: Sequence[str]) -> set[str]:
    """Return the letters at the beginning; if options are listed there, a declared answer wins."""
    listed, _ = _listed(text, options)
    letters = _letter(_LETTER_FIRST.match(text), options)
    if letters:
        first, *lines = [line for line in text.split("\n") if line.strip()]
        letters |= _marked_alike(first, options)
        if not _LETTER_ALONE.fullmatch(first):  # otherwise an explanation follows
            for line in lines:
                further = _letter(_LETTER_FIRST.match(line + "\n"), options)
                if not further:
                    break
                letters |= further
    if len(listed) > 1:
        letters |= listed
    return letters if len(letters) < 2 else _declared(text, options) or letters


def _marked_alike(line: str, options: Sequence[str]) -> set[str]:
    """Return the letters "A) ... B) ..." of a line; after "A." comes "B.", not "vitamin C."."""
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
    """Return the letter or option of the last line, or the letters of several last lines."""
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
    """Return the options whose text occurs in the response, but not inside a longer option's text."""
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
            words = pattern.sub("\0" * len(option), words)  # hide it from shorter options
    return set() if len(found) == 1 and rejected else found


def _as_words(option: str) -> re.Pattern[str]:
    """Return a pattern for an option's text that is not part of a longer word or number."""
    before = _NO_NUMBER_BEFORE if option[:1].isdigit() else ""
    after = _NO_NUMBER_AFTER if option[-1:].isdigit() else ""
    return re.compile(rf"(?<!\w){before}{re.escape(option)}(?!\w){after}")


def _rejected(match: re.Match[str]) -> bool:
    """Return whether the response rejects the match: "option B is wrong", "not a cat"."""
    before = match.string[max(0, match.start() - 40) : match.start()]
    return bool(_REJECTED_BEFORE.search(before) or _REJECTED_AFTER.match(match.string, match.end()))


def _letter(match: re.Match[str] | None, options: Sequence[str]) -> set[str]:
    if match is None:
        return set()
    letter = next(group for group in match.groups() if group).upper()
    return {letter} if letter in ascii_uppercase[: len(options)] else set()


def _of_same_text(text: str, options: Sequence[str]) -> set[str]:
    index = same_text(text, options)
    return set() if index is None else {ascii_uppercase[index]}


def _listed(text: str, options: Sequence[str]) -> tuple[set[str], bool]:
    """Return the letters listed at the start, with or without options' texts, and whether that is all."""
    letters: set[str] = set()
    place, first_is_alone = 0, False
    while (match := (_LISTED_FURTHER if letters else _LISTED).match(text, place)) and _letter(match, options):
        option = options[ascii_uppercase.index(match.group(1).upper())].strip()
        alone = _LINE_ENDS.match(text, match.end()) is not None
        if letters and first_is_alone and not alone and "\n" in text[place - 1 : match.start(1)]:
            break  # a letter alone on the first line, explained on the following ones
        end = _end(_MARKS, text, match.end())
        after = end + len(option)
        if option and text[end:after].lower() == option.lower() and not text[after : after + 1].isalnum():
            end = after
        elif _WORD_FOLLOWS.match(text, match.end()):
            break
        first_is_alone = first_is_alone or (not letters and alone)
        letters |= _letter(match, options)
        place = _end(_SEPARATORS, text, end)
    return letters, place == len(text)


def _end(pattern: re.Pattern[str], text: str, place: int) -> int:
    match = pattern.match(text, place)
    return match.end() if match else place
