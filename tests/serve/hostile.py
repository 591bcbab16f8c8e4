"""Malicious and malformed requests: name -> bytes on the wire."""

from __future__ import annotations

import base64
import io
import json
import select
import socket
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.client import HTTPResponse
from typing import Any

from PIL import Image

from .conftest import data_url, question

SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
ENTITIES = b'<!DOCTYPE svg [<!ENTITY a "' + b"b" * 1000 + b'">]><svg>' + b"&a;" * 1000 + b"</svg>"
PRIVATE_URLS = {
    "loopback": "http://127.0.0.1:9/x.png",
    "loopback by name": "http://localhost:9/x.png",
    "loopback, short": "http://127.1/x.png",
    "loopback, decimal": "http://2130706433/x.png",
    "loopback, hexadecimal": "http://0x7f000001/x.png",
    "loopback, octal": "http://0177.0.0.1/x.png",
    "loopback, IPv6": "http://[::1]/x.png",
    "loopback, mapped": "http://[::ffff:127.0.0.1]/x.png",
    "loopback, mapped in hexadecimal": "http://[::ffff:7f00:1]/x.png",
    "loopback, full-width digits": "http://１２７.０.０.１/x.png",
    "loopback, circled digits": "http://①②⑦.⓪.⓪.①/x.png",
    "loopback, user before it": "http://example.com@127.0.0.1/x.png",
    "loopback, backslash": "http://127.0.0.1\\@example.com/x.png",
    "loopback, fragment": "http://127.0.0.1#@example.com/x.png",
    "unspecified": "http://0.0.0.0/x.png",
    "unspecified, zero": "http://0/x.png",
    "private class A": "http://10.0.0.1/x.png",
    "private class B": "https://172.16.0.1/x.png",
    "private class C": "http://192.168.1.1/x.png",
    "shared": "http://100.100.100.200/latest/meta-data",
    "metadata": "http://169.254.169.254/latest/meta-data/iam",
    "metadata, decimal": "http://2852039166/latest/meta-data",
    "metadata, IPv6": "http://[fd00:ec2::254]/latest/meta-data",
    "metadata, NAT64": "http://[64:ff9b::a9fe:a9fe]/latest/meta-data",
    "metadata, 6to4": "http://[2002:a9fe:a9fe::]/latest/meta-data",
    "metadata, Azure": "http://168.63.129.16/metadata",
    "link-local, IPv6": "http://[fe80::1%25eth0]/x.png",
    "multicast": "http://224.0.0.1/x.png",
    "broadcast": "http://255.255.255.255/x.png",
    "name of a metadata service": "http://metadata.google.internal/computeMetadata/v1/",
    "name that resolves to loopback": "http://loopback.test/x.png",
}
OTHER_URLS = {
    "file": "file:///etc/passwd",
    "file, two slashes": "file://localhost/etc/passwd",
    "path": "/etc/passwd",
    "path traversal": "../../../../etc/passwd",
    "path traversal, encoded": "http://127.0.0.1/..%2f..%2fetc%2fpasswd",
    "path traversal after data": "data:image/png;base64,../../../../etc/passwd",
    "home": "~/.ssh/id_rsa",
    "ftp": "ftp://127.0.0.1/x.png",
    "gopher": "gopher://127.0.0.1:6379/_FLUSHALL",
    "bare base64": base64.b64encode(b"\x89PNG\r\n\x1a\n" * 20).decode(),
    "empty": "",
    "NUL": "/etc/passwd\0.png",
    "line break": "http://127.0.0.1/\r\nX-Injected: 1",
    "very long": "http://127.0.0.1/" + "a" * 1_000_000,
    "no host": "http:///x.png",
    "bad port": "http://127.0.0.1:99999/x.png",
    "data, text": "data:text/plain;base64,aGVsbG8=",
    "data, HTML": "data:text/html,<script>alert(1)</script>",
    "data, JSON": "data:application/json;base64,e30=",
    "data, no comma": "data:image/png;base64",
    "data, not base64": "data:image/png;base64,%%%%",
    "data, broken padding": "data:image/png;base64,iVBORw0KGgo",
    "data, percent-encoded": "data:image/png,%89PNG%0D%0A",
    "data, empty": "data:image/png;base64,",
    "data, white space": "data:image/png;base64," + " \n" * 1_000_000,
    "data, escapes": "data:image/png;base64," + "%41" * 1_200_000,
    "data, escapes of bytes": "data:image/png," + "%89" * 1_200_000,
    "data, commas": "data:" + "," * 1_000_000,
    "data, parameters": "data:image/png" + ";base64" * 100_000 + ",iVBORw0KGgo",
}


def image_files() -> dict[str, bytes]:
    whole = io.BytesIO()
    Image.effect_noise((300, 200), 50).convert("RGB").save(whole, "JPEG")
    animation = io.BytesIO()
    Image.new("P", (9, 9)).save(animation, "GIF")
    return {
        "PNG bomb": _png(30_000, 30_000),
        "PNG bomb, just below Pillow's limit": _png(10_000, 8_000),
        "PNG with no pixels": _png(0, 10),
        "PNG of text chunks that unpack to a gigabyte": _png_text_bomb(),
        "GIF bomb": b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + animation.getvalue()[10:],
        "BMP bomb": b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "truncated JPEG": whole.getvalue()[:2000],
        "PNG signature only": b"\x89PNG\r\n\x1a\n",
        "WebP of noise": b"RIFF\xff\xff\xff\x7fWEBPVP8 " + bytes(range(256)),
        "SVG with a file": SVG,
        "SVG of entities": ENTITIES,
        "PDF": b"%PDF-1.7\n1 0 obj",
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run",
        "ELF": b"\x7fELF" + bytes(100),
        "ZIP bomb": b"PK\x03\x04" + bytes(100),
        "gzip bomb": zlib.compress(bytes(50_000_000), 9, 31),
        "text": b"hello",
    }


def bodies() -> dict[str, Any]:
    """Return JSON values that are invalid or must be rejected."""
    user = {"role": "user", "content": "x"}
    image = data_url(Image.new("RGB", (8, 8)))

    def chat(**options: Any) -> dict[str, Any]:
        return {"messages": [user], **options}

    def content(value: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": value}]}

    def url(value: Any) -> dict[str, Any]:
        return content([{"type": "image_url", "image_url": {"url": value}}])

    deep: Any = "x"
    for _ in range(90):
        deep = [deep]
    encoded = {name: base64.b64encode(file).decode() for name, file in image_files().items()}
    return {
        **{f"URL: {name}": url(value) for name, value in {**PRIVATE_URLS, **OTHER_URLS}.items()},
        **{f"file: {name}": url(f"data:image/png;base64,{file}") for name, file in encoded.items()},
        "a list": [],
        "null": None,
        "a number": 7,
        "nothing in it": {},
        "no messages": {"messages": []},
        "messages: a string": {"messages": "x"},
        "messages: an object": {"messages": {"0": user}},
        "message: null": {"messages": [None]},
        "message: a list": {"messages": [[]]},
        "no role": {"messages": [{"content": "x"}]},
        "role: unknown": {"messages": [{"role": "root", "content": "x"}]},
        "role: tool": {"messages": [{"role": "tool", "content": "x"}]},
        "role: a number": {"messages": [{"role": 1, "content": "x"}]},
        "content: null": content(None),
        "content: a number": content(5),
        "content: no parts": content([]),
        "content: nested": content(deep),
        "part: unknown": content([{"type": "video_url", "video_url": {"url": "x"}}]),
        "part: a file": content([{"type": "file", "file": {"path": "/etc/passwd"}}]),
        "part: local image": content([{"type": "image", "path": "/etc/passwd"}]),
        "part: no text": content([{"type": "text"}]),
        "part: text is a list": content([{"type": "text", "text": ["x"]}]),
        "image: a string": content([{"type": "image_url", "image_url": image}]),
        "image: a number": url(5),
        "image in a system message": {
            "messages": [{"role": "system", "content": url(image)["messages"][0]["content"]}, user]
        },
        "system last": {"messages": [user, {"role": "system", "content": "x"}]},
        "assistant last": {"messages": [user, {"role": "assistant", "content": "x"}]},
        "1,000 messages": {"messages": [user, {"role": "assistant", "content": "x"}] * 500 + [user]},
        "100 images": content([{"type": "image_url", "image_url": {"url": image}}] * 100),
        "longer than the context": content("hello " * 2000),
        "a very long text": content("a" * 3_000_000),
        "200,000 emoji": content("😀" * 200_000),
        "200,000 private characters": content("\ue000" * 200_000),
        "50,000 special tokens": content("</s>" * 50_000),
        "100 turns of 2,000 characters": {
            "messages": [
                *[{**user, "content": "x" * 1000}, {"role": "assistant", "content": "y" * 1000}] * 99,
                user,
            ]
        },
        "a very long text of special tokens": content("</s><vpatch>" * 200_000),
        "max_tokens: 0": chat(max_tokens=0),
        "max_tokens: negative": chat(max_tokens=-1),
        "max_tokens: huge": chat(max_tokens=10**30),
        "max_tokens: beyond the limit": chat(max_tokens=100_000),
        "max_tokens: a string": chat(max_tokens="5"),
        "max_tokens: a fraction": chat(max_tokens=1.5),
        "max_tokens: true": chat(max_tokens=True),
        "temperature: negative": chat(temperature=-1),
        "temperature: huge": chat(temperature=1e300),
        "temperature: a string": chat(temperature="hot"),
        "top_p: 0": chat(top_p=0),
        "top_p: 2": chat(top_p=2),
        "seed: huge": chat(seed=2**70),
        "seed: a fraction": chat(seed=0.5),
        "stop: empty": chat(stop=""),
        "stop: a number": chat(stop=3),
        "stop: a thousand": chat(stop=["x"] * 1000),
        "stop: very long": chat(stop="x" * 100_000),
        "stream: a string": chat(stream="yes"),
        "stream_options without stream": chat(stream_options={"include_usage": True}),
        "n: 2": chat(n=2),
        "n: huge": chat(n=10**9),
        "tools": chat(tools=[{"type": "function", "function": {"name": "system"}}]),
        "response_format": chat(response_format={"type": "json_object"}),
        "logprobs": chat(logprobs=True),
        "chat_template": chat(chat_template="{{ ''.__class__.__mro__ }}"),
        "another model": chat(model="../../etc/passwd"),
        "model: a list": chat(model=["tiny"]),
    }


def texts() -> dict[str, bytes]:
    """Return bodies that are not JSON."""
    ok = json.dumps(question("x")).encode()
    return {
        "empty": b"",
        "not JSON": b"hello",
        "cut short": ok[:-5],
        "two values": ok + ok,
        "a trailing comma": b'{"messages": [],}',
        "NaN": b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        "Infinity": b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
        "1e999": b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        "a number of 100,000 digits": b'{"messages": [{"role": "user", "content": "x"}], "seed": %s}'
        % (b"9" * 100_000),
        "deep nesting": b"[" * 100_000,
        "deep nesting of objects": b'{"a":' * 100_000,
        "a lone surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "invalid UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        "UTF-16": json.dumps(question("x")).encode("utf-16"),
        "NUL bytes": bytes(1000),
        "a pickle": b"\x80\x04\x95\x1e\x00\x00\x00cposix\nsystem\n.",
        "gzip": zlib.compress(ok, 9, 31),
    }


def costly_bodies(size: int) -> dict[str, Callable[[], bytes]]:
    """Return bodies that cost more than their size suggests if they are parsed or validated."""

    def fill(before: bytes, unit: bytes, after: bytes) -> bytes:
        return before + unit * ((size - len(before) - len(after)) // len(unit)) + after

    user = b'{"messages": [{"role": "user", "content": "x"}], '
    content = (b'{"messages": [{"role": "user", "content": [', b"]}]}")
    text = (b'{"messages": [{"role": "user", "content": "', b'"}]}')
    message, messages = (
        (b'{"messages": [{"role": "user", "content": "x", ', b"}]}"),
        (b'{"messages": [', b"]}"),
    )
    cases = [
        ("empty parts", content[0], b"{},", b"{}" + content[1]),
        ("parts without text", content[0], b'{"type": "text"},', b"{}" + content[1]),
        ("parts of unknown type", content[0], b'{"type": "x"},', b"{}" + content[1]),
        ("empty texts", content[0], b'{"type": "text", "text": ""},', b"{}" + content[1]),
        ("image parts", content[0], b'{"type": "image_url", "image_url": {"url": "x"}},', b"{}" + content[1]),
        ("parts of numbers", content[0], b"1,", b"1" + content[1]),
        ("parts of lists", content[0], b"[],", b"[]" + content[1]),
        ("parts of nested lists", content[0], b"[[[[]]]],", b"[]" + content[1]),
        ("null messages", messages[0], b"null,", b"null" + messages[1]),
        ("empty messages", messages[0], b"{},", b"{}" + messages[1]),
        ("messages", messages[0], b'{"role": "user", "content": "x"},', b"{}" + messages[1]),
        ("tool calls", message[0] + b'"tool_calls": [', b"{},", b"{}]" + message[1]),
        ("null members of a message", message[0], b'"name": null,', b'"name": null' + message[1]),
        ("stop strings", user + b'"stop": [', b'"x",', b'"x"]}'),
        ("tools", user + b'"tools": [', b"{},", b"{}]}"),
        ("metadata", user + b'"metadata": [', b"0.1,", b"1]}"),
        ("null fields", user, b'"x": null,', b'"x": null}'),
        ("opening brackets", user + b'"user": ', b"[", b"}"),
        ("opening braces", user + b'"user": ', b'{"a":', b"}"),
        ("closing brackets", user + b'"user": 1', b"]", b"}"),
        ("strings side by side", user + b'"user": ', b'""', b"}"),
        ("white space", user + b'"user":', b" \n", b"x}"),
        ("digits", user + b'"seed": 1', b"9", b"}"),
        ("digits of a fraction", user + b'"temperature": 3.', b"9", b"}"),
        ("a long text", text[0], b"a", text[1]),
        ("a long text of commas", text[0], b",", text[1]),
        ("a long text of escapes", text[0], b"\\n", text[1]),
        ("a long text of escaped quotes", text[0], b'\\"', text[1]),
        ("a long text of backslashes", text[0], b"\\\\", text[1]),
        ("a long text of escaped surrogates", text[0], b"\\ud83d\\ude00", text[1]),
        ("a long text of emoji", text[0], "😀".encode(), text[1]),
        ("a long text that ends with an emoji", text[0], b"a", "😀".encode() + text[1]),
        ("a long role", b'{"messages": [{"content": "x", "role": "', b"a", b'"}]}'),
        ("a long type of a part", content[0] + b'{"type": "', b"a", b'"}' + content[1]),
        ("a long field name", user + b'"', b"a", b'": 1}'),
        ("a long model name", user + b'"model": "', b"\\u0001", b'"}'),
        ("a long stop string", user + b'"stop": "', b"a", b'"}'),
        (
            "a long URL",
            content[0] + b'{"type": "image_url", "image_url": {"url": "http://x/',
            b"a",
            b'"}}' + content[1],
        ),
    ]
    return {name: partial(fill, *parts) for name, *parts in cases}


def requests(limit: int) -> dict[str, bytes]:
    """Return whole HTTP requests.

    Args:
        limit: Maximum body size of the server, in bytes.
    """
    path = "/v1/chat/completions"
    ok = json.dumps(question("x", max_tokens=1)).encode()
    made = {f"body: {name}": http(body) for name, body in texts().items()}
    made |= {f"JSON: {name}": http(json.dumps(body).encode()) for name, body in bodies().items()}
    made |= page_requests()
    return made | {
        "too large by its content length": http(b"{", length=str(limit + 1)),
        "too large by far": http(b"{", length="9" * 15),
        "too large, in chunks": http(None)
        + b"".join(_chunk(b" " * 65_536) for _ in range(limit // 65_536 + 2)),
        "length: negative": http(ok, length="-1"),
        "length: a word": http(ok, length="many"),
        "length: two": http(ok, extra="Content-Length: 7"),
        "length and chunks": http(ok, extra="Transfer-Encoding: chunked"),
        "chunks: bad size": http(None) + b"zz\r\nhello\r\n",
        "encoding: unknown": http(ok, extra="Transfer-Encoding: magic"),
        "body that never comes": http(b"{", length="100"),
        "chunks that never end": http(None) + _chunk(b"{"),
        "no content type": http(ok, kind=""),
        "a form": http(ok, kind="application/x-www-form-urlencoded"),
        "plain text": http(ok, kind="text/plain"),
        "GET": http(ok, method="GET"),
        "PUT": http(ok, method="PUT"),
        "DELETE": http(ok, method="DELETE"),
        "TRACE": http(ok, method="TRACE"),
        "a method of its own": http(ok, method="HACK"),
        "POST of the models": http(ok, path="/v1/models"),
        "no such page": http(ok, path="/v1/completions"),
        "path traversal": http(ok, path="/v1/../../etc/passwd"),
        "path traversal, encoded": http(ok, path="/%2e%2e/%2e%2e/etc/passwd"),
        "two slashes": http(ok, path="//v1//chat//completions"),
        "a very long path": http(ok, path="/" + "a" * 100_000),
        "a very long header": http(ok, extra="X-Long: " + "a" * 200_000),
        "many headers": http(ok, extra="\r\n".join(f"X-{n}: {n}" for n in range(10_000))),
        "a header with NUL": http(ok, extra="X-Bad: a\0b"),
        "a folded header": http(ok, extra="X-Bad: a\r\n b", kind=""),
        "HTTP/9": f"POST {path} HTTP/9.9\r\nHost: x\r\n\r\n".encode(),
        "no host": f"POST {path} HTTP/1.1\r\nContent-Length: 0\r\n\r\n".encode(),
        "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n",
    }


def page_requests() -> dict[str, bytes]:
    """Return requests to the page's own endpoints."""
    made = {}
    for path in ("/api/image", "/api/attention"):
        made |= {f"{path}: {name}": http(body, path=path) for name, body in texts().items()}
        made[f"{path}: plain text"] = http(b"{}", path=path, kind="text/plain")
        made[f"{path}: PUT"] = http(b"{}", path=path, method="PUT")
    files = {name: base64.b64encode(file).decode() for name, file in image_files().items()}
    urls = {name: f"data:image/png;base64,{file}" for name, file in files.items()} | OTHER_URLS
    for name, url in {**urls, "loopback": PRIVATE_URLS["loopback"]}.items():
        body = json.dumps({"image_url": {"url": url}}).encode()
        made[f"/api/image: {name}"] = http(body, path="/api/image")
    answered = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    for name, value in {"start": -1, "end": 10**30, "layer": 10**9, "messages": answered * 5000}.items():
        body = json.dumps({"messages": answered, "start": 0, "end": 1, name: value}).encode()
        made[f"/api/attention: {name}"] = http(body, path="/api/attention")
    return made


def http(
    body: bytes | None,
    path: str = "/v1/chat/completions",
    method: str = "POST",
    kind: str = "application/json",
    length: str | None = None,
    extra: str = "",
) -> bytes:
    """Return a request; without a body, the head of a chunked one."""
    head = [f"{method} {path} HTTP/1.1", "Host: x"]
    head += [f"Content-Type: {kind}"] if kind else []
    head += ["Transfer-Encoding: chunked"] if body is None else [f"Content-Length: {length or len(body)}"]
    head += [extra] if extra else []
    return "\r\n".join([*head, "", ""]).encode() + (body or b"")


def exchange(port: int, request: bytes) -> tuple[int, str]:
    """Send bytes until the server responds; return status and body."""
    for patience in (0, 0.002, 0.02, 0.2):
        # Data that arrives after the server has closed the connection makes TCP drop the response.
        with (
            suppress(ConnectionError),
            socket.create_connection(("127.0.0.1", port), timeout=30) as connection,
        ):
            for start in range(0, len(request), 2**14):
                connection.sendall(request[start : start + 2**14])
                if start and select.select([connection], [], [], patience)[0]:
                    break
            response = HTTPResponse(connection)
            response.begin()
            return response.status, response.read().decode()
    raise ConnectionError("no answer before the connection was closed")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *extra: bytes) -> bytes:
    """Return a PNG that declares a size."""
    header = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = _png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + _png_chunk(b"IEND", b"")


def _png_text_bomb() -> bytes:
    chunk = _png_chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(10_000_000), 9))
    return _png(64, 64, *[chunk] * 100)
