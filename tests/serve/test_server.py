"""Addresses, and `solo serve` and `solo web` as processes: clients, keys, signals, user errors."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import fields
from urllib.request import urlopen

import pytest
from openai import OpenAI
from serving import served
from tests.factories import ROOT, ask

from solo_vlm.generate import GenerationPipeline
from solo_vlm.serve.limits import Limits
from solo_vlm.serve.server import bind
from solo_vlm.utils.errors import SoloError

from .conftest import question, wait_until


@pytest.mark.parametrize(("host", "name"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "localhost")])
def test_url_is_reachable_from_this_machine(host, name):
    with bind(host, 0) as address:
        port = address.socket.getsockname()[1]
        assert address.url == f"http://{name}:{port}"
        with pytest.raises(OSError, match="refused"):
            urlopen(address.url)
        address.listen()
        socket.create_connection((name, port), timeout=10).close()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv6_address_is_in_brackets():
    with bind("::1", 0) as address:
        assert address.url == f"http://[::1]:{address.socket.getsockname()[1]}"


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
def test_foreign_address_is_rejected(host):
    with (
        pytest.raises(SoloError, match=f"cannot listen on {host}, port 8000: .*--port"),
        bind(host, 8000),
    ):
        pass


def test_address_has_one_listener():
    with bind("127.0.0.1", 0) as address:
        port = address.socket.getsockname()[1]
        with bind("127.0.0.1", port) as other:  # neither listens yet
            address.listen()
            with pytest.raises(SoloError, match="in use"):
                other.listen()
        with pytest.raises(SoloError, match="in use"), bind("127.0.0.1", port):
            pass


# ---------------------------------------------------------------------------- `solo serve` as a process


@pytest.fixture(scope="module")
def folder(solo, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "my-model"
    solo.save(path)
    return path


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("old\nnew\n", encoding="utf-8-sig")
    with served(folder, "--api-key-file", str(keys), "--max-images", "1", "--max-concurrent", "4") as running:
        yield running


def test_openai_client_gets_the_models_answer(server, solo, picture):
    client = OpenAI(base_url=f"{server.url}/v1", api_key="new", max_retries=0)
    body = question("what is this?", picture(), max_tokens=8)
    reply = client.chat.completions.create(model="my-model", **body)
    expected = GenerationPipeline(solo.model, solo.processor).answer([ask("what is this?", picture())], 8)
    assert [reply.choices[0].message.content] == expected


def curl(*arguments: str) -> str:
    command = ["curl", "--silent", "--no-buffer", "--max-time", "60", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_curl_gets_answer_stream_and_error(server):
    def post(key: str, **options) -> str:
        body = json.dumps(question("hello", max_tokens=4, **options))
        headers = ["-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {key}"]
        return curl(f"{server.url}/v1/chat/completions", *headers, "-d", body)

    text = json.loads(post("old"))["choices"][0]["message"]["content"]
    *events, end = post("old", stream=True).split("\n\n")[:-1]
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == text
    assert end == "data: [DONE]"
    assert json.loads(post("wrong"))["error"]["code"] == "invalid_api_key"
    assert json.loads(curl(f"{server.url}/health"))["model"] == "my-model"


def test_every_limit_is_documented_with_its_default():
    documentation = (ROOT / "docs" / "serving.md").read_text()
    for field in fields(Limits):
        option = f"`--{field.name.replace('_', '-')}`"
        row = option if isinstance(field.default, bool) else f"| {option} | {int(field.default):,}"
        assert row in documentation


def test_options_set_the_limits(server, picture):
    client = OpenAI(base_url=f"{server.url}/v1", api_key="new", max_retries=0)
    with pytest.raises(Exception, match="Too many images: 2 in the request, at most 1"):
        client.chat.completions.create(model="my-model", **question("x", picture(), picture()))


@pytest.mark.slow
def test_sigterm_finishes_in_flight_requests(folder):
    with served(folder) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(
            model="my-model", **question("hello", max_tokens=400), stream=True
        )
        first = next(iter(stream))
        waiting: list[str] = []
        other = threading.Thread(
            target=lambda: waiting.append(
                client.chat.completions.create(model="my-model", **question("and", max_tokens=4))
                .choices[0]
                .message.content
            )
        )
        other.start()
        host, port = server.url.removeprefix("http://").split(":")
        server.process.send_signal(signal.SIGTERM)
        assert [first, *stream][-1].choices[0].finish_reason in ("stop", "length")
        other.join()
        assert server.process.wait(60) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)))


@pytest.mark.slow
def test_drain_limit_cuts_off_long_answers_at_shutdown(folder):
    with served(folder, "--max-drain-seconds", "0", "--max-tokens", "400") as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        client.chat.completions.create(model="my-model", **question("hello", max_tokens=400), stream=True)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


def test_port_in_use_is_one_line(run, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run("serve", "--model", folder, "--port", port)
    assert code == 2 and f"cannot listen on 127.0.0.1, port {port}" in err and err.count("\n") == 1


def test_missing_device_is_one_line(run, folder):
    code, _, err = run("serve", "--model", folder, "--port", 0, "--device", "nowhere")
    assert code == 2 and "cannot put the model on nowhere" in err


@pytest.mark.parametrize("content", [None, "  \n"])
def test_key_file_without_keys_is_one_line(run, folder, tmp_path, content):
    if content:
        (tmp_path / "keys").write_text(content)
    code, _, err = run("serve", "--model", folder, "--api-key-file", tmp_path / "keys")
    assert code == 2 and "API key" in err and err.count("\n") == 1


@pytest.mark.parametrize("option", [("--device", "cpu"), ("--quantize", "nf4"), ("--prefix-cache", "2")])
def test_options_unsupported_by_vllm_are_rejected(run, folder, option):
    code, _, err = run("serve", "--model", folder, "--engine", "vllm", *option)
    assert code == 2 and option[0] in err


def test_vllm_options_require_its_engine(run, folder):
    code, _, err = run("serve", "--model", folder, "--", "--enable-lora")
    assert code == 2 and "--enable-lora" in err


def test_missing_vllm_says_how_to_install_it(run, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    code, _, err = run("serve", "--model", folder, "--engine", "vllm")
    assert code == 2 and "pip install vllm" in err


def test_missing_package_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "solo_vlm.serve.server")
    code, _, error = run("web", "--model", "nowhere")
    assert code == 2
    assert error == "solo: the server needs uvicorn: pip install 'solo-vlm[serve]'\n"


def test_web_with_port_in_use_is_one_line(run):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, error = run("web", "--model", "nowhere", "--port", port)
    assert code == 2
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in error


def test_web_with_missing_model_is_one_line(run, tmp_path):
    code, _, error = run("web", "--model", tmp_path, "--port", 0)
    assert code == 2
    assert "it has no config.json" in error


@pytest.mark.parametrize("opens", [True, False])
def test_web_opens_the_page_once_it_listens(folder, tmp_path, opens):
    """A fake browser fetches the page that it is asked to open."""
    browser, opened = tmp_path / "browser.py", tmp_path / "opened"
    browser.write_text(
        "import sys, urllib.request\n"
        "page = urllib.request.urlopen(sys.argv[1], timeout=60).read()\n"
        f"open({str(opened)!r}, 'ab').write(page)\n"
    )
    command = [sys.executable, "-m", "solo_vlm", "web", "--model", str(folder), "--port", "0"]
    process = subprocess.Popen(
        command if opens else [*command, "--no-open"],
        env={**os.environ, "BROWSER": f"{sys.executable} {browser} %s"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        url = re.search(r"http://\S+", process.stdout.readline())[0]
        with urlopen(f"{url}/health", timeout=60) as response:
            assert json.load(response)["model"] == "/".join(folder.parts[-2:])
        if opens:
            wait_until(opened.exists)
            assert b"<title>SOLO</title>" in opened.read_bytes()
    finally:
        process.terminate()
        process.wait(30)
    assert opened.exists() == opens
