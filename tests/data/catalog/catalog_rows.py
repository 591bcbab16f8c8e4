"""Typical raw row of every data set, in its original format, and the text of the resulting sample.

Roles are abbreviated: u(ser), a(ssistant), s(ystem). <> is an image.
"""

from __future__ import annotations

from typing import Any

JPEG = b"\xff\xd8\xff\xe0 a photograph"

# Images that rows refer to by path.
FILES = (
    "000000012.jpg",
    "GCC_train_000000012.jpg",
    "allava_laion/images/100277305.jpeg",
    "allava_vflan/images/images_191task_1k/VQA_counting_1.jpg",
    "coco/train2017/000000033471.jpg",
    "sam/images/sa_1.jpg",
    "gqa/images/2327515.jpg",
    "cauldron/vqav2_7.jpg",
)


def llava(image: str, *texts: str) -> dict[str, Any]:
    turns = [{"from": "gpt" if number % 2 else "human", "value": text} for number, text in enumerate(texts)]
    return {"id": "row-1", "image": image, "conversations": turns}


def cauldron(question: str, answer: str, source: str) -> dict[str, Any]:
    return {
        "images": [{"bytes": JPEG, "path": None}],
        "texts": [{"user": question, "assistant": answer, "source": source}],
    }


def _short(question: str) -> str:
    return f"{question}\nGive a very brief answer."


PRETRAINING: dict[str, tuple[dict[str, Any], str]] = {
    "imagenet-21k": (
        {"key": "n02084071_1234", "jpg": JPEG, "cls": b"1", "json": b'{"filename": "n02084071_1234.JPEG"}'},
        "a:<>dog",
    ),
    "slimpajama": (
        {"text": "A theorem.\n\nIts proof.", "meta": {"redpajama_set_name": "RedPajamaArXiv"}},
        "a:A theorem.\n\nIts proof.",
    ),
    "capfusion": (
        {
            "key": "000000012",
            "jpg": JPEG,
            "txt": "A red fox in the snow near Oslo.",
            "json": b'{"url": "https://x/1.jpg", "status": "success"}',
        },
        "a:<>A red fox in the snow near Oslo.",
    ),
    "websight": (
        {
            "image": {"bytes": JPEG, "path": None},
            "text": "<html>\n<body class='p-4'>Shop</body>\n</html>",
            "llm_generated_idea": "A shop.",
        },
        "a:<><html>\n<body class='p-4'>Shop</body>\n</html>",
    ),
    "cc3m": (
        {"key": "000000012", "jpg": JPEG, "txt": "a very typical bus station", "json": b"{}"},
        "a:<>a very typical bus station",
    ),
    "detailed-captions": (
        {"img_id": "000000012", "detailed_caption": "A man stands in front of a bus."},
        "a:<>A man stands in front of a bus.",
    ),
    "llavar": (
        llava(
            "GCC_train_000000012.jpg", "Identify any text visible in the image.\n<image>", "THE ART OF WAR"
        ),
        "a:<>THE ART OF WAR",
    ),
    "dvqa": (
        cauldron("Which bar has the largest value?\nAnswer briefly.", "item", "dvqa"),
        "a:<>Which bar has the largest value?\nAnswer briefly.\nitem",
    ),
    "ocr-vqa": (
        cauldron("Who wrote this book?", "Sandra Boynton.", "ocrvqa"),
        "a:<>Who wrote this book?\nSandra Boynton.",
    ),
    "figureqa": (
        cauldron("Is Blue the maximum?", "No.", "figureqa"),
        "a:<>Is Blue the maximum?\nNo.",
    ),
    "allava-laion": (
        llava("allava_laion/images/100277305.jpeg", "<image>\nPlease depict the image.", "A silver ring.")
        | {"url": "https://x/ring.jpg"},
        "a:<>Please depict the image.\nA silver ring.",
    ),
    "allava-vflan": (
        llava(
            "allava_vflan/images/images_191task_1k/VQA_counting_1.jpg",
            "<image>\nWhat could be the occasion for this gathering?",
            "A party among friends.",
        ),
        "a:<>What could be the occasion for this gathering?\nA party among friends.",
    ),
}

_FROM_THE_CAULDRON = {
    "localized-narratives": (
        "Describe this image.",
        "In the picture I can see a dog.",
        "localized_narratives",
    ),
    "vsr": ("Is the caption true? The cat is behind the box.\nAnswer yes or no.", "No.", "vsr"),
    "tqa": ("What is part C?\nChoices:\nA. Crust.\nB. Mantle.", "Answer: B", "tqa"),
    "scienceqa": ("Which is farthest north?\nChoices:\nA. Maine.\nB. Utah.", "Answer: A", "scienceqa"),
    "iconqa": ("How many stars are there?\nChoices: 3, 4", "4.", "iconqa"),
    "tabmwp": (_short("How much more did Tom pay?"), "$2.10", "tabmwp"),
    "chartqa": (_short("What is the value of the leftmost bar?"), "13.", "chartqa"),
    "vistext": ("Summarize this chart.", "This bar plot shows rents.", "vistext"),
    "chart2text": ("Explain this chart.", "Sales rose to 1,240 million.", "chart2text"),
    "dvqa-sft": (_short("What is the label of the second bar?"), "post", "dvqa"),
    "figureqa-sft": ("Does Red intersect Green?\nYes or no.", "Yes.", "figureqa"),
    "diagram-image-to-text": ("Explain the diagram.", "Start leads to step 1.", "diagram_image_to_text"),
    "infographicvqa": (_short("Which country has the most users?"), "India", "infographic_vqa"),
    "st-vqa": (_short("What does the sign say?"), "Stop", "st_vqa"),
    "textcaps": ("Write a caption that uses the text.", "A bottle labeled Ale.", "textcaps"),
    "textvqa": (_short("What brand is it?"), "Nokia", "textvqa"),
    "ocr-vqa-sft": ("What is the genre of this book?", "Travel.", "ocrvqa"),
    "rendered-text": ("Transcribe the text.", "the quick brown fox", "rendered_text"),
    "hateful-memes": ("Is this meme hateful? Its text: hello", "No.", "hateful_memes"),
    "okvqa": (_short("What sport can you use this for?"), "Race.", "okvqa"),
    "aokvqa": ("What is the man waiting for?\nChoices: bus, taxi", "Answer: taxi", "aokvqa"),
    "tallyqa": (_short("How many sheep are there?"), "12.", "tallyqa"),
    "visual7w": ("Where is the cat?\nChoices:\nA. Bed.\nB. Sofa.", "Answer: B", "visual7w"),
    "cocoqa": (_short("What is the color of the car?"), "Red.", "cocoqa"),
    "vqav2": (_short("Is it raining?"), "Yes.", "vqav2"),
}

FINETUNING: dict[str, tuple[dict[str, Any], str]] = {
    "codeact-general": (
        {
            "id": "openorca_1",
            "conversations": [
                {"role": "system", "content": "You are helpful."},
                {"role": "user", "content": "2 + 2?"},
                {"role": "assistant", "content": "4"},
            ],
        },
        "s:You are helpful.|u:2 + 2?|a:4",
    ),
    "ultrainteract": (
        {
            "task": "Math_CoT",
            "dataset": "gsm8k",
            "instruction": "Solve the following math problem step-by-step.\nHow many?",
            "response": "Step 1: ...\n\\boxed{4}",
            "id": "gsm8k_1",
            "parent_id": "root",
        },
        "u:Solve the following math problem step-by-step.\nHow many?|a:Step 1: ...\n\\boxed{4}",
    ),
    "ultrachat": (
        {
            "prompt": "Tell a joke.",
            "prompt_id": "ab12",
            "messages": [
                {"content": "Tell a joke.", "role": "user"},
                {"content": "Why ...", "role": "assistant"},
                {"content": "Another.", "role": "user"},
                {"content": "When ...", "role": "assistant"},
            ],
        },
        "u:Tell a joke.|a:Why ...|u:Another.|a:When ...",
    ),
    "lvis-instruct4v": (
        llava(
            "coco/train2017/000000033471.jpg", "<image>\nWhat color is the bus?", "Red.", "And it says?", "5"
        ),
        "u:<>What color is the bus?|a:Red.|u:And it says?|a:5",
    ),
    "sharegpt4v": (
        llava("sam/images/sa_1.jpg", "What do you see?\n<image>", "A harbor at dusk."),
        "u:What do you see?<>|a:A harbor at dusk.",
    ),
    "laion-gpt4v": (
        {
            "caption": "A poster of a lighthouse.",
            "link": "https://x/p.png",
            "message_id": "117",
            "timestamp": "2023-11-09",
        },
        "u:<>Describe this image in detail.|a:A poster of a lighthouse.",
    ),
    **{name: (cauldron(*row), f"u:<>{row[0]}|a:{row[1]}") for name, row in _FROM_THE_CAULDRON.items()},
    "gqa": (
        llava("gqa/images/2327515.jpg", "<image>\nAre there scarves?\nAnswer with a single word.", "Yes"),
        "u:<>Are there scarves?\nAnswer with a single word.|a:Yes",
    ),
    "release-sft": (
        {
            "image": "cauldron/vqav2_7.jpg",
            "conversations": [{"from": "human", "value": "Is it raining?\n<image>"}, "Yes."],
        },
        "u:Is it raining?<>|a:Yes.",
    ),
}

OPEN: dict[str, tuple[dict[str, Any], str]] = {
    "imagenet-1k": ({"image": {"bytes": JPEG, "path": "x.JPEG"}, "label": "goldfish"}, "a:<>goldfish"),
    "fineweb-edu": ({"text": "A theorem.", "id": "<urn:uuid:1>", "url": "https://x"}, "a:A theorem."),
    "cc3m-wds": ({"key": "000000012", "jpg": JPEG, "txt": "a fox"}, "a:<>a fox"),
    "cc12m-wds": ({"key": "000000012", "jpg": JPEG, "txt": "a fox"}, "a:<>a fox"),
    "pixmo-cap": (
        {
            "image": {"bytes": JPEG, "path": None},
            "image_url": "https://x/1.jpg",
            "caption": "A fox in the snow.",
            "transcripts": ["so there is a fox"],
        },
        "a:<>A fox in the snow.",
    ),
    "llava-onevision-mid": ({"image": {"bytes": JPEG}, "caption": "A fox."}, "a:<>A fox."),
    "finevision": (
        {**cauldron("How many bars?", "3", "chartqa"), "relevance_ratings": [5], "relevance_min": 5},
        "u:<>How many bars?|a:3",
    ),
    "llava-next": (
        {**llava("", "<image>\nWhat is it?", "A fox."), "image": {"bytes": JPEG}, "data_source": "x"},
        "u:<>What is it?|a:A fox.",
    ),
    "llava-onevision-instruct": (
        {**llava("", "<image>\nWhat is it?", "A fox."), "image": {"bytes": JPEG}},
        "u:<>What is it?|a:A fox.",
    ),
    "smoltalk": (
        {
            "messages": [{"content": "2 + 2?", "role": "user"}, {"content": "4", "role": "assistant"}],
            "source": "x",
        },
        "u:2 + 2?|a:4",
    ),
}

USUAL = PRETRAINING | FINETUNING | OPEN
