"""Local server with the paths of the hub's API that reading data sets needs; counts requests and bytes."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_good"
_LFS = (".parquet", ".tar", ".png")  # stored elsewhere: `resolve` redirects to them
_RESOLVE = re.compile(r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_API = re.compile(
    r"/api/datasets/(?P<repo>[^/]+/[^/]+?)"
    r"(?:/(?P<kind>auth-check|refs|revision|tree|paths-info)(?:/(?P<revision>[^/]+))?(?:/(?P<path>.+))?)?"
)


class Request(NamedTuple):
    method: str
    path: str
    size: int  # bytes of data files that were sent


@dataclass
class Repo:
    """Data set: files of each commit, and the commit of each branch."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        content = "".join(f"{path} {_sha(data)}" for path, data in files.items())
        commit = hashlib.sha1(f"{len(self.commits)} {content}".encode()).hexdigest()
        self.commits[commit] = files
        self.refs[ref] = commit
        return commit

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class HubServer:
    """Hub on 127.0.0.1.

    Attributes:
        repos: Data sets by name.
        requests: Answered requests.
        faults: Answers to the next requests for data: a status, or "drop" after half of the bytes.
        api_faults: Answers to the next other requests: a status, or "stall" for no answer.
        retry_after: Seconds that an answer 429 asks to wait.
        tokens: Tokens that came with requests for stored data, which is on another host.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.faults: deque[int | str] = deque()
        self.api_faults: deque[int | str] = deque()
        self.retry_after = 0
        self.tokens: list[str | None] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = f"http://localhost:{self._server.server_port}/cdn"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def data_size(self, end: str = ".parquet") -> int:
        """Return the bytes sent of files whose names end so."""
        return sum(request.size for request in self.requests if request.path.endswith(end))


def texts(source: Any) -> list[str]:
    """Return the text of every row; new processes import this module fast."""
    rows = [row for shard in range(len(source)) for row in source.read(shard)]
    return [row["messages"][0]["content"][-1]["text"] for row in rows]


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path.startswith("/cdn/"):
            self.hub.tokens.append(self.headers.get("Authorization"))
            return self._send_file(unquote(url.path), self.hub_file(unquote(url.path)))
        if match := _RESOLVE.fullmatch(url.path):
            return self._resolve(**{name: unquote(value) for name, value in match.groupdict().items()})
        if match := _API.fullmatch(url.path):
            if self.hub.api_faults:
                return self._answer_fault(self.hub.api_faults.popleft())
            parts = {name: unquote(value or "") for name, value in match.groupdict().items()}
            return self._answer_api(parse_qs(url.query), **parts)
        return self._fail(404, "EntryNotFound")

    do_HEAD = do_POST = do_GET

    def log_message(self, *args: Any) -> None:
        pass

    def hub_file(self, path: str) -> bytes:
        _, _, owner, name, commit, file = path.split("/", 5)
        return self.hub.repos[f"{owner}/{name}"].commits[commit][file]

    def _find(self, name: str, revision: str) -> tuple[Repo, str] | None:
        """Return the data set and the commit; None after an answer that says what is missing."""
        repo = self.hub.repos.get(name)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not allowed):
            return self._fail(401, "RepoNotFound")
        commit = repo.find(revision or "main")
        if commit is None:
            return self._fail(404, "RevisionNotFound")
        return repo, commit

    def _is_shut(self, repo: Repo) -> bool:
        return repo.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}"

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        if (found := self._find(repo, revision)) is None:
            return
        files, commit = found[0].commits[found[1]], found[1]
        if self._is_shut(found[0]):
            return self._fail(401, "GatedRepo")
        if path not in files:
            return self._fail(404, "EntryNotFound", {"X-Repo-Commit": commit})
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(files[path])),
            "X-Linked-ETag": f'"{_sha(files[path])}"',
            "ETag": f'"{_sha(files[path])}"',
        }
        if path.endswith(_LFS):
            return self._send(302, b"", headers | {"Location": f"{self.hub.storage}/{repo}/{commit}/{path}"})
        self._send_file(path, files[path], headers)

    def _send_file(self, path: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        fault = self.hub.faults.popleft() if self.hub.faults and self.command == "GET" else None
        if isinstance(fault, int):
            return self._answer_fault(fault)
        status, part = 200, data
        headers = {"ETag": f'"{_sha(data)}"', "Accept-Ranges": "bytes", **(headers or {})}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or len(data) - 1)
            status, part = 206, data[start : end + 1]
            headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        self._send(status, part, headers, path, drop=fault == "drop")

    def _answer_api(
        self, query: dict[str, list[str]], repo: str, kind: str, revision: str, path: str
    ) -> None:
        if (found := self._find(repo, revision)) is None:
            return None
        data_set, commit = found
        files = data_set.commits[commit]
        if kind == "auth-check":
            return self._fail(403, "GatedRepo") if self._is_shut(data_set) else self._json({})
        if kind == "refs":
            heads = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
                for name, sha in data_set.refs.items()
            ]
            return self._json({"branches": heads, "tags": [], "converts": []})
        if kind == "tree":
            return self._list(
                files, path, query.get("recursive") == ["True"] or query.get("recursive") == ["true"]
            )
        if kind == "paths-info":
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
            return self._json([_entry(name, files[name]) for name in asked if name in files])
        siblings = [{"rfilename": name} for name in files]
        facts = {
            "id": repo,
            "sha": commit,
            "siblings": siblings,
            "private": False,
            "tags": [],
            "downloads": 0,
        }
        return self._json(facts)

    def _list(self, files: dict[str, bytes], folder: str, recursive: bool) -> None:
        start = f"{folder}/" if folder else ""
        inside = {path: data for path, data in files.items() if path.startswith(start)}
        if not inside:
            return self._fail(404, "EntryNotFound")
        folders = {
            f"{start}{'/'.join(parts[:depth])}"
            for parts in (path[len(start) :].split("/") for path in inside)
            for depth in range(1, len(parts))
        }
        found = [
            {"type": "directory", "path": name, "size": 0, "oid": _sha(name.encode())} for name in folders
        ]
        found += [_entry(path, data) for path, data in inside.items()]
        return self._json([e for e in found if recursive or "/" not in str(e["path"])[len(start) :]])

    def _answer_fault(self, fault: int | str) -> None:
        if isinstance(fault, int):
            return self._fail(fault, "", {"Retry-After": str(self.hub.retry_after)})
        threading.Event().wait(1)  # longer than the clients' timeouts
        self.close_connection = True
        return None

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"", {**(headers or {}), **({"X-Error-Code": code} if code else {})})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], file: str = "", drop: bool = False
    ) -> None:
        sent = body[: len(body) // 2] if drop else body
        size = len(sent) if file and self.command == "GET" else 0
        self.hub.requests.append(Request(self.command, self.path, size))
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
        self.close_connection |= drop


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _sha(data)[:40]}
    if path.endswith(_LFS):
        entry["lfs"] = {"oid": _sha(data), "size": len(data), "pointerSize": 130}
    return entry
