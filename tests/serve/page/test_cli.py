"""`solo web` says what keeps it from starting, before it loads a model."""

from __future__ import annotations

import socket
import sys

import pytest


def test_what_is_not_installed_is_said(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, error = run("web", "--model", "nowhere")
    assert code == 2
    assert error == "solo: the page needs uvicorn: pip install 'solo-vlm[web]'\n"


def test_a_port_that_is_taken_is_said(run):
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, error = run("web", "--model", "nowhere", "--port", port)
    assert code == 2
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in error


def test_a_model_that_is_not_there_is_said(run, tmp_path):
    pytest.importorskip("uvicorn")
    code, _, error = run("web", "--model", tmp_path, "--port", 0)
    assert code == 2
    assert "it has no config.json" in error
