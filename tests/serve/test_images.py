"""Images in requests: the server reads every data URL that the library reads, and the same pixels."""

from __future__ import annotations

import base64
from urllib.parse import quote

import numpy as np
import pytest
from openai import OpenAI
from PIL import Image
from tests.factories import png

from solo_vlm.models.solo.image_loading_solo import ImageError, load_image
from solo_vlm.serve.errors import ApiError
from solo_vlm.serve.images import decode_images
from solo_vlm.serve.limits import Limits

from .conftest import question


def _file() -> bytes:
    """A PNG whose base64 has "+", "/" and padding."""
    for seed in range(1000):
        noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8))
        file = png(noise)
        encoded = base64.b64encode(file).decode()
        if "+" in encoded and "/" in encoded and encoded.endswith("="):
            return file
    raise AssertionError


FILE = _file()
TEXT = base64.b64encode(FILE).decode()
LINES = base64.encodebytes(FILE).decode()

READABLE = {
    "plain": f"data:image/png;base64,{TEXT}",
    "a parameter": f"data:image/png;charset=utf-8;base64,{TEXT}",
    "several parameters": f"data:image/png;name=x.png;charset=utf-8;base64,{TEXT}",
    "no media type": f"data:;base64,{TEXT}",
    "no media type, a parameter": f"data:;charset=utf-8;base64,{TEXT}",
    "another media type": f"data:application/octet-stream;base64,{TEXT}",
    "image/jpg": f"data:image/jpg;base64,{TEXT}",
    "upper case": f"DATA:IMAGE/PNG;BASE64,{TEXT}",
    "mixed case": f"Data:image/PNG;Base64,{TEXT}",
    "a space before base64": f"data:image/png; base64,{TEXT}",
    "line breaks": f"data:image/png;base64,{LINES}",
    "CRLF": "data:image/png;base64," + LINES.replace("\n", "\r\n"),
    "a line break first": f"data:image/png;base64,\n{TEXT}",
    "spaces and tabs": "data:image/png;base64," + " \t".join([TEXT[:10], TEXT[10:33], TEXT[33:]]),
    "URL-safe": "data:image/png;base64," + base64.urlsafe_b64encode(FILE).decode(),
    "no padding": "data:image/png;base64," + TEXT.rstrip("="),
    "URL-safe without padding": "data:image/png;base64,"
    + base64.urlsafe_b64encode(FILE).decode().rstrip("="),
    "percent-encoded base64": "data:image/png;base64," + quote(TEXT, safe=""),
    "percent-encoded in lower case": "data:image/png;base64,"
    + TEXT.replace("+", "%2b").replace("/", "%2f").replace("=", "%3d"),
    "percent-encoded line breaks": "data:image/png;base64," + quote(LINES),
    "percent-encoded bytes": "data:image/png," + quote(FILE),
    "percent-encoded bytes, no media type": "data:," + quote(FILE),
}
UNREADABLE = {
    "no comma": f"data:image/png;base64{TEXT}",
    "no base64": f"data:image/png,{TEXT}",
    "base64 as the type": f"data:base64,{TEXT}",
    "invalid characters": f"data:image/png;base64,{TEXT[:20]}*{TEXT[20:]}",
    "escapes that are none": f"data:image/png;base64,%zz{TEXT}",
    "one character too many": f"data:image/png;base64,{TEXT.rstrip('=')[: len(TEXT) // 4 * 4 - 3]}",
    "nothing": "data:image/png;base64,",
    "other letters": f"data:image/png;base64,é{TEXT}",
    "a lone surrogate": f"data:image/png;base64,\ud800{TEXT}",
}


@pytest.mark.parametrize("name", READABLE)
def test_the_server_reads_what_the_library_reads(name):
    expected = np.asarray(load_image(FILE))
    assert np.array_equal(np.asarray(load_image(READABLE[name])), expected)
    (image,) = decode_images([("x", READABLE[name])], Limits())
    assert np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("name", UNREADABLE)
def test_neither_reads_what_is_no_data_url_of_an_image(name):
    with pytest.raises(ImageError):
        load_image(UNREADABLE[name])
    with pytest.raises(ApiError) as error:
        decode_images([("x", UNREADABLE[name])], Limits())
    assert (error.value.status, error.value.param, error.value.code) == (400, "x", "invalid_image")


def test_answers_do_not_depend_on_how_the_image_is_written(server):
    client = OpenAI(base_url=server.url, api_key="none", max_retries=0)
    body = question("what is this?", load_image(FILE), max_tokens=8)
    expected = client.chat.completions.create(model="tiny", **body)
    for url in READABLE.values():
        body["messages"][0]["content"][0]["image_url"]["url"] = url
        reply = client.chat.completions.create(model="tiny", **body)
        assert reply.choices == expected.choices
        assert reply.usage == expected.usage


@pytest.mark.parametrize("name", ["plain", "line breaks", "percent-encoded base64", "percent-encoded bytes"])
def test_the_limit_counts_the_bytes_of_the_file_however_it_is_written(name):
    assert decode_images([("x", READABLE[name])], Limits(max_image_bytes=len(FILE)))
    with pytest.raises(ApiError) as error:
        decode_images([("x", READABLE[name])], Limits(max_image_bytes=len(FILE) - 1))
    assert error.value.code == "image_too_large"


def test_percent_encoding_of_all_images_together_is_limited():
    url = "data:image/png;base64," + TEXT + "%0A" * 600_000
    assert decode_images([("x", url)], Limits())
    with pytest.raises(ApiError, match="too much percent-encoding"):
        decode_images([("x", url), ("y", url)], Limits())
