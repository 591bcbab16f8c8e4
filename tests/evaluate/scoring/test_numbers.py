"""Numbers as models write them, against their values."""

from __future__ import annotations

import pytest

from solo_vlm.evaluate.scoring.numbers import as_number, read_number


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("14", "14"),
        ("The number missing is 14.", "14"),
        ("It costs $1,234.50 in all.", "1234.50"),
        ("-3.5", "-3.5"),
        ("3 + 4 = 7", "7"),
        ("The answer is 5, as 10 / 2 shows.\nChecked with 12 examples", "5"),
        ("Answer: $1.45", "1.45"),
        ("1e3", "1e3"),
        ("50%", "50"),
        ("Of 3 and 4 it is \\boxed{7}, not 12", "7"),
        (".5", ".5"),
        ("1/2", "0.5"),
        ("The answer is 3 / 4.", "0.75"),
        ("-\\frac{3}{4}", "-0.75"),
        ("\\boxed{\\dfrac{1}{2}}", "0.5"),
        ("½", "0.5"),
        ("2½", "2.5"),
        ("2 1/2", "2.5"),
        ("1/0", None),
        ("3/5/2020", None),
        ("−5", "-5"),
        ("–5", "-5"),
        ("－５", "-5"),
        ("x = −2.5", "-2.5"),
        ("x = - 5", "-5"),
        ("1{,}234", "1234"),
        ("$1\\,234$", "1234"),
        ("1\u202f234\u202f567", "1234567"),
        ("1'234", "1234"),
        ("1,23,456", "123456"),
        ("1.234,50", "1234.50"),
        ("0,5", "0.5"),
        ("3,5", None),
        ("3-5", None),
        ("3–5", None),
        ("12:30", None),
        ("1.2.3", None),
        ("7, 8", None),
        ("1 million", None),
        ("The answer is 2.5 thousand people.", None),
        ("about 1k", None),
        ("5 km", "5"),
        ("5!", "5"),
        ("\\boxed{7} or \\boxed{8}", None),
        ("25 cm^2", "25"),
        ("25 cm²", "25"),
        ("2^3", None),
        ("2π", None),
        ("2\\sqrt{3}", None),
        ("3 + 4", None),
        ("The answer is 3 + 4 = 7.", "7"),
        ("3 × 10^5", "3e5"),
        ("1.5×10⁻⁴", "1.5e-4"),
        ("１２", "12"),
        ("5</s>", "5"),
        ("5<|im_end|>\n<|im_start|>user\n12", "5"),
        ("It's 7, not 8", "7"),
        ("It is 7 rather than 8.", "7"),
        ("not 5", None),
        ("The answer is not 5", None),
        ("The answer is not 5 but 6.", "6"),
        ("The answer isn't 5.", None),
        ("The wrong answer is 5, the right answer is 6", "6"),
        ("The answer is between 4 and 5", None),
        ("between 4 and 5", None),
        ("minus 3", "-3"),
        ("The answer is negative 3.5.", "-3.5"),
        ("7 minus 3", None),
        ("7 minus 3 = 4", "4"),
        ("no number", None),
        ("", None),
    ],
)
def test_numbers(response, expected):
    assert read_number(response) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("14.0", 14.0),
        ("−5", -5.0),
        ("1,234", 1234.0),
        ("1/2", 0.5),
        (" 7 ", 7.0),
        ("7 apples", None),
        ("nan", None),
        ("inf", None),
        ("", None),
    ],
)
def test_as_number_accepts_plain_numbers_only(text, value):
    assert as_number(text) == value
