"""Synthetic rows in the hub schemas of the six benchmarks, with their correct answers.

Column names and types are those of the data set cards of Lin-Chen/MMStar, lmms-lab/MME, lmms-lab/SEED-Bench,
lmms-lab/ai2d, lmms-lab/ScienceQA and AI4Math/MathVista.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from solo_vlm.evaluate.predictions import Prediction, load_predictions, without_images
from solo_vlm.evaluate.scoring.score import Benchmark, Score

Row = dict[str, Any]

TASKS = ("mmstar", "mme", "seedbench", "ai2d", "scienceqa", "mathvista")
LETTERS = "ABCD"
ANIMALS = ("dog", "cat", "bird", "fish")

MMSTAR_AXES = {
    "coarse perception": ("image scene and topic", "image style & quality", "image emotion"),
    "fine-grained perception": ("object counting", "recognition", "localization"),
    "instance reasoning": (
        "single-instance reasoning",
        "cross-instance attribute reasoning",
        "cross-instance relation reasoning",
    ),
    "logical reasoning": ("code & sequence reasoning", "diagram reasoning", "common reasoning"),
    "science & technology": (
        "biology & chemistry & physics",
        "electronics & energy & mechanical eng.",
        "geography & earth science & agriculture",
    ),
    "math": ("geometry", "numeric commonsense and calculation", "statistical reasoning"),
}
MME_IMAGES = {
    "existence": 30,
    "count": 30,
    "position": 30,
    "color": 30,
    "posters": 147,
    "celebrity": 170,
    "scene": 200,
    "landmark": 200,
    "artwork": 200,
    "OCR": 20,
    "commonsense_reasoning": 70,
    "numerical_calculation": 20,
    "text_translation": 20,
    "code_reasoning": 20,
}
SEED_IMAGES, SEED_VIDEOS = 14_233, 3_757
MATHVISTA_TASKS = {
    "figure question answering": 269,
    "geometry problem solving": 208,
    "math word problem": 186,
    "textbook question answering": 158,
    "visual question answering": 179,
}
FLOATS = 40  # number of testmini's questions that ask for a decimal number


def make_rows(task: str, full: bool = False, image: Any = None) -> list[Row]:
    """Make rows of a task: as many as the benchmark has, or a few of each category.

    Args:
        task: Name on the command line.
        full: Whether to make all rows.
        image: Value of the image column in every row with an image; None puts "image".
    """
    return _MAKERS[task](full, "image" if image is None else image)


def rescore(benchmark: Benchmark, path: Path) -> Score:
    """Score saved predictions."""
    return benchmark.score(load_predictions(path))


def correct_response(task: str, row: Row) -> str:
    """Return the correct answer to a row, as a model would give it."""
    if task in ("ai2d", "ai2d_no_mask", "scienceqa", "scienceqa_full"):
        return LETTERS[int(row["answer"])]
    if task == "mathvista" and row["question_type"] == "multi_choice":
        return "ABCDEFGH"[row["choices"].index(row["answer"])]
    return str(row["answer"])


def predictions(task: str, answer: Callable[[Row], str], full: bool = False) -> list[Prediction]:
    """Return predictions for the rows of a task, each answered by a function of the row."""
    rows = make_rows(task, full)
    return [Prediction(str(n), answer(row), without_images(row)) for n, row in enumerate(rows)]


def oracle(task: str) -> Callable[[Row], str]:
    """Return a function that answers each row of a task correctly."""
    return lambda row: correct_response(task, row)


def _mmstar(full: bool, image: Any) -> list[Row]:
    rows: list[Row] = []
    for category, axes in MMSTAR_AXES.items():
        # Axes of different sizes: the mean over axes differs from the mean over questions.
        for axis in islice(cycle((axes[0], axes[0], *axes)), 250 if full else 5):
            correct = len(rows) % 4
            options = ", ".join(
                f"{letter}: {animal}" for letter, animal in zip(LETTERS, ANIMALS, strict=True)
            )
            rows.append(
                {
                    "index": len(rows),
                    "question": f"Which animal is in picture {len(rows)}?\nOptions: {options}",
                    "image": image,
                    "answer": LETTERS[correct],
                    "category": category,
                    "l2_category": axis,
                    "meta_info": {
                        "source": "made up",
                        "split": "val",
                        "image_path": f"images/{len(rows)}.jpg",
                    },
                }
            )
    return rows


def _mme(full: bool, image: Any) -> list[Row]:
    return [
        {
            "question_id": f"{category}/{number:04}.png",
            "image": image,
            "question": f"Is there a {animal} in picture {number}? Please answer yes or no.",
            "answer": answer,
            "category": category,
        }
        for category, images in MME_IMAGES.items()
        for number in range(images if full else 2)
        for animal, answer in (("dog", "Yes"), ("cat", "No"))
    ]


def _seedbench(full: bool, image: Any) -> list[Row]:
    kinds = ["image"] * (SEED_IMAGES if full else 18) + ["video"] * (SEED_VIDEOS if full else 3)
    return [
        {
            "answer": LETTERS[number % 4],
            **{f"choice_{letter.lower()}": animal for letter, animal in zip(LETTERS, ANIMALS, strict=True)},
            "data_id": f"{number}_0",
            "data_type": kind,
            "question_id": str(100_000 + number),
            "question_type_id": 1 + number % 9 if kind == "image" else 10 + number % 3,
            "image": [image] * (1 if kind == "image" else 3),
            "segment": None if kind == "image" else [0, 8],
            "question": f"Which animal is in picture {number}?",
        }
        for number, kind in enumerate(kinds)
    ]


def _ai2d(full: bool, image: Any) -> list[Row]:
    return [
        {
            "question": f"What does label {number} show?",
            "options": list(ANIMALS),
            "answer": str(number % 4),
            "image": image,
        }
        for number in range(3088 if full else 6)
    ]


def _scienceqa(full: bool, image: Any) -> list[Row]:
    return [row for row in _scienceqa_full(full, image) if row["image"] is not None]


def _scienceqa_full(full: bool, image: Any) -> list[Row]:
    with_image = 2017 if full else 6
    subjects = ("natural science", "social science", "language science")
    return [
        {
            "image": image if number < with_image else None,
            "question": f"Which animal is it, number {number}?",
            "choices": list(ANIMALS[: 2 + number % 3]),
            "answer": number % 2,
            "hint": "Look at the picture." if number % 4 == 0 else "",
            "task": "closed choice",
            "grade": f"grade{1 + number % 12}",
            "subject": subjects[number % 3],
            "topic": "biology",
            "category": "Animals",
            "skill": "Name animals",
            "lecture": "",
            "solution": "",
        }
        for number in range(4241 if full else 10)
    ]


def _mathvista(full: bool, image: Any) -> list[Row]:
    counts = MATHVISTA_TASKS if full else dict.fromkeys(MATHVISTA_TASKS, 4)
    tasks = [task for task, count in counts.items() for _ in range(count)]
    total = len(tasks)
    floats = set(range(0, total, total // FLOATS)) if full else {0, 7}
    return [
        {
            "pid": str(number + 1),
            "question": f"Question {number}?",
            "image": f"images/{number + 1}.jpg",
            "decoded_image": image,
            **_mathvista_answer(number, number in floats),
            "metadata": {
                "category": "general-vqa",
                "context": "natural image",
                "grade": "elementary school",
                "img_height": 32,
                "img_width": 32,
                "language": "english",
                "skills": ["arithmetic reasoning", "logical reasoning"][: 1 + number % 2],
                "source": "made up",
                "split": "testmini",
                "task": task,
            },
            "query": f"Hint: Answer with a value or an option.\nQuestion: Question {number}?",
        }
        for number, task in enumerate(tasks)
    ]


def _mathvista_answer(number: int, is_float: bool) -> Row:
    choices, precision = None, None
    if is_float:
        precision = 1.0 + number % 2
        answer, answer_type = f"{0.1 * (number % 40) + 1.25:.{int(precision)}f}", "float"
    elif number % 5 == 1:
        answer, answer_type = str(number), "integer"
    elif number % 97 == 3:
        answer, answer_type = f"[{number}, {number + 1}]", "list"
    else:
        choices = ["3/11", "8/11", "6/11", "3/5"]
        answer, answer_type = choices[number % 4], "text"
    return {
        "choices": choices,
        "unit": None,
        "precision": precision,
        "answer": answer,
        "question_type": "multi_choice" if choices else "free_form",
        "answer_type": answer_type,
    }


_MAKERS = {
    "mmstar": _mmstar,
    "mme": _mme,
    "seedbench": _seedbench,
    "ai2d": _ai2d,
    "ai2d_no_mask": _ai2d,
    "scienceqa": _scienceqa,
    "scienceqa_full": _scienceqa_full,
    "mathvista": _mathvista,
}
