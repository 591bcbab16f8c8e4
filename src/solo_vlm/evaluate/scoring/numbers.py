"""Extraction of a number from a response."""

from __future__ import annotations

import math
import re
import unicodedata

from solo_vlm.evaluate.scoring.extract import DECLARES, clean

_DASHES = "-−–—‐‑‒﹣"
_DIGIT_GAP = r"(?:\\[,;!: ]|['’\u00a0\u2009\u202f])"
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")

# LaTeX and typographic forms, rewritten to what _TOKEN matches.
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_VULGAR_FRACTION = re.compile(r"[¼-¾⅐-⅞]")
_GAP_IN_THOUSANDS = re.compile(rf"(?<=\d){_DIGIT_GAP}(?=\d{{3}}(?!\d))")
_POWER_OF_TEN = re.compile(
    r"(?:(?<=\d)\s*(?:×|\*|·|\bx|\\times|\\cdot)\s*|(?<![\w.^]))10"
    rf"(?:\s*\^\s*\{{?([{_DASHES}+]?\d+)\}}?|([⁺⁻]?[⁰¹²³⁴-⁹]+))"
)
_SIGN_APART = re.compile(rf"([=:(]\s*)[{_DASHES}]\s+(?=[\d.])")

_DIGITS = r"\d+(?:[.,]\d+)*"
_TOKEN = re.compile(
    # Not inside a word or number, and not an exponent or index.
    rf"(?<![\w.^])(?<![\^_]\{{)(?P<sign>[{_DASHES}+]?)"
    rf"(?:(?P<whole>\d{{1,6}})[ ]+(?=\d{{1,3}}\s*/\s*\d{{1,3}}(?![\d/])))?"
    rf"(?P<body>{_DIGITS}|\.\d+)(?P<exponent>[eE][-+]?\d+(?!\w))?"
    rf"(?:\s*/\s*(?P<below>{_DIGITS}))?"
    # Part of a range, ratio, date, power, number in words, or unevaluated expression.
    rf"(?P<more>(?:[:/{_DASHES}]\d+)+|\s*(?:\^|[*×÷+·]\s*[\d.]|π|\\pi\b|√|\\sqrt|\\times|\\cdot)"
    r"|[kKM]\b|\s*(?:hundred|thousand|million|billion|trillion)s?\b)?"
)
_BEFORE = re.compile(
    r"(?:\d[ \t]*[-+*×÷·−–/][ \t]*|√[({ ]*|sqrt\s*[({]\s*|\bbetween\s+(?:\S{1,12}\s+and\s+)?)$", re.IGNORECASE
)
_REJECTED_BEFORE = re.compile(r"(?:\bnot|n['’]t|\brather\s+than|\binstead\s+of)\s+$", re.IGNORECASE)
_SIGN_IN_WORDS = re.compile(r"(\d\s+)?\b(?:minus|negative)\s+(?=[\d.])", re.IGNORECASE)
_WHOLE = re.compile(r"\d+|\d{1,3}(?:,\d{3})+|[1-9]\d?(?:,\d{2})+,\d{3}|\d{1,3}(?:\.\d{3}){2,}")
_DECIMAL = re.compile(
    r"(?P<english>(?:\d*|\d{1,3}(?:,\d{3})+|[1-9]\d?(?:,\d{2})+,\d{3})\.\d+)"
    r"|(?P<german>0|[1-9]\d{0,2}(?:\.\d{3})+),\d+"
)
_BETWEEN_NUMBERS = re.compile(r"(?:[\s,;.$&]|\band\b|\bor\b)*+")
_CLAUSE_END = re.compile(r"[,;](?!\d)|\.(?!\d)")


def read_number(response: str) -> str | None:
    """Return the number that a response states, as text that `float` parses, or None.

    It is the first number on the line after the last "the answer is" (after the "=", if there is one), else
    the last number of the response. Fractions are evaluated. Ambiguous numbers, such as "3,5", "3-5" and
    "2 x 4", count as none.
    """
    text = _typed(clean(response))
    declared = DECLARES.split(text)[1:]
    if declared:
        line = declared[-1].split("\n")[0]
        if _is_list(line):
            return None
        clause = _CLAUSE_END.split(line)[0]
        tokens = _tokens(clause.rpartition("=")[2]) or _tokens(line)
        if tokens:
            return tokens[0]
    tokens = _tokens(text)
    return tokens[-1] if tokens and not _is_list(text) else None


def as_number(text: str) -> float | None:
    """Return the value of a text that is a finite number, else None."""
    try:
        number = float(text)
    except ValueError:
        typed = _typed(clean(text))
        value = _tokens(typed)[0] if _TOKEN.fullmatch(typed) else None
        if value is None:
            return None
        number = float(value)
    return number if math.isfinite(number) else None


def _typed(text: str) -> str:
    """Return the text with plain numbers: "-1/2" for "−½", "1,234" for "1{,}234"."""
    text = _SIGN_IN_WORDS.sub(lambda found: f"{found[1]}- " if found[1] else "-", text)
    text = re.sub(r"(?<=\d)(?=\\[dt]?frac)", " ", text.replace("{,}", ","))
    text = _FRACTION.sub(r"\1/\2", text)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = _VULGAR_FRACTION.sub(lambda found: unicodedata.normalize("NFKC", found.group()), text)
    text = _POWER_OF_TEN.sub(_as_exponent, text.replace("⁄", "/").replace("∕", "/"))
    return _SIGN_APART.sub(r"\1-", _GAP_IN_THOUSANDS.sub("", text))


def _is_list(text: str) -> bool:
    """Return whether a text consists of several numbers and nothing else."""
    return len(set(_tokens(text))) > 1 and _BETWEEN_NUMBERS.fullmatch(_TOKEN.sub("", text)) is not None


def _as_exponent(power: re.Match[str]) -> str:
    exponent = (power.group(1) or power.group(2)).translate(_SUPERSCRIPTS)
    exponent = re.sub(f"[{_DASHES}]", "-", exponent)
    return f"{'' if power.string[: power.start()][-1:].isdigit() else 1}e{exponent}"


def _tokens(text: str) -> list[str | None]:
    """Return the numbers of a text, None for each ambiguous one; "not 5" is skipped."""
    return [
        _value(token) for token in _TOKEN.finditer(text) if not _REJECTED_BEFORE.search(_text_before(token))
    ]


def _value(token: re.Match[str]) -> str | None:
    body = _digits(token["body"])
    if body is None or token["more"] or _BEFORE.search(_text_before(token)):
        return None
    sign = "-" if token["sign"] and token["sign"] in _DASHES else ""
    if token["below"] is None:
        return f"{sign}{body}{token['exponent'] or ''}"
    below = _digits(token["below"])
    if below is None or float(below) == 0:
        return None
    return f"{sign}{float(token['whole'] or 0) + float(body) / float(below)}"


def _text_before(token: re.Match[str]) -> str:
    return token.string[max(0, token.start() - 30) : token.start()]


def _digits(body: str) -> str | None:
    """Return digits as `float` parses them, or None if commas and points are ambiguous."""
    if _WHOLE.fullmatch(body):
        return re.sub("[,.]", "", body)
    decimal = _DECIMAL.fullmatch(body)
    if decimal is None:
        return None
    if decimal["english"]:
        return body.replace(",", "")
    return body.replace(".", "").replace(",", ".")
