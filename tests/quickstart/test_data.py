"""Toy data against independent measurements: pixels, connected components, files."""

import io
import re
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from solo_vlm.quickstart.data import (
    CAPTION_REQUEST,
    DIGIT_QUESTION,
    FAMILIES,
    SCHEMA,
    Scene,
    digit_splits,
    is_reserved,
    write_toy_data,
)
from solo_vlm.quickstart.data.files import ToySettings, draw_toy_data
from solo_vlm.quickstart.data.grids import GRIDS
from solo_vlm.quickstart.data.scenes import two_objects

COLORS = {
    "red": (220, 30, 40),
    "green": (40, 155, 60),
    "blue": (40, 80, 215),
    "yellow": (240, 210, 30),
    "purple": (140, 45, 165),
    "orange": (240, 125, 20),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five")
DIGITS = (*NUMBERS, "six", "seven", "eight", "nine")
SIZES = {"text": 2500, "stage1": 300, "stage2": 400, "stage3": 300, "sft": 400}
HELD_OUT = {"heldout_digits": 300, "heldout_captions": 60, "heldout_qa": 60}

seeds = st.integers(0, 2**32 - 1)


def draw(family: str, seed: int) -> Scene:
    return FAMILIES[family](np.random.default_rng(seed))


def coverage(image: Image.Image) -> np.ndarray:
    """Return a (height, width) mask of the pixels that clearly differ from the page."""
    pixels = np.asarray(image).astype(int)
    return np.abs(pixels - pixels[0, 0]).max(axis=-1) > 80


def color_name(image: Image.Image, where: np.ndarray) -> str:
    """Return the color nearest to the median of the pixels selected by `where`."""
    middle = np.median(np.asarray(image)[where], axis=0)
    return min(COLORS, key=lambda name: float(np.abs(middle - COLORS[name]).sum()))


def shape_name(mask: np.ndarray) -> str:
    """Return the shape of one component, from its holes, area and widths."""
    height, width = mask.shape
    holes = ndimage.label(~np.pad(mask, 1))[1] - 1
    if any((~mask[height // 3 : -height // 3, width // 3 : -width // 3]).ravel()) and (
        not mask[height // 2, width // 2]
    ):
        assert holes == 1
        return "ring"
    share = mask.mean()
    if share > 0.9:
        return "square"
    top, bottom = mask[: height // 5].mean(), mask[-(height // 5) :].mean()
    if bottom > 2 * top:
        return "triangle"
    return "circle" if share > 0.7 else "cross"


def things(image: Image.Image) -> list[tuple[str, str]]:
    """Return (color, shape) of each connected component, by rows, then by columns."""
    labels, count = ndimage.label(coverage(image))
    found = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        cell_row = (box[0].start + box[0].stop) // 2 // 28
        found.append((cell_row, box[1].start, color_name(image, labels == number), labels[box]))
    assert len(found) == count
    return [(color, shape_name(mask > 0)) for _, _, color, mask in sorted(found, key=_place)]


def _place(thing: tuple[int, int, str, np.ndarray]) -> tuple[int, int]:
    return thing[:2]


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_single_caption_matches_the_image(seed: int) -> None:
    scene = draw("single", seed)
    ((color, shape),) = things(scene.image)
    assert re.sub("^an? ", "", scene.caption) == scene.name == f"{color} {shape}"
    answers = dict(scene.questions)
    assert answers["What colour is it?"] == color
    assert answers["What shape is it?"] == shape


@settings(max_examples=100, deadline=None)
@given(seeds, st.booleans())
def test_pair_caption_matches_the_image(seed: int, reserved: bool) -> None:
    scene = two_objects(np.random.default_rng(seed), reserved)
    assert is_reserved(scene.caption) == reserved
    one, other = (" ".join(thing) for thing in things(scene.image))
    side_by_side = scene.image.width > scene.image.height
    relation = "left of" if side_by_side else "above"
    assert re.fullmatch(f"an? {one} {relation} an? {other}", scene.caption)
    answers = dict(scene.questions)
    first, last = ("on the left", "on the right") if side_by_side else ("at the top", "at the bottom")
    assert answers[f"What is {first}?"].endswith(f" {one}")
    assert answers[f"What is {last}?"].endswith(f" {other}")
    assert answers[f"Where is the {one}?"] == first
    assert answers[f"Where is the {other}?"] == last


@settings(max_examples=100, deadline=None)
@given(seeds)
def test_count_is_the_number_of_connected_components(seed: int) -> None:
    scene = draw("count", seed)
    seen = things(scene.image)
    (color, shape), count = seen[0], len(seen)
    assert set(seen) == {(color, shape)}
    shapes = "crosses" if shape == "cross" else f"{shape}s"
    expected = f"{NUMBERS[count]} {color} {shapes}" if count > 1 else f"{color} {shape}"
    assert re.sub("^an? ", "", scene.caption) == expected
    assert dict(scene.questions)["How many shapes are there?"] == NUMBERS[count]


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_chart_values_match_bar_heights_in_pixels(seed: int) -> None:
    scene = draw("chart", seed)
    columns = np.split(np.asarray(scene.image), 3, axis=1)
    bars = []
    for column in columns:
        middle = column[:-1, column.shape[1] // 2]  # without the axis
        saturated = np.ptp(middle.astype(int), axis=-1) > 60
        color = color_name(Image.fromarray(middle[None]), saturated[None])
        bars.append((color, saturated.sum()))
    unit = (scene.image.height - 2) / 5.25
    heights = [NUMBERS[round(pixels / unit)] for _, pixels in bars]
    names = [color for color, _ in bars]
    expected = ", ".join(f"{name} {height}" for name, height in zip(names, heights, strict=True))
    assert scene.caption == f"a bar chart: {expected}"
    answers = dict(scene.questions)
    for color, height in zip(names, heights, strict=True):
        assert answers[f"How high is the {color} bar?"] == height
    levels = [NUMBERS.index(height) for height in heights]
    for word, level in (("tallest", max(levels)), ("shortest", min(levels))):
        asked = answers.get(f"Which bar is the {word}?")
        assert asked == (names[levels.index(level)] if levels.count(level) == 1 else None)


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_word_has_one_letter_per_cell(seed: int) -> None:
    scene = draw("word", seed)
    word = scene.caption.removeprefix("the word ")
    answers = dict(scene.questions)
    assert answers["What does it say?"] == word
    assert answers["What is the first letter?"] == word[0]
    assert answers["What is the last letter?"] == word[-1]
    cells = np.split(coverage(scene.image), len(word), axis=1)
    assert all(cell.sum() > 15 for cell in cells)
    blank = scene.image.width // len(word)
    assert not coverage(scene.image)[:, blank - 1].any()  # no letter exceeds its cell


def test_equal_letters_look_alike_and_others_do_not() -> None:
    """The nearest neighbors among masks of first letters have the same letter."""
    letters, masks = [], []
    for seed in range(250):
        scene = draw("word", seed)
        cell = scene.image.crop((0, 0, scene.image.width // 3, scene.image.height))
        mask = coverage(cell)
        rows, columns = np.nonzero(mask)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        masks.append(np.asarray(cell.convert("L").crop(box).resize((16, 16)), dtype=float).ravel())
        letters.append(scene.name[0])
    distances = np.linalg.norm(np.array(masks)[:, None] - np.array(masks), axis=-1)
    np.fill_diagonal(distances, np.inf)
    nearest = distances.argmin(axis=1)
    right = np.mean([letters[i] == letters[j] for i, j in enumerate(nearest)])
    assert right > 0.97


@settings(max_examples=40, deadline=None)
def cells(image: Image.Image) -> dict[tuple[int, int], str]:
    """Return the names of things by row and column, from 0."""
    rows, columns = -(-image.height // 32), -(-image.width // 32)
    cell = image.height // rows
    found = {}
    for row, column in product(range(rows), range(columns)):
        left, top = column * cell, row * cell
        for thing in things(image.crop((left, top, left + cell, top + cell))):
            found[row, column] = " ".join(thing)
    return found


@settings(max_examples=150, deadline=None)
@given(seeds, st.sampled_from(tuple(GRIDS)))
def test_grid_answers_match_the_image(seed: int, draw_grid: Any) -> None:
    image, questions = draw_grid(np.random.default_rng(seed))
    drawn = cells(image)
    assert {-(-side // 32) for side in image.size} <= {3, 4}
    for question, answer in questions:
        if question == "Where is it?":
            ((row, column),) = drawn
            assert answer == f"row {NUMBERS[row + 1]}, column {NUMBERS[column + 1]}"
        elif counted := re.fullmatch(r"How many are in (row|column) (\w+)\?", question):
            axis, line = ("row", "column").index(counted[1]), NUMBERS.index(counted[2]) - 1
            assert len(set(drawn.values())) == 1
            assert answer == NUMBERS[sum(cell[axis] == line for cell in drawn)]
        else:
            across = len({row for row, _ in drawn}) == 1
            places = ("on the left", "in the middle", "on the right")
            if not across:
                places = ("at the top", "in the middle", "at the bottom")
            index = places.index(question.removeprefix("What is ").removesuffix("?"))
            assert re.sub("^an? ", "", answer) == drawn[sorted(drawn)[index]]


def test_no_quickstart_scene_asks_for_a_row_and_a_column() -> None:
    """Only counted and single shapes are on pages of rows and columns, and no question places them."""
    for seed, family in product(range(40), FAMILIES):
        scene = draw(family, seed)
        if min(-(-side // 32) for side in scene.image.size) > 1:
            asked = {question for question, _ in scene.questions}
            assert not [question for question in asked if re.search("left|right|top|bottom|Where", question)]


def test_grids_are_drawn_on_request(tmp_path: Path) -> None:
    draw_toy_data(tmp_path, ToySettings(grids=60, heldout_grids=30))
    assert {path.name for path in tmp_path.iterdir()} == {
        "grids.parquet",
        "heldout_grids.parquet",
        "toy.json",
    }
    known = {image["bytes"] for row in rows(tmp_path, "grids") for image in row["images"]}
    held_out = rows(tmp_path, "heldout_grids")
    assert not known & {image["bytes"] for row in held_out for image in row["images"]}
    assert len(list(texts(held_out[0], "user"))) == 1


def test_existing_files_of_other_kinds_stay(tmp_path: Path) -> None:
    (tmp_path / "sft.parquet").write_bytes(b"of somebody")
    draw_toy_data(tmp_path, ToySettings(text=5))
    assert (tmp_path / "sft.parquet").read_bytes() == b"of somebody"


@given(seeds, st.sampled_from(sorted(FAMILIES)))
def test_images_are_small_with_whole_cells(seed: int, family: str) -> None:
    image = draw(family, seed).image
    assert image.mode == "RGB"
    cell = np.gcd(*image.size)
    rows, columns = -(-image.height // 32), -(-image.width // 32)
    assert rows * columns <= 9
    assert image.width * rows == image.height * columns  # resizing to whole patches keeps aspect
    assert cell >= 28


def test_digit_split_is_fixed() -> None:
    from sklearn.datasets import load_digits

    train, held_out = digit_splits()
    assert (len(train.labels), len(held_out.labels)) == (1497, 300)
    scans = Counter(scan.tobytes() for scan in (*train.scans, *held_out.scans))
    data = load_digits()
    true = Counter((255 - image * 255 / 16).round().astype(np.uint8).tobytes() for image in data.images)
    assert scans == true
    assert not {s.tobytes() for s in train.scans} & {s.tobytes() for s in held_out.scans}
    counts = np.bincount(held_out.labels, minlength=10)
    assert counts.min() >= 28
    assert counts.max() <= 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    assert write_toy_data(folder, **SIZES, **without_digits()) == SIZES | HELD_OUT
    return folder


def without_digits() -> dict[str, int]:
    return {name: size for name, size in HELD_OUT.items() if name != "heldout_digits"}


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def texts(row: dict[str, Any], role: str = "assistant") -> Iterator[str]:
    for message in row["messages"]:
        if message["role"] == role:
            yield from (part["text"] for part in message["content"] if part["type"] == "text")


@pytest.mark.parametrize("name", sorted(SIZES | HELD_OUT))
def test_every_row_follows_the_schema(folder: Path, name: str) -> None:
    file = pq.ParquetFile(folder / f"{name}.parquet")
    assert file.schema_arrow.equals(SCHEMA)
    assert file.metadata.row_group(0).num_rows <= 256
    read = rows(folder, name)
    assert len({row["id"] for row in read}) == len(read)
    for row in read:
        roles = [message["role"] for message in row["messages"]]
        chat = name == "sft" or name.startswith("heldout")
        assert roles == (["user", "assistant"] * (len(roles) // 2) if chat else ["assistant"])
        parts = [part for message in row["messages"] for part in message["content"]]
        assert sum(part["type"] == "image" for part in parts) == len(row["images"])
        assert all(part["text"] for part in parts if part["type"] == "text")
        assert row["messages"][-1]["content"][-1]["text"]
        for image in row["images"]:
            decoded = Image.open(io.BytesIO(image["bytes"]))
            decoded.load()
            assert decoded.mode == "RGB"


def test_sft_has_multi_turn_and_text_only_chats(folder: Path) -> None:
    read = rows(folder, "sft")
    assert {len(row["messages"]) // 2 for row in read} == {1, 2, 3}
    assert any(not row["images"] for row in read)
    requests = [next(texts(row, "user")) for row in read]
    assert CAPTION_REQUEST in requests
    assert DIGIT_QUESTION in requests


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    sizes = dict.fromkeys(SIZES, 40) | dict.fromkeys(without_digits(), 10)
    for out, seed in (("one", 3), ("two", 3), ("three", 4)):
        write_toy_data(tmp_path / out, seed, **sizes)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(f"{name}.parquet" for name in SIZES | HELD_OUT)
    for name in names:
        one, two, three = ((tmp_path / out / name).read_bytes() for out in ("one", "two", "three"))
        assert one == two
        assert (one == three) == name.startswith("heldout")


def test_no_held_out_image_is_in_training(folder: Path) -> None:
    seen, hidden = (
        {image["bytes"] for name in names for row in rows(folder, name) for image in row["images"]}
        for names in (SIZES, HELD_OUT)
    )
    assert len(hidden) == sum(HELD_OUT.values())
    assert not seen & hidden


def test_reserved_pairs_are_only_held_out(folder: Path) -> None:
    pair = re.compile(r"\ban? \w+ \w+ (?:left of|above) an? \w+ \w+")
    for name in SIZES:
        both = [texts(row, role) for row in rows(folder, name) for role in ("user", "assistant")]
        found = {caption for part in both for text in part for caption in pair.findall(text)}
        assert not [caption for caption in found if is_reserved(caption)]
        assert name == "stage1" or len(found) > 20
    captions = [text for row in rows(folder, "heldout_captions") for text in texts(row)]
    pairs = [caption for caption in captions if pair.fullmatch(caption)]
    assert sum(map(is_reserved, pairs)) == len(pairs) // 2 == 6


def test_corpus_contains_the_words_of_captions_and_answers(folder: Path) -> None:
    def words(name: str) -> set[str]:
        return {w.strip(".,:?") for row in rows(folder, name) for t in texts(row) for w in t.split()}

    corpus = words("text")
    missing = {name: words(name) - corpus for name in SIZES | HELD_OUT}
    assert not any(missing.values()), missing


def test_held_out_digits_are_the_scans_with_their_labels(folder: Path) -> None:
    _, held_out = digit_splits()
    for row, scan, label in zip(rows(folder, "heldout_digits"), held_out.scans, held_out.labels, strict=True):
        assert list(texts(row, "user")) == [DIGIT_QUESTION]
        assert list(texts(row)) == [DIGITS[label]]
        image = Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("L")
        small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert np.corrcoef(small.ravel(), scan.astype(float).ravel())[0, 1] > 0.9
