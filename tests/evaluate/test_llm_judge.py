"""MathVista with a language model that extracts answers, behind a real HTTP server with OpenAI's API."""

from __future__ import annotations

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from tests.evaluate.benchmark_rows import correct_response, make_rows
from tests.evaluate.evaluation_runs import write_data_root
from tests.factories import make_solo

ENDPOINT = "/v1/chat/completions"


@contextmanager
def server(answer):
    """An endpoint whose model answers `answer(prompt)`; yields its URL and the requests as they come."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(request)
            text = answer(request["messages"][0]["content"]) if self.path == ENDPOINT else None
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            body = json.dumps(reply if text is not None else {"error": {"message": "no such model"}}).encode()
            self.send_response(200 if text is not None else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}/v1", requests
        finally:
            http.shutdown()
            thread.join()


@pytest.fixture
def answer(run, tmp_path):
    def score(rows, url):
        path = tmp_path / "x.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["eval", "rescore", "--task", "mathvista", "--predictions", path]
        return run(*command, "--judge", "judge-1", "--judge-url", url, "--json")

    return score


def test_the_model_extracts_what_rules_cannot_read(answer):
    rows = make_rows("mathvista")
    answers = {row["query"]: correct_response("mathvista", row) for row in rows}
    rows = [{**row, "response": f"Let us see. {answers[row['query']]}, or is it 99?"} for row in rows]

    def extract(prompt):
        (query,) = [query for query in answers if f"{query}\nResponse: Let us see." in prompt]
        return answers[query]

    with server(extract) as (url, requests):
        code, out, _ = answer(rows, url)
    assert code == 0
    score = json.loads(out)
    assert score["score"] == 100
    assert "judge-1" in score["metric"]
    assert len(requests) == len(rows)
    assert all(request["model"] == "judge-1" and request["temperature"] == 0 for request in requests)


def test_plain_answers_are_not_sent_and_the_nearest_option_is_taken(answer):
    row = {
        "question_type": "multi_choice",
        "answer_type": "text",
        "choices": ["hong kong", "osaka"],
        "query": "?",
    }
    rows = [
        {**row, "answer": "osaka", "response": "osaka"},
        {**row, "answer": "osaka", "response": "a city in Japan"},
        {**row, "answer": "osaka", "response": "no idea"},
    ]
    with server(lambda prompt: "" if "no idea" in prompt else "oosaka") as (url, requests):
        code, out, _ = answer(rows, url)
    score = json.loads(out)
    assert code == 0
    assert score["score"] == pytest.approx(200 / 3)
    assert score["unreadable"] == 1
    assert len(requests) == 2


def test_an_endpoint_that_fails_is_one_line(answer):
    rows = [{**make_rows("mathvista")[1], "response": "well"}]
    with server(lambda prompt: None) as (url, _):
        code, out, error = answer(rows, url)
    assert (code, out) == (2, "")
    assert "the LLM judge judge-1 at http://127.0.0.1" in error
    assert "no such model" in error


def test_a_run_is_judged(run, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    make_solo().save(tmp_path / "model")
    data_root = write_data_root(tmp_path / "data", ["mathvista"])
    rows = {row["query"]: row for row in make_rows("mathvista")}

    def right(prompt):
        (row,) = [row for query, row in rows.items() if query.strip() in prompt]
        return correct_response("mathvista", row)

    with server(right) as (url, requests):
        command = [
            "eval",
            "run",
            "--model",
            tmp_path / "model",
            "--tasks",
            "mathvista",
            "--out",
            tmp_path / "out",
        ]
        options = ["--data-root", data_root, "--max-new-tokens", 2, "--judge", "judge-1", "--judge-url", url]
        code, printed, said = run(*command, *options, "--json")
    assert code == 0, said
    assert len(requests) == len(rows)
    (score,) = json.loads(printed)["scores"]
    assert score["score"] == 100.0
    assert "judge-1" in json.dumps(score)
