"""Synthetic rows in the hub schemas of the benchmarks, with their correct answers.

Column names and types are those of the data set cards of Lin-Chen/MMStar, lmms-lab/MME, lmms-lab/SEED-Bench,
lmms-lab/ai2d, lmms-lab/ScienceQA and AI4Math/MathVista, and of those that lmms-eval's task files of the other
benchmarks read.
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
USUAL = (
    *("pope", "mmmu_val", "chartqa", "docvqa_val", "infovqa_val", "textvqa_val", "vqav2_val", "ocrbench"),
    *("realworldqa", "hallusion_bench_image", "mmbench_en_dev"),
)
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
MMMU_DISCIPLINES = {
    "Art & Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health & Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities & Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech & Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
OCRBENCH_KINDS = {
    "Regular Text Recognition": 50,
    "Irregular Text Recognition": 50,
    "Artistic Text Recognition": 50,
    "Handwriting Recognition": 50,
    "Digit String Recognition": 50,
    "Non-Semantic Text Recognition": 50,
    "Scene Text-centric VQA": 200,
    "Doc-oriented VQA": 200,
    "Key Information Extraction": 200,
    "Handwritten Mathematical Expression Recognition": 100,
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
    if task == "hallusion_bench_image":
        return ("No", "Yes")[int(row["gt_answer"])]
    answers = row.get("answers", row.get("answer"))
    first = answers[0] if isinstance(answers, list) else answers
    return str(first["answer"] if isinstance(first, dict) else first)


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


def _pope(full: bool, image: Any) -> list[Row]:
    return [
        {
            "question_id": str(number // 3 + 1),
            "question": f"Is there a dog in picture {number}?",
            "answer": ("yes", "no")[number % 2],
            "image": image,
            "category": ("random", "popular", "adversarial")[number % 3],
        }
        for number in range(9000 if full else 12)
    ]


def _mmmu(full: bool, image: Any) -> list[Row]:
    subjects = [subject for subjects in MMMU_DISCIPLINES.values() for subject in subjects]
    rows = []
    for number in range(900 if full else 12):
        is_open = number // len(subjects) % 15 == 7 or number == 11
        rows.append(
            {
                "id": f"validation_{subjects[number % len(subjects)]}_{number // len(subjects) + 1}",
                "question": f"<image 1> What is in picture {number}?",
                "options": "[]" if is_open else str(list(ANIMALS)),
                "image_1": image,
                "image_2": None,
                "answer": f"{number / 4}" if is_open else LETTERS[number % 4],
                "question_type": "open" if is_open else "multiple-choice",
            }
        )
    return rows


def _short_answers(answers: Callable[[int], Row], size: int) -> Callable[[bool, Any], list[Row]]:
    """Return a maker of rows with a question, an image and the columns of `answers`."""

    def make(full: bool, image: Any) -> list[Row]:
        return [
            {"question": f"What is written on sign {number}?", "image": image, **answers(number)}
            for number in range(size if full else 12)
        ]

    return make


_document = _short_answers(
    lambda number: {
        "questionId": str(number),
        "answers": [f"Line {number}, {number * 7919}", f"line {number}"],
        "question_types": ["layout", "table/list"][: 1 + number % 2],
    },
    100,
)
_chart = _short_answers(
    lambda number: {"answer": str(number), "type": ("human_test", "augmented_test")[number % 2]}, 2500
)
_scene_text = _short_answers(
    lambda number: {"question_id": number, "answers": [f"sign {number}"] * 6 + ["shop"] * 4}, 100
)
_vqa = _short_answers(
    lambda number: {
        "question_id": number,
        "answer_type": ("yes/no", "number", "other")[number % 3],
        "answers": [
            {"answer": f"sign {number}", "answer_confidence": "yes", "answer_id": place + 1}
            for place in range(10)
        ],
    },
    100,
)


def _ocrbench(full: bool, image: Any) -> list[Row]:
    kinds = [kind for kind, size in OCRBENCH_KINDS.items() for _ in range(size if full else 1)]
    return [
        {
            "dataset": "HME100k" if "Expression" in kind else "IIIT5K",
            "question": "What is written in the image?",
            "question_type": kind,
            "answer": [f"a {number} b"],
            "image": image,
        }
        for number, kind in enumerate(kinds)
    ]


def _realworldqa(full: bool, image: Any) -> list[Row]:
    options = "\n".join(f"{letter}. {animal}" for letter, animal in zip(LETTERS, ANIMALS, strict=True))
    request = "Please answer directly with only the letter of the correct option and nothing else."
    return [
        {
            "question": f"How many dogs are in picture {number}?\nPlease answer directly with a number."
            if number % 6 == 5
            else f"Which animal is in picture {number}?\n{options}\n{request}",
            "answer": str(number) if number % 6 == 5 else LETTERS[number % 4],
            "image": image,
        }
        for number in range(765 if full else 12)
    ]


def _hallusion_bench(full: bool, image: Any) -> list[Row]:
    return [
        {
            "category": "VD",
            "subcategory": ("illusion", "chart")[number // 4 % 2],
            "visual_input": "1",
            "set_id": str(number // 8),
            "figure_id": str(number // 2 % 2),
            "question_id": str(number % 2),
            "question": f"Is line {number} longer?",
            "gt_answer_details": "made up",
            "gt_answer": str(number % 2),
            "image": image,
        }
        for number in range(951 if full else 16)
    ]


def _mmbench(full: bool, image: Any) -> list[Row]:
    questions = [2 + number % 3 for number in range(1443)] if full else [2, 3, 4]  # 4,329 rows, or 9
    return [
        {
            "index": number + 1_000_000 * rotation,
            "question": f"Which animal is in picture {number}?",
            "hint": "nan",
            **{
                letter: ANIMALS[(place + rotation) % size] if place < size else "nan"
                for place, letter in enumerate(LETTERS)
            },
            "answer": LETTERS[-rotation % size],
            "category": ("ocr", "object_localization")[number % 2],
            "L2-category": "coarse_perception",
            "image": image,
            "source": "made up",
            "split": "dev",
        }
        for number, size in enumerate(questions)
        for rotation in range(size)
    ]


_MAKERS = {
    "mmstar": _mmstar,
    "mme": _mme,
    "seedbench": _seedbench,
    "ai2d": _ai2d,
    "ai2d_no_mask": _ai2d,
    "scienceqa": _scienceqa,
    "scienceqa_full": _scienceqa_full,
    "mathvista": _mathvista,
    "pope": _pope,
    "mmmu_val": _mmmu,
    "chartqa": _chart,
    "docvqa_val": _document,
    "infovqa_val": _document,
    "textvqa_val": _scene_text,
    "vqav2_val": _vqa,
    "ocrbench": _ocrbench,
    "realworldqa": _realworldqa,
    "hallusion_bench_image": _hallusion_bench,
    "mmbench_en_dev": _mmbench,
}
