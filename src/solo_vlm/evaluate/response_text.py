"""The text of a response without what surrounds the answer: special tokens, thoughts, markup."""

from __future__ import annotations

import re

# "The answer is", "**Answer:**", "the correct option should be": what follows is the answer.
# Behind "the wrong answer is" it is not.
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
    r"""Return the response up to the end of its turn, without thoughts and markup.

    "\boxed{\text{B}}" and "<answer>B</answer>" become "answer: B" on a line of their own. A thought that does
    not end has no answer behind it.
    """
    text = response.rpartition("</think>")[2].partition("<think>")[0]
    text = text[_START_OF_TURN.match(text).end() :]  # type: ignore[union-attr]
    text = without_markup(_END_OF_TURN.split(text, maxsplit=1)[0])
    return _unboxed(text).strip()


def without_markup(text: str) -> str:
    """Return a text with ASCII punctuation in place of full-width, and without LaTeX around words."""
    text = _FULL_STOP.sub(". ", text).translate(_PLAIN_CHARACTERS)
    return _LATEX_BRACKET.sub(r"\1", _LATEX_TEXT.sub(r"\1", text))


def _unboxed(text: str) -> str:
    """Return a text with its boxes as "answer: ..."; boxes side by side are one answer: "answer: A, B"."""
    parts: list[str] = []
    end = 0
    for box in _BOX.finditer(text):
        between = text[end : box.start()]
        joined = parts and _SIDE_BY_SIDE.fullmatch(between)
        parts += [", " if joined else f"{between}\nanswer: ", box.group(1) or box.group(2) or ""]
        end = box.end()
    return "".join([*parts, "\n" if parts else "", text[end:]])


def plain(text: str) -> str:
    """Return a text without what does not distinguish answers: case, white space, marks around it."""
    return " ".join(without_markup(text).casefold().split()).strip(" .,;:!*_`\"'“”‘’$")
