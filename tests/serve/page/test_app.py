"""The requests of the page, over HTTP: limits hold, errors are one line, nothing is loaded from elsewhere."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import pytest
from tests.factories import png

pytest.importorskip("starlette", reason="the page's server needs starlette: pip install 'solo-vlm[web]'")
from starlette.testclient import TestClient

from solo_vlm.serve.page.app import make_app
from solo_vlm.serve.page.worker import Worker


@pytest.fixture
def client(make_service):
    with TestClient(make_app(make_service(image_bytes=20_000, characters=1000))) as client:
        yield client


def events(response):
    return [json.loads(line) for line in response.text.splitlines()]


def test_an_image_and_a_question_about_it(client, picture):
    image = client.post("/api/images", content=png(picture(64, 64))).json()
    seen = client.get(f"/api/images/{image['id']}")
    assert seen.headers["content-type"] == "image/png"
    turn = {"role": "user", "text": "what is this?", "images": [image["id"]]}
    response = client.post("/api/answer", json={"turns": [turn], "max_new_tokens": 5})
    begin, *texts, end = events(response)
    assert begin == {"event": "begin"}
    assert end["event"] == "end"
    assert "".join(event["text"] for event in texts).strip() == end["answer"]
    assert end["vision_tokens"] == image["tokens"] == 7
    turns = [turn, {"role": "assistant", "text": end["answer"], "images": []}]
    told = client.post("/api/attention", json={"turns": turns, "start": 0, "end": 1}).json()
    assert len(told["images"][0]["weights"]) == 4
    assert client.delete(f"/api/images/{image['id']}").status_code == 200
    assert client.get(f"/api/images/{image['id']}").status_code == 400


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("images", b"not an image", 400, "not an image of a known format"),
        ("images", b"x" * 20_001, 413, "larger than the limit"),
        ("answer", b"x" * 80_000, 413, "larger than the limit"),
        ("answer", b"{", 422, "Invalid JSON"),
        ("answer", b'{"turns": []}', 400, "turns alternate"),
        ("answer", b'{"turns": [{"role": "system", "text": "x"}]}', 422, "turns.0.role"),
        ("answer", b'{"turns": [{"role": "user", "text": "x"}], "temperature": NaN}', 422, "temperature"),
        (
            "answer",
            b'{"turns": [{"role": "user", "text": "x"}], "max_new_tokens": 9999}',
            400,
            "at most 1024",
        ),
        (
            "attention",
            b'{"turns": [{"role": "user", "text": "x"}], "start": 0, "end": 1}',
            400,
            "assistant's",
        ),
        ("nothing", b"", 404, "Not Found"),
    ],
)
def test_errors_are_one_line(client, path, body, status, message):
    response = client.post(f"/api/{path}", content=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert message in error
    assert "\n" not in error


def test_a_full_queue_and_a_failure_are_told(client, monkeypatch):
    question = {"turns": [{"role": "user", "text": "x"}]}
    monkeypatch.setattr("solo_vlm.generate.GenerationPipeline.stream", lambda *_, **__: 1 / 0)
    assert events(client.post("/api/answer", json=question))[-1] == {
        "event": "error",
        "error": "this failed on the server: ZeroDivisionError",
    }
    monkeypatch.setattr(Worker, "submit", Worker(waiting=-1).submit)
    response = client.post("/api/answer", json=question)
    assert response.status_code == 429
    assert "try again" in response.json()["error"]


def test_other_sites_are_refused(client):
    for origin, status in (("same-origin", 200), ("none", 200), ("cross-site", 403), ("same-site", 403)):
        assert client.get("/api/model", headers={"Sec-Fetch-Site": origin}).status_code == status


def test_the_page_is_complete_and_loads_nothing_from_elsewhere(client):
    page = client.get("/").text
    folder = files("solo_vlm.serve.page").joinpath("page")
    sources = {path.name: path.read_text() for path in folder.iterdir()}
    for name in sources:
        assert client.get(f"/page/{name}").text == sources[name]
    for text in sources.values():
        assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"// .*", "", text))
    assert set(re.findall(r'(?:href|src)="/page/([^"]+)"', page)) <= set(sources)
    ids = set(re.findall(r'id="([\w-]+)"', page))
    scripts = "".join(text for name, text in sources.items() if name.endswith(".js"))
    used = set(re.findall(r'(?:\$|getElementById)\("([\w-]+)"\)', scripts))
    assert used <= ids
