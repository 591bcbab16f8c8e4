"""Texts against their accepted answers; ANLS as the official script computes it."""

from __future__ import annotations

import pytest

from solo_vlm.evaluate.scoring.text import anls, exact_match


@pytest.mark.parametrize(
    ("prediction", "answers", "same"),
    [
        ("Paris", ["paris"], True),
        (" Paris.\n", ["London", "Paris"], True),
        ("**New   York**", ["new york"], True),
        ("\\boxed{7}", ["answer: 7"], True),
        ("red<|im_end|>blue", ["red"], True),
        ("<think>blue?</think>red", ["Red"], True),
        ("ＡＢＣ", ["abc"], True),
        ("Paris, France", ["Paris"], False),
        ("", ["Paris"], False),
        ("", ["$"], False),
        ("", [""], True),
        ("$", ["$"], True),
        ("...", ["!"], False),
        ("straße", ["STRASSE"], True),
        ("cafe\N{COMBINING ACUTE ACCENT}", ["café"], True),
        ("cafe", ["café"], False),
        ("1,234", ["1234"], False),
    ],
)
def test_exact_match_ignores_case_spaces_and_punctuation_around(prediction, answers, same):
    assert exact_match(prediction, answers) == same


def official_anls(prediction, answers):
    """Return ANLS as the competition's script computes it, with a table of distances."""

    def distance(one, other):
        row = list(range(len(one) + 1))
        for i, b in enumerate(other, start=1):
            previous, row[0] = row[0], i
            for j, a in enumerate(one, start=1):
                previous, row[j] = row[j], min(previous + (a != b), row[j] + 1, row[j - 1] + 1)
        return row[-1]

    values = []
    for answer in answers:
        gold, text = (" ".join(part.strip().lower().split()) for part in (answer, prediction))
        length = max(len(answer.upper()), len(prediction.upper()))
        values.append(0.0 if length == 0 else distance(gold, text) / length)
    similarity = 1 - min(values)
    return similarity if similarity >= 0.5 else 0.0


TEXTS = ["", " ", "a", "ab", "abc", "abcd", "Invoice  No. 42", "invoice no 42", "42", "ﬁle", "FILE", "straße"]


@pytest.mark.parametrize("prediction", [*TEXTS, "invoice number 42", " March 3, 1999 ", "日本語", "x" * 400])
def test_anls_equals_official_script(prediction):
    for one in TEXTS:
        for answers in ([one], [one, "March 3, 1999"], [one, prediction[::-1], "日本"]):
            assert anls(prediction, answers) == official_anls(prediction, answers)


def test_anls_keeps_half_similar_texts_only():
    assert anls("ab", ["ax"]) == 0.5
    assert anls("abc", ["axx"]) == 0.0
    assert anls("hello", ["help", "hello"]) == 1.0
