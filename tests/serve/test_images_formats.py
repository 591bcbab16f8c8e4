"""The page and the API read the same few of Pillow's formats."""

from __future__ import annotations

import base64
import struct
from contextlib import suppress
from io import BytesIO

import pytest
from PIL import Image

READ = {"JPEG", "PNG", "WEBP", "GIF", "BMP", "MPO"}  # MPO: JPEG with further ones appended


def files() -> dict[str, bytes]:
    """Return a file of each format that Pillow writes, and of some that it only reads."""
    Image.init()
    picture, made = Image.linear_gradient("L").resize((64, 64)), {}
    for name in sorted(Image.SAVE.keys() - {"IM"}):  # deprecated
        for mode in ("RGB", "L", "1"):
            file = BytesIO()
            with suppress(
                OSError, ValueError, KeyError, AttributeError
            ):  # another mode, or a missing encoder
                picture.convert(mode).save(file, name)
                made[name] = file.getvalue()
                break
    return {
        **made,
        "GBR": struct.pack(">5I4sI", 29, 2, 8, 8, 4, b"GIMP", 10) + b"\0" + bytes(256),
        "XPM": b'/* XPM */\nstatic char *x[] = {\n"1 1 1 1",\n"a c #ff0000",\n"a"\n};\n',
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    }


FILES = files()


def test_corpus_has_many_formats():
    assert FILES.keys() >= READ | {
        "ICNS",
        "ICO",
        "DDS",
        "MSP",
        "TIFF",
        "PPM",
        "TGA",
        "PCX",
        "SGI",
        "EPS",
        "PDF",
    }


@pytest.mark.parametrize("name", FILES)
def test_page_and_api_read_the_same_formats(server, name):
    image = {"url": f"data:image/png;base64,{base64.b64encode(FILES[name]).decode()}"}
    content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": "x"}]
    chat = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    answers = [server.ask({"image_url": image}, "/api/image"), server.ask(chat)]
    expected = 200 if name in READ else 400
    assert [status for status, _ in answers] == [expected] * 2, answers
    if expected != 200:
        assert all(answer["error"]["code"] == "invalid_image" for _, answer in answers)
        assert answers[0][1]["error"]["message"] == answers[1][1]["error"]["message"]
