"""`solo push` against a local server with the hub's API."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

import huggingface_hub.constants
import pytest

TOKEN = "hf_secret"


class Hub(ThreadingHTTPServer):
    """Local hub: repositories by name, each a dict of files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.owner = "owner"


class _Requests(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = urlsplit(self.path).path.strip("/").split("/")
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts == ["api", "validate-yaml"]:
            known = re.search(r"^license: (apache-2\.0|mit)$", json.loads(body)["content"], re.M)
            errors = [] if known else [{"message": '"license" must be one of the known ones'}]
            return self._answer(400 if errors else 200, {"errors": errors, "warnings": []})
        name = "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            kinds = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            return self._answer(200, {"files": kinds})
        if parts[4] == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    file = line["value"]
                    self.server.repositories[name][file["path"]] = base64.b64decode(file["content"])
            commit = {"commitUrl": f"{self.server.url}/{name}/commit/1", "commitOid": "1", "success": True}
            return self._answer(200, commit)
        return self._answer(404, {"error": self.path})

    def _create(self, wanted: dict) -> None:
        owner, name = wanted.get("organization", self.server.owner), wanted["name"]
        if owner != self.server.owner:
            return self._answer(403, {"error": f"You don't have the rights to create a model under {owner}"})
        repository = f"{owner}/{name}"
        url = {"url": f"{self.server.url}/{repository}"}
        if repository in self.server.repositories:
            return self._answer(409, {"error": "You already created this model repo", **url})
        self.server.repositories[repository] = {}
        self.server.private[repository] = (
            wanted.get("private", False) or wanted.get("visibility") == "private"
        )
        return self._answer(200, url)

    def _answer(self, status: int, value: dict) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    hub = Hub()
    Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def options(home):
    """Return the arguments of a push with every option."""
    runs = ["--run", home / "stage1", "--run", home / "sft"]
    evaluation = ["--eval", home / "evaluation", "--license", "apache-2.0", "--base-model", "owner/tiny-llm"]
    return [home / "sft/model", "owner/tiny-solo", *runs, *evaluation]


def test_upload_equals_dry_run(hub, options, published, run):
    for _ in range(2):  # the second time into the existing repository
        code, out, error = run("push", *options, "--private", "--json")
        assert code == 0, error
        assert (code, json.loads(out)) == (0, {"url": f"{hub.url}/owner/tiny-solo"}), error
    assert hub.private == {"owner/tiny-solo": True}
    files = {file.name: file.read_bytes() for file in published.iterdir()}
    assert hub.repositories["owner/tiny-solo"] == files
    assert TOKEN.encode() not in b"".join(files.values())


def test_dry_run_uploads_nothing(hub, options, published, run, tmp_path):
    code, out, _ = run("push", *options, "--dry-run", "--out", tmp_path / "out", "--json")
    assert (code, json.loads(out)) == (0, {"out": str(tmp_path / "out")})
    assert hub.repositories == {}
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == {
        f.name: f.read_bytes() for f in published.iterdir()
    }
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(("token", "owner"), [("wrong", "owner"), (TOKEN, "another-owner")])
def test_denied_write_access(token, owner, hub, options, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    code, _, error = run("push", options[0], f"{owner}/tiny-solo")
    assert code == 2
    assert "hf auth login" in error
    assert token not in error
    assert len(error.splitlines()) == 1


def test_card_rejected_by_the_hub_is_reported(hub, options, run):
    code, _, error = run("push", *options[:2], "--license", "unknown")
    assert code == 2
    assert '"license" must be one of the known ones' in error
    assert len(error.splitlines()) == 1
    assert hub.repositories["owner/tiny-solo"] == {}


def test_no_network_and_offline_mode(hub, options, run, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _, error = run("push", *options[:2])
    assert code == 2
    assert "cannot upload to http://127.0.0.1:9/owner/tiny-solo" in error
    assert len(error.splitlines()) == 1
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, _, error = run("push", *options[:2])
    assert code == 2
    assert "HF_HUB_OFFLINE" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny-solo"], "owner/name"),
        (["owner/tiny solo"], "not a valid repository name"),
        (["owner/tiny-solo", "--dry-run"], "--out DIR"),
        (["owner/tiny-solo", "--out", "somewhere"], "--dry-run"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, message, options, run):
    code, _, error = run("push", options[0], *arguments)
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1
