"""The trained model's answers about held-out images, and how many are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image
from rich.progress import Progress

from solo_vlm.data.schema import Sample, parse_sample
from solo_vlm.data.sources import open_source
from solo_vlm.generate import Answerer
from solo_vlm.model.processing_solo import Message

_BATCH = 50


@dataclass(frozen=True)
class HeldOutAnswer:
    """A question about an image, the truth, and what the model said."""

    image: Image.Image
    question: str
    truth: str
    answer: str

    @property
    def right(self) -> bool:
        """Equal up to case and white space."""
        return " ".join(self.answer.lower().split()) == " ".join(self.truth.lower().split())


def answer_held_out(path: Path, answerer: Answerer, progress: Progress) -> list[HeldOutAnswer]:
    """Ask about every sample of a file; the last assistant turn is the truth and is not shown."""
    source = open_source(path)
    samples = [parse_sample(row) for unit in range(len(source)) for row in source.read(unit)]
    task = progress.add_task(path.stem, total=len(samples), figures="")
    answers = []
    for start in range(0, len(samples), _BATCH):
        batch = samples[start : start + _BATCH]
        chats = [_question(sample) for sample in batch]
        for sample, chat, answer in zip(batch, chats, answerer.answer(chats, max_new_tokens=40), strict=True):
            image = chat[0]["content"][0]["image"]
            truth, question = _text(sample.messages[-1]), _text(sample.messages[-2])
            answers.append(HeldOutAnswer(image, question, truth, answer))
        progress.update(task, completed=len(answers))
    progress.update(task, figures=f"{accuracy(answers):.1%} right")
    return answers


def accuracy(answers: Sequence[HeldOutAnswer]) -> float:
    """The share of right answers."""
    return sum(answer.right for answer in answers) / len(answers)


def _question(sample: Sample) -> list[Message]:
    """The chat without its last turn, the images in their places."""
    images = iter(sample.images)
    return [
        {
            **message,
            "content": [
                {"type": "image", "image": Image.open(BytesIO(_bytes(next(images))))}
                if part["type"] == "image"
                else part
                for part in message["content"]
            ],
        }
        for message in sample.messages[:-1]
    ]


def _bytes(image: bytes | str) -> bytes:
    return image if isinstance(image, bytes) else Path(image).read_bytes()


def _text(message: Message) -> str:
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")
