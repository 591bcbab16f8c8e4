"""Converters of the formats of others, on rows as people have them, with samples written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from solo_vlm.data.formats.row_format import RowFormat
from solo_vlm.data.sample import SampleError, parse_sample


def shown(row: dict[str, Any]) -> str:
    """Return a sample as `role:text|role:text`, with each image as <its source>."""
    sample = parse_sample(row)
    images = iter(sample.images)
    return "|".join(
        f"{message['role'][0]}:"
        + "".join(
            part["text"] if part["type"] == "text" else f"<{next(images)}>" for part in message["content"]
        )
        for message in sample.messages
    )


def turns(*texts: str, user: str = "human", assistant: str = "gpt") -> list[dict[str, str]]:
    return [{"from": assistant if n % 2 else user, "value": text} for n, text in enumerate(texts)]


def messages(*texts: Any, user: str = "user", assistant: str = "assistant") -> list[dict[str, Any]]:
    return [{"role": assistant if n % 2 else user, "content": text} for n, text in enumerate(texts)]


ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("llava", {"id": 7, "image": "a.jpg", "conversations": turns("<image>\nWhat?", "A cat.")},
     "u:<a.jpg>What?|a:A cat."),
    ("llava", {"image": "a.jpg", "conversations": turns("What?\n<image>", "A cat.")},
     "u:What?<a.jpg>|a:A cat."),
    ("llava", {"image": "a.jpg", "conversations": turns("What?", "A cat.")}, "u:<a.jpg>What?|a:A cat."),
    ("llava", {"id": "t", "conversations": turns("2 + 2?", "4")}, "u:2 + 2?|a:4"),
    ("llava", {"image": None, "conversations": turns("2 + 2?", "4")}, "u:2 + 2?|a:4"),
    ("llava", {"image": "", "conversations": turns("2 + 2?", "4")}, "u:2 + 2?|a:4"),
    ("llava", {"image": ["a.jpg", "b.jpg"], "conversations": turns("<image> or <image>?", "The first.")},
     "u:<a.jpg>or<b.jpg>?|a:The first."),
    ("llava", {"images": ["a.jpg"], "conversations": turns("Hi", "Hello", "<image>And now?", "Bye")},
     "u:Hi|a:Hello|u:<a.jpg>And now?|a:Bye"),
    ("sharegpt", {"system": "Be brief.", "conversations": turns("Hi", "Hello")}, "s:Be brief.|u:Hi|a:Hello"),
    ("sharegpt", {"conversations": turns("Hi", "Hello", user="user", assistant="chatgpt"), "lang": "en"},
     "u:Hi|a:Hello"),
    ("sharegpt", {"conversations": [{"from": "system", "value": "Be brief."}, *turns("Hi", "Hello")]},
     "s:Be brief.|u:Hi|a:Hello"),
    ("chatml", {"messages": messages("<image>What?", "A cat."), "images": ["a.jpg"]},
     "u:<a.jpg>What?|a:A cat."),
    ("chatml", {"messages": messages("What?", "A cat."), "images": ["a.jpg"]}, "u:<a.jpg>What?|a:A cat."),
    ("chatml", {"conversations": messages("Hi", "Hello", user="Human", assistant="model")}, "u:Hi|a:Hello"),
    ("chatml", {"messages": messages([{"type": "image_url", "image_url": {"url": "https://x/a.png"}},
                                      {"type": "text", "text": "What?"}], "A cat.", user="human")},
     "u:<https://x/a.png>What?|a:A cat."),
    ("cauldron", {"images": ["a.jpg"], "texts": [{"user": "What?", "assistant": "A cat.", "source": "x"},
                                                  {"user": "Sure?", "assistant": "Yes."}]},
     "u:<a.jpg>What?|a:A cat.|u:Sure?|a:Yes."),
    ("finevision", {"images": [], "texts": [{"user": "2 + 2?", "assistant": "4"}], "relevance_min": 5},
     "u:2 + 2?|a:4"),
    ("finevision", {"images": ["a.jpg", "b.jpg"], "relevance_ratings": [5],
                    "texts": [{"user": "<image> or <image>?", "assistant": "A"}]}, "u:<a.jpg>or<b.jpg>?|a:A"),
    ("instruction", {"query": "<image>What?", "response": "A cat.", "images": ["a.jpg"]},
     "u:<a.jpg>What?|a:A cat."),
    ("instruction", {"query": "And?", "response": "B", "history": [["Hi", "A"]], "system": "Be brief."},
     "s:Be brief.|u:Hi|a:A|u:And?|a:B"),
    ("instruction", {"instruction": "Translate:", "input": "un chat", "output": "a cat"},
     "u:Translate:\nun chat|a:a cat"),
    ("instruction", {"instruction": "Say hi", "input": "", "output": "hi"}, "u:Say hi|a:hi"),
    ("instruction", {"image": "a.jpg", "question": "What?", "answer": "A cat.", "split": "train"},
     "u:<a.jpg>What?|a:A cat."),
    ("instruction", {"prompt": messages("What?"), "completion": [{"role": "assistant", "content": "A cat."}],
                     "images": ["a.jpg"]}, "u:<a.jpg>What?|a:A cat."),
    ("captions", {"image": "a.jpg", "caption": "A cat."}, "a:<a.jpg>A cat."),
    ("captions", {"file_name": "a.jpg", "text": "A cat.", "width": 32}, "a:<a.jpg>A cat."),
    ("captions", {"image_url": "https://x/a.jpg", "caption": "A cat.", "transcripts": ["a", "b"]},
     "a:<https://x/a.jpg>A cat."),
    ("captions", {"images": ["a.jpg", "b.jpg"], "text": "From <image>\nto <image>, at night."},
     "a:From<a.jpg>to<b.jpg>, at night."),
    ("captions", {"image": "a.jpg", "text": "<image>\nA cat."}, "a:<a.jpg>A cat."),
    ("text", {"text": "The tag <image> is no HTML."}, "a:The tag <image> is no HTML."),
    ("text", {"text": "Once upon a time.", "meta": {"source": "books"}}, "a:Once upon a time."),
]  # fmt: skip


TAR_ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("webdataset", {"image": ["a", "b"], "txt": "A cat."}, "a:<a><b>A cat."),
    ("webdataset", {"image": ["a", "b"], "txt": "From <image> to <image>."}, "a:From<a>to<b>."),
    ("webdataset", {"image": ["a"], "conversations": messages("<image>What?", "A cat.")},
     "u:<a>What?|a:A cat."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "expected"), [*ROWS, *TAR_ROWS])
def test_row_becomes_the_sample_that_its_author_meant(name, row, expected):
    assert shown(RowFormat(name)(row)) == expected


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("llava", {"conversations": turns("<image>\nWhat?", "A cat.")}, "image-count"),
        ("llava", {"image": ["a", "b"], "conversations": turns("<image>\nWhat?", "A")}, "image-count"),
        ("llava", {"image": "a", "images": ["b"], "conversations": turns("What?", "A")}, "image-count"),
        ("llava", {"photo": "a.jpg", "conversations": turns("What?", "A")}, "image-column"),
        ("llava", {"video": "a.mp4", "conversations": turns("What?", "A")}, "media"),
        ("llava", {"conversations": turns("What?", "A", user="observation")}, "role"),
        ("llava", {"conversations": turns("What?", "")}, "text-empty"),
        ("llava", {"conversations": []}, "no-answer"),
        ("llava", {"conversations": turns("What?")}, "no-answer"),
        ("llava", {"image": [None], "conversations": turns("What?", "A")}, "image-missing"),
        ("llava", {"image": 3, "conversations": turns("What?", "A")}, "image-path"),
        ("llava", ["no", "object"], "json"),
        ("chatml", {"messages": messages("What?", None)}, "text"),
        ("cauldron", {"images": [], "texts": [{"user": "Q", "assistant": "A"}]}, "image-missing"),
        (
            "finevision",
            {"images": ["a", "b"], "texts": [{"user": "<image>?", "assistant": "A"}]},
            "image-count",
        ),
        ("instruction", {"question": "Q", "answer": "A", "query": "Q", "response": "A"}, "raw-schema"),
        ("instruction", {"question": "Q", "answer": 2}, "raw-schema"),
        ("instruction", {"question": "Q", "answer": ["a", "b"]}, "raw-schema"),
        ("text", {"text": "Hi", "audio": {"bytes": b"RIFF", "path": None}}, "media"),
        ("captions", {"text": "Hi", "image": "a.png", "video": "a.mp4"}, "media"),
        ("instruction", {"question": "Q", "answer": "B", "choices": ["x", "y"]}, "raw-schema"),
        ("questions", {"question": "Q", "answer": []}, "no-answer"),
        ("questions", {"question": "Q", "answer": True}, "text"),
        ("questions", {"question": "Q", "answer": " "}, "text-empty"),
        ("questions", {"question": "Q"}, "raw-schema"),
        ("questions", {"question": "Q", "answer": "z", "options": ["x", "y"]}, "no-answer"),
        ("questions", {"question": "Q", "answer": ["A", "B"], "options": ["x", "y"]}, "no-answer"),
        ("questions", {"question": "Q", "answer": "C", "options": ["x", "y"]}, "no-answer"),
        ("questions", {"question": "Q", "answer": "x", "options": ["x", "x"]}, "no-answer"),
        ("questions", {"question": "Q", "answer": "x", "options": "x, y"}, "raw-schema"),
        ("captions", {"image": "a.jpg", "caption": ["one", "two"]}, "raw-schema"),
        ("captions", {"image": "a.jpg", "caption": "one", "text": "two"}, "raw-schema"),
        ("captions", {"image": None, "caption": "one"}, "image-missing"),
        ("captions", {"image": "a.jpg", "caption": "<image>"}, "text-empty"),
        ("captions", {"image": "a.jpg", "caption": "From <image> to <image>."}, "image-count"),
        ("text", {"text": "A cat.", "photo": "a.jpg"}, "image-column"),
    ],
)
def test_ambiguous_or_broken_row_is_rejected_with_a_reason(name, row, reason):
    with pytest.raises(SampleError) as error:
        RowFormat(name)(row)
    assert error.value.reason == reason


LETTERS = "A. cat\nB. dog\nAnswer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("row", "expected", "answers", "metric"),
    [
        ({"image": "a.jpg", "question": "What?", "answer": "cat"}, "u:<a.jpg>What?|a:cat", ["cat"], None),
        ({"question": "2 + 2?", "answer": 4}, "u:2 + 2?|a:4", ["4"], "number"),
        ({"question": "Where?", "answer": ["UK", "United Kingdom"]}, "u:Where?|a:UK",
         ["UK", "United Kingdom"], None),
        ({"image": "a.jpg", "question": "Name?", "answer": "Al", "metric": "anls"}, "u:<a.jpg>Name?|a:Al",
         ["Al"], "anls"),
        ({"images": ["a.jpg", "b.jpg"], "question": "<image> or <image>?", "answer": "first"},
         "u:<a.jpg>or<b.jpg>?|a:first", ["first"], None),
        ({"image": "a.jpg", "question": "What?", "answer": "dog", "options": ["cat", "dog"]},
         f"u:<a.jpg>What?\n{LETTERS}|a:B", ["B"], "choice"),
        ({"question": "What?", "answer": "A", "options": ["cat", "dog"]}, f"u:What?\n{LETTERS}|a:A", ["A"],
         "choice"),
        ({"question": "What?", "answer": "A", "options": ["B", "A"]},
         "u:What?\nA. B\nB. A\n" + LETTERS.rpartition("\n")[2] + "|a:B", ["B"], "choice"),
    ],
)  # fmt: skip
def test_questions_keep_accepted_answers_and_list_options(row, expected, answers, metric):
    converted = RowFormat("questions")(row)
    assert shown(converted) == expected
    assert (converted["answers"], converted["metric"]) == (answers, metric)
