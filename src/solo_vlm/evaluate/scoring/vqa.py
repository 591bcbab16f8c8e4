"""Normalization and soft accuracy of VQA, as its evaluation script and TextVQA's define them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBER_WORDS)}}
_ARTICLES = ("a", "an", "the")
# The table has each of these with one of its apostrophes left out.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
you'll you're you've
"""
_CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word
    for word in _CONTRACTED.split()
    for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # the other way round in the table
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_COMMAS_IN_NUMBER = re.compile(r"\d,+\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # the scripts pass re.UNICODE where re.sub expects a count
_FULL_CREDIT = 3  # people who gave the answer, besides the one left out


def vqa_accuracy(response: str, answers: Sequence[str]) -> tuple[float, str]:
    """Return the soft accuracy of a response and its normalized text, as VQA's vqaEval.py computes them.

    For each of the (ten) people, the response is compared with the answers of the others: it has full credit
    if three of them gave it. The people's answers lose punctuation, if they differ at all, but neither
    articles nor number words; the response loses all.

    Source: Antol et al. 2015, arXiv 1505.00468; Goyal et al. 2017, arXiv 1612.00837.
    """
    text = without_articles(without_punctuation(response.replace("\n", " ").replace("\t", " ").strip()))
    if len(set(answers)) > 1:
        answers = [without_punctuation(answer) for answer in answers]
    return _leave_one_out(answers.count(text), len(answers)), text


def textvqa_accuracy(response: str, answers: Sequence[str]) -> tuple[float, str]:
    """Return the soft accuracy of a response and its normalized text, as TextVQA's m4c_evaluators.py does.

    Unlike VQA's, both the response and the answers are normalized in full.

    Source: Singh et al. 2019, arXiv 1904.08920; the evaluator of its challenge in MMF.
    """
    text = _textvqa_normalized(response)
    return _leave_one_out(list(map(_textvqa_normalized, answers)).count(text), len(answers)), text


def without_punctuation(text: str, comma_in_number: re.Pattern[str] = _COMMA_IN_NUMBER) -> str:
    """Return the text with punctuation removed, or replaced by a space where it joins words, as in a-b."""
    removed = comma_in_number.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        apart = removed or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if apart else " ")
    return _PERIOD.sub("", plain, count=_MAX_PERIODS)


def without_articles(text: str) -> str:
    """Return the text in lower case without articles, with digits for number words and with apostrophes."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _textvqa_normalized(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return without_articles(without_punctuation(text, _COMMAS_IN_NUMBER))


def _leave_one_out(matches: int, people: int) -> float:
    """Return the mean credit over the people left out; `matches` of them gave the answer."""
    among_others = matches * min(matches - 1, _FULL_CREDIT) + (people - matches) * min(matches, _FULL_CREDIT)
    return among_others / (_FULL_CREDIT * people)
