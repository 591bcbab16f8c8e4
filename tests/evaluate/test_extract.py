"""What is read out of answers: letters, options, yes and no, numbers."""

from __future__ import annotations

import pytest

from solo_vlm.evaluate.extract import read_choice, read_list, read_number, read_yes_no

OPTIONS = ["dog", "cat", "bird", "a cat and a dog"]


@pytest.mark.parametrize(
    "response",
    [
        "b",
        "(B)",
        "B) cat",
        "The answer is B.",
        " B",
        "cat",
        "Cat.",
        "B",
        "B.",
        "b)",
        "**B**",
        "B: cat",
        "B. cat",
        "(b) cat",
        "B - cat",
        "Answer: B",
        "**Answer:** B",
        "answer: b",
        "Option B",
        "The correct answer is option (B).",
        "The answer is the letter b.",
        "The answer should be B, because it purrs",
        "The answer is B because it purrs",
        "The answer is 'B'.",
        "B is correct.",
        "B, since it purrs",
        "B because it purrs",
        "It's B",
        "So, B.",
        "I'd go with B.",
        "<think>(A) barks. The answer is A?</think>B",
        "B\n\nThe dog (A) barks.",
        "I would take option b here",
        "\\boxed{B}",
        "It follows that $\\boxed{\\text{B}}$",
        "<answer>B</answer>",
        "The answer is cat.",
        "A cat",
        "A cat is sitting on the mat",
        "I think it is a cat",
        "The answer is a cat",
        "First it looked like a dog. It has whiskers.\nB",
        "The answer is (A). No, wait: the answer is (B).",
    ],
)
def test_every_usual_way_of_saying_b(response):
    assert read_choice(response, OPTIONS) == "B"


@pytest.mark.parametrize(
    "response",
    [
        "",
        "I think ...",
        "A nice picture",
        "E",
        "It's a dog, not a bird",
        "(A) or (B)",
        "A, B and C",
        "The option a person takes",
        "e.g. a whale",
        "bulldog",
    ],
)
def test_nothing_is_guessed(response):
    assert read_choice(response, [*OPTIONS, "fish"][:4]) is None


def test_a_letter_counts_only_as_far_as_there_are_options():
    assert read_choice("C", ["yes", "no"]) is None
    assert read_choice("I", ["yes", "no"]) is None
    assert read_choice("E", [*OPTIONS, "fish"]) == "E"


def test_the_longer_of_two_options_that_both_occur():
    assert read_choice("There is a cat and a dog on it", OPTIONS) == "D"


def test_options_that_are_letters_themselves():
    """Labels of diagrams: the letter of the option comes first, a letter that is no option's is a label."""
    labels = ["E", "B", "A", "F"]
    assert read_choice("B", labels) == "B"
    assert read_choice("E", labels) == "A"
    assert read_choice("This is a leaf", labels) is None


def test_letters_are_read_where_the_options_are_not_known():
    assert read_choice("The answer is C.", [""] * 4) == "C"
    assert read_choice("something", [""] * 4) is None


def test_text_within_a_sentence_only_where_wanted():
    assert read_choice("Of 3/5 and 8/11 take the former", ["3/5", "1/2"], anywhere=False) is None
    assert read_choice("so the answer is 3/5.", ["3/5", "1/2"], anywhere=False) == "A"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Answer: yes", "yes"),
        ("Yes.", "yes"),
        ("no", "no"),
        ("No, there is not.", "no"),
        ("The answer is no", "no"),
        ("**Yes**", "yes"),
        ("y", "yes"),
        ("N.", "no"),
        (" YES", "yes"),
        ("None", None),
        ("Nothing", None),
        ("Not sure", None),
        ("nose", None),
        ("Yesterday", None),
        ("n/a", None),
        ("", None),
        ("A dog", None),
    ],
)
def test_yes_and_no(response, expected):
    assert read_yes_no(response) == expected


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
        ("no number", None),
        ("", None),
    ],
)
def test_numbers(response, expected):
    assert read_number(response) == expected


@pytest.mark.timeout(60)
@pytest.mark.parametrize("noise", ["*", " ", "\n", "(", "[", "1", "1,", "answer is ", "option "])
def test_answers_that_run_wild_do_not_hold_up_the_scoring(noise):
    """50,000 repetitions: a pattern that looks back over what it has seen would take hours."""
    response = "Well" + noise * 50_000 + "x"
    assert read_choice(response, OPTIONS) is None
    assert read_yes_no(response) is None
    assert read_list(response) is None
    read_number(response)


def test_lists():
    assert read_list("Between [2007,2008].") == "[2007, 2008]"
    assert read_list("[1] and then [1.50, 2]") == "[1.5, 2]"
    assert read_list("[a]") is None
    assert read_list("[{{}: 1}]") is None
    assert read_list("[" + "-" * 100_000 + "1]") is None
    assert read_list("2007 and 2008") is None
