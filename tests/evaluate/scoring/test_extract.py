"""Letters, options, yes and no, and numbers extracted from responses."""

from __future__ import annotations

import pytest

from solo_vlm.evaluate.scoring.extract import read_choice, read_list, read_yes_no
from solo_vlm.evaluate.scoring.numbers import read_number

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
def test_common_phrasings_of_option_b(response):
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
def test_unclear_responses_are_unreadable(response):
    assert read_choice(response, [*OPTIONS, "fish"][:4]) is None


@pytest.mark.parametrize(
    "response",
    [
        "A, B",
        "A and B",
        "A or B",
        "A/B",
        "B - A",
        "(A)(B)",
        "B\nA",
        "Both are possible.\nA\nB",
        "Answer: A, B",
        "Answer: A and B",
        "Answer: A or B",
        "The answer is C. No, answer: A or B, a cat",
        "\\boxed{A}, \\boxed{B}",
        "<answer>A</answer> or <answer>B</answer>",
        "A. dog\nB. cat\nC. bird\nD. a cat and a dog",
        "A. dog B. cat C. bird D. a cat and a dog",
        "A) it barks B) it purrs",
        "A. dog - it has no tail\nB. cat - it has whiskers\nC. bird\nD. both",
        "(A) dog, (B) cat, (C) bird, (D) a cat and a dog",
        "A dog B cat C bird D fish",
        "dog, cat, bird, a cat and a dog",
        "Option A and option B are cats",
    ],
)
@pytest.mark.parametrize("options", [OPTIONS, ["dog", "", "bird", "fish"]], ids=["full", "one empty"])
def test_several_letters_are_unreadable(response, options):
    assert read_choice(response, options) is None


def test_all_letters_are_unreadable_without_option_texts():
    for response in ("A, B", "A\nB\nC\nD", "A) dog B) cat", "A. dog\nB. cat", "Answer: A, B"):
        assert read_choice(response, [""] * 5) is None


@pytest.mark.parametrize(
    "response",
    [
        "A. dog\nB. cat\nC. bird\nD. a cat and a dog\n\nAnswer: B",
        "A and C are animals that bark or fly, so the answer is B",
        "B\n\nA. dog: it would bark\nC. bird: it would fly",
        "B. cat\n\nExplanation:\nA. dog: it would bark",
        "B. A cat",
        "B (cat)",
        "B: cat. It is not a dog.",
    ],
)
def test_answer_next_to_repeated_options_counts(response):
    assert read_choice(response, OPTIONS) == "B"


@pytest.mark.parametrize(
    "response",
    [
        "B</s>",
        "B<|im_end|>",
        "B<|endoftext|>",
        "B<|eot_id|>",
        "B<eos>",
        "B<end_of_turn>",
        "B<｜end▁of▁sentence｜>",
        "<s>B</s>",
        "<|im_start|>assistant\nB<|im_end|>\n",
        "B</s>A</s>",
        "B<|im_end|>\n<|im_start|>user\nIs it A?<|im_end|>",
        "cat</s>",
        "The answer is cat.</s>",
        "It barks: A.</think>B",
    ],
)
def test_special_tokens_and_text_after_the_turn_are_ignored(response):
    assert read_choice(response, OPTIONS) == "B"


@pytest.mark.parametrize(
    "response",
    [
        "B．",
        "（B）",
        "B：",
        "B：cat",
        "B。",
        "B、cat",
        "Ｂ",
        "（ｂ）",
        "【B】",
        "B．因为",
        "ｃａｔ",
        "\ufeffB",
        "\u200bB",
    ],
)
def test_full_width_and_invisible_characters(response):
    assert read_choice(response, OPTIONS) == "B"


@pytest.mark.parametrize(
    "response",
    [
        "\\(B\\)",
        "\\[\\boxed{B}\\]",
        "$\\mathbf{B}$",
        "\\boxed{\\textbf{(B)}\\ cat}",
        "**Answer: B**",
        "**Answer**: **B. cat**",
        "**B**: cat",
        "__B__",
        "`B`",
        "<ANSWER>B</ANSWER>",
    ],
)
def test_markup_around_a_letter(response):
    assert read_choice(response, OPTIONS) == "B"


@pytest.mark.parametrize(
    "response",
    [
        "Option B is wrong",
        "(B) is incorrect.",
        "I don't think it is B",
        "The answer is not B",
        "It is not a cat",
        "There is no cat",
        "<think>It purrs. The answer is B",
        "None of the above",
        "None of A, B or C",
        "Neither A nor B",
        "N/A",
        "I don't know",
        "The incorrect answer is B",
        "The wrong option is B.",
        "The wrong answer: dog",
        "It doesn't look like a dog",
    ],
)
def test_rejected_options_and_unclosed_reasoning_are_not_answers(response):
    assert read_choice(response, OPTIONS) is None


def test_none_and_all_options_match_by_text():
    options = ["A and B", "None of the above", "All of the above", ""]
    assert read_choice("None of the above", options) == "B"
    assert read_choice("The answer is none of the above.", options) == "B"
    assert read_choice("A and B", options) == "A"
    assert read_choice("C. All of the above", options) == "C"


def test_empty_option_matches_by_letter_only():
    options = ["two", "one", "", "three"]
    assert [read_choice(response, options) for response in ("C", "D", "three")] == ["C", "D", "D"]
    assert read_choice("", options) is None
    assert read_choice("...", options) is None


def test_options_that_differ_in_case_or_punctuation_only():
    assert read_choice("MW", ["mW", "MW"]) == "B"
    assert read_choice("mw", ["mW", "MW"]) is None
    assert read_choice("5", ["5!", "5"]) == "B"


def test_letters_beyond_the_options_do_not_count():
    assert read_choice("C", ["yes", "no"]) is None
    assert read_choice("I", ["yes", "no"]) is None
    assert read_choice("E", [*OPTIONS, "fish"]) == "E"


@pytest.mark.parametrize(
    ("response", "options", "expected"),
    [
        ("The length is 2.5 cm", ["2 cm", "5 cm"], None),
        ("It is -5 cm", ["5 cm", "3 cm"], None),
        ("It is −5 cm", ["5 cm", "3 cm"], None),
        ("It is 1,500 cm", ["500 cm", "3 cm"], None),
        ("It is 1 500 cm", ["500 cm", "3 cm"], None),
        ("It is 1/2 cm", ["2 cm", "3 cm"], None),
        ("About 15.5", ["15", "20"], None),
        ("About 15 000 of them", ["15", "20"], None),
        ("10^3 of them", ["10", "20"], None),
        ("10-15 of them", ["10", "20"], None),
        ("It is 5 cm long", ["5 cm", "3 cm"], "A"),
        ("It is 2.5 cm long", ["5 cm", "2.5 cm"], "B"),
        ("It is -5 cm long", ["5 cm", "-5 cm"], "B"),
        ("There are 15, I think", ["10", "15"], "B"),
    ],
)
def test_option_inside_a_longer_number_does_not_count(response, options, expected):
    assert read_choice(response, options) == expected


def test_longest_of_overlapping_options_wins():
    assert read_choice("There is a cat and a dog on it", OPTIONS) == "D"


def test_options_that_are_letters_themselves():
    """Diagram labels: option letters take precedence; any other letter is a label."""
    labels = ["E", "B", "A", "F"]
    assert read_choice("B", labels) == "B"
    assert read_choice("E", labels) == "A"
    assert read_choice("This is a leaf", labels) is None


def test_letters_without_known_options():
    assert read_choice("The answer is C.", [""] * 4) == "C"
    assert read_choice("something", [""] * 4) is None


def test_option_text_inside_a_sentence_is_optional():
    assert read_choice("Of 3/5 and 8/11 take the former", ["3/5", "1/2"], anywhere=False) is None
    assert read_choice("so the answer is 3/5.", ["3/5", "1/2"], anywhere=False) == "A"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Answer: yes", "yes"),
        ("Yes.", "yes"),
        ("no", "no"),
        ("No, there is not.", "no"),
        ("Yes, no doubt", "yes"),
        ("Yes or no", None),
        ("yes/no", None),
        ("No, yes", None),
        ("yes</s>", "yes"),
        ("y<|im_end|>", "yes"),
        ("<s>No</s>Yes", "no"),
        ("Ｙｅｓ。", "yes"),
        ("\ufeffyes", "yes"),
        ("\\boxed{No}", "no"),
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
        ("The wrong answer is yes", None),
        ("n/a", None),
        ("", None),
        ("A dog", None),
    ],
)
def test_yes_and_no(response, expected):
    assert read_yes_no(response) == expected


@pytest.mark.timeout(60)
@pytest.mark.parametrize("noise", ["*", " ", "\n", "(", "[", "1", "1,", "answer is ", "option "])
def test_degenerate_responses_take_linear_time(noise):
    """50,000 repetitions: a backtracking pattern would take hours."""
    response = "Well" + noise * 50_000 + "x"
    assert read_choice(response, OPTIONS) is None
    assert read_yes_no(response) is None
    assert read_list(response) is None
    read_number(response)


@pytest.mark.timeout(60)
def test_endlessly_repeated_option_takes_linear_time():
    assert read_choice("Well " + "A. dog " * 20_000, OPTIONS) == "A"


def test_lists():
    assert read_list("Between [2007,2008].") == "[2007, 2008]"
    assert read_list("[1] and then [1.50, 2]") == "[1.5, 2]"
    assert read_list("[a]") is None
    assert read_list("[{{}: 1}]") is None
    assert read_list("[" + "-" * 100_000 + "1]") is None
    assert read_list("2007 and 2008") is None
