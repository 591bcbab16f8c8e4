"""Field values of rows: texts, IDs and images in any form."""

from __future__ import annotations

import base64

import pytest
from PIL import Image
from tests.factories import png

from solo_vlm.data.sample import parse_sample
from solo_vlm.data.values import (
    OutsidePathError,
    check_text,
    load_json,
    locate_images,
    looks_like_image,
    natural_key,
    printable,
)
from solo_vlm.models.solo.image_loading_solo import load_image


def test_names_sort_numerically():
    names = [f"{folder}/img{number}.png" for folder in ("A", "b2", "b10") for number in range(12)]
    assert sorted(sorted(names), key=natural_key) == names


@pytest.mark.parametrize("text", ["", "café", "\U0001f600", "nul \0"])
def test_valid_text_is_unchanged(text):
    assert check_text(text) == printable(text) == text


@pytest.mark.parametrize(("text", "place"), [("\ud83d", 0), ("ab\udcff", 2), ("\ude00\ud83d", 0)])
def test_lone_surrogates_are_reported(text, place):
    with pytest.raises(ValueError, match=rf"character {place} \('\\ud") as error:
        check_text(text)
    str(error.value).encode()
    assert "\\ud" in printable(text)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", b"\xff", ""])
def test_unreadable_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        load_json(text)


RED = png(Image.new("RGB", (8, 8), "red"))


def row(part: dict | None = None, **columns: object) -> dict:
    content = [part or {"type": "image"}, {"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": content}], **columns}


PLACES = {
    "path": lambda v: row({"type": "image", "path": v}),
    "image": lambda v: row({"type": "image", "image": v}),
    "image struct": lambda v: row({"type": "image", "image": {"bytes": None, "path": v}}),
    "url": lambda v: row({"type": "image", "url": v}),
    "image_url": lambda v: row({"type": "image_url", "image_url": v}),
    "image_url.url": lambda v: row({"type": "image_url", "image_url": {"url": v}}),
    "images": lambda v: row(images=[v]),
    "images.path": lambda v: row(images=[{"path": v}]),
    "images.bytes and path": lambda v: row(images=[{"bytes": None, "path": v}]),
    "images.url": lambda v: row(images=[{"url": v}]),
    "row image": lambda v: row(image=v),
    "row image.path": lambda v: row(image={"bytes": None, "path": v}),
    "row image list": lambda v: row(image=[v]),
    "message images": lambda v: {"messages": [{"role": "user", "content": "What?", "images": [v]}]},
}


def located(place: str, value: str, folder: object) -> object:
    (image,) = parse_sample(locate_images(PLACES[place](value), str(folder))).images
    return image


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Return the folder of the rows; the working directory has another image of the same name."""
    for name, color in (("rows", "red"), ("elsewhere", "blue")):
        (tmp_path / name / "sub").mkdir(parents=True)
        for file in ("color.png", "sub/x y#1.png", "a" * 48):
            Image.new("RGB", (8, 8), color).save(tmp_path / name / file, "PNG")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "rows"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "name",
    ["color.png", "./sub/../color.png", "sub/x y#1.png", "file:color.png", "file://color.png", "a" * 48],
)
def test_relative_path_refers_to_the_folder_of_the_row(folders, place, name):
    assert load_image(located(place, name, folders)).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("place", PLACES)
def test_absolute_path_and_file_url_are_kept(folders, place):
    path = str(folders / "sub" / "x y#1.png")
    quoted = path.replace(" ", "%20").replace("#", "%23")
    for name in (path, f"file://{quoted}", f"file://localhost{quoted}", f"FILE:{quoted}", f"file://{path}"):
        assert load_image(located(place, name, "/nowhere")).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000"])
def test_base64_of_any_format_is_an_image(folders, place, file_format, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image", file_format)
    text = base64.b64encode((tmp_path / "image").read_bytes()).decode()
    for value in (text, text.rstrip("="), "\n".join([text[:60], text[60:]]), f"data:image/x;base64,{text}"):
        image = load_image(located(place, value, folders))
        assert image.size == (40, 30)


def test_base64_part_and_bytes_of_json_are_base64(folders):
    text = base64.b64encode(RED).decode()
    for given in (row({"type": "image", "base64": text}), row(images=[{"bytes": text}])):
        (image,) = parse_sample(locate_images(given, str(folders))).images
        assert load_image(image).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "url", ["https://x/a.png", "http://x/a b.png", "s3://bucket/a.png", "data:image/png;base64,AA"]
)
@pytest.mark.parametrize("place", PLACES)
def test_urls_are_kept(place, url):
    assert located(place, url, "/rows") == url


def test_paths_in_a_remote_file_refer_to_its_folder():
    hashed = "0123456789abcdef" * 4
    text = base64.b64encode(RED).decode()
    for place in PLACES:
        assert located(place, "a.png", "s3://bucket/rows") == "s3://bucket/rows/a.png"
        assert located(place, hashed, "s3://bucket/rows") == f"s3://bucket/rows/{hashed}"
        assert located(place, text, "s3://bucket/rows") == f"data:;base64,{text}"


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"messages": 3},
        {"messages": [3, {"content": ["x", 3, {"path": 3}]}]},
        {"images": 3},
        {"image": [[["a"]]]},
    ],
)
def test_rows_of_another_format_are_left_to_schema_validation(odd):
    assert locate_images(odd, "/rows") == odd


@pytest.mark.parametrize("empty", [None, "", float("nan")])
@pytest.mark.parametrize("key", ["bytes", "image", "base64"])
def test_empty_struct_fields_are_skipped(folders, key, empty):
    shown = locate_images(row(images=[{key: empty, "path": "color.png"}]), str(folders))
    assert parse_sample(shown).images == [str(folders / "color.png")]


@pytest.mark.parametrize(
    "value", [[None, "cat.jpg"], [float("nan"), RED], {"bytes": float("nan"), "path": "cat.jpg"}, [[RED]]]
)
def test_image_after_empty_values_is_recognized(value):
    assert looks_like_image(value)


def test_separators_of_windows_are_read(tmp_path):
    (tmp_path / "photos").mkdir()
    red, odd = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    red.save(tmp_path / "photos" / "A.PNG")
    odd.save(tmp_path / "odd\\name.png")  # a name that a file here may have
    for place in PLACES:
        for path in ("photos\\A.PNG", ".\\photos\\A.PNG"):
            assert load_image(located(place, path, tmp_path)).getpixel((0, 0)) == (255, 0, 0)
        assert load_image(located(place, "odd\\name.png", tmp_path)).getpixel((0, 0)) == (0, 0, 255)
        assert located(place, "photos\\A.PNG", "s3://bucket/rows") == "s3://bucket/rows/photos/A.PNG"
    with pytest.raises(OutsidePathError, match=r"\.\./photos/A\.PNG is outside"):
        locate_images({"image": "..\\photos\\A.PNG"}, str(tmp_path / "rows"), str(tmp_path / "rows"))
