"""`solo serve` as a process: the clients that people use, keys, signals, mistakes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import fields

import pytest
from openai import OpenAI
from serving import served
from tests.factories import ROOT, ask

from solo_vlm.generate import GenerationPipeline
from solo_vlm.serve.limits import Limits

from .conftest import question


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


def test_the_openai_client_gets_the_models_answer(server, solo, picture):
    client = OpenAI(base_url=f"{server.url}/v1", api_key="new", max_retries=0)
    body = question("what is this?", picture(), max_tokens=8)
    reply = client.chat.completions.create(model="my-model", **body)
    expected = GenerationPipeline(solo.model, solo.processor).answer([ask("what is this?", picture())], 8)
    assert [reply.choices[0].message.content] == expected


def curl(*arguments: str) -> str:
    command = ["curl", "--silent", "--no-buffer", "--max-time", "60", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_curl_gets_an_answer_a_stream_and_an_error(server):
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


def test_every_limit_stands_in_the_documentation_with_its_default():
    documentation = (ROOT / "docs" / "serving.md").read_text()
    for field in fields(Limits):
        option = f"`--{field.name.replace('_', '-')}`"
        row = option if field.type == "bool" else f"| {option} | {int(field.default):,}"
        assert row in documentation


def test_options_set_the_limits(server, picture):
    client = OpenAI(base_url=f"{server.url}/v1", api_key="new", max_retries=0)
    with pytest.raises(Exception, match="2 images; a request may have 1"):
        client.chat.completions.create(model="my-model", **question("x", picture(), picture()))


@pytest.mark.slow
def test_a_server_that_is_asked_to_stop_finishes_what_it_has_begun(folder):
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
def test_what_takes_too_long_does_not_keep_it_from_stopping(folder):
    with served(folder, "--max-drain-seconds", "0", "--max-tokens", "400") as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        client.chat.completions.create(model="my-model", **question("hello", max_tokens=400), stream=True)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


def test_a_taken_port_is_one_line(run, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run("serve", "--model", folder, "--port", port)
    assert code == 2 and f"cannot listen on 127.0.0.1, port {port}" in err and err.count("\n") == 1


def test_a_device_that_is_not_there_is_one_line(run, folder):
    code, _, err = run("serve", "--model", folder, "--port", 0, "--device", "nowhere")
    assert code == 2 and "cannot put the model on nowhere" in err


@pytest.mark.parametrize("content", [None, "  \n"])
def test_a_file_without_keys_is_one_line(run, folder, tmp_path, content):
    if content:
        (tmp_path / "keys").write_text(content)
    code, _, err = run("serve", "--model", folder, "--api-key-file", tmp_path / "keys")
    assert code == 2 and "API key" in err and err.count("\n") == 1


@pytest.mark.parametrize("option", [("--device", "cpu"), ("--quantize", "nf4"), ("--prefix-cache", "2")])
def test_what_vllm_does_not_take_is_said(run, folder, option):
    code, _, err = run("serve", "--model", folder, "--engine", "vllm", *option)
    assert code == 2 and option[0] in err


def test_options_of_vllm_are_for_vllm(run, folder):
    code, _, err = run("serve", "--model", folder, "--", "--enable-lora")
    assert code == 2 and "--enable-lora" in err


def test_without_vllm_its_engine_says_how_to_get_it(run, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    code, _, err = run("serve", "--model", folder, "--engine", "vllm")
    assert code == 2 and "pip install vllm" in err
