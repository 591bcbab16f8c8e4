"""MathVista by rules, and with an LLM judge behind a real HTTP server with OpenAI's API."""

from __future__ import annotations

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from tests.evaluate.benchmark_rows import FLOATS, MATHVISTA_TASKS, correct_response, make_rows, predictions
from tests.evaluate.evaluation_runs import write_data_root
from tests.factories import make_solo

from solo_vlm.evaluate.benchmarks import get
from solo_vlm.evaluate.predictions import Prediction

ENDPOINT = "/v1/chat/completions"


@contextmanager
def server(answer):
    """Run an endpoint whose model answers `answer(prompt)`; yield its URL and the received requests."""
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


def test_llm_judge_extracts_what_rules_cannot(answer):
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


def test_llm_judge_skips_plain_answers_and_takes_the_nearest_option(answer):
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


def test_failing_llm_judge_is_a_one_line_error(answer):
    rows = [{**make_rows("mathvista")[1], "response": "well"}]
    with server(lambda prompt: None) as (url, _):
        code, out, error = answer(rows, url)
    assert (code, out) == (2, "")
    assert "the LLM judge judge-1 at http://127.0.0.1" in error
    assert "no such model" in error


def test_run_with_llm_judge(run, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    make_solo().save(tmp_path / "model")
    data_root = write_data_root(tmp_path / "data", ["mathvista"])
    rows = {row["query"]: row for row in make_rows("mathvista")}

    def correct(prompt):
        (row,) = [row for query, row in rows.items() if query.strip() in prompt]
        return correct_response("mathvista", row)

    with server(correct) as (url, requests):
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
        code, printed, error = run(*command, *options, "--json")
    assert code == 0, error
    assert len(requests) == len(rows)
    (score,) = json.loads(printed)["scores"]
    assert score["score"] == 100.0
    assert "judge-1" in json.dumps(score)


def test_constant_answer_to_mathvista():
    rows = make_rows("mathvista", full=True)
    score = get("mathvista").score(predictions("mathvista", lambda row: "B", full=True))
    assert score.score == pytest.approx(sum(correct_response("mathvista", row) == "B" for row in rows) / 10)
    assert score.unreadable == sum(row["question_type"] == "free_form" for row in rows)


def test_all_float_questions_are_scored():
    answered = predictions(
        "mathvista",
        lambda row: f"It is about {float(row['answer']) + 0.001:.6f}" if row["precision"] else "?",
        full=True,
    )
    score = get("mathvista").score(answered)
    assert (score.breakdown["float"].n, score.breakdown["float"].score) == (FLOATS, 100)
    assert {name: part.n for name, part in score.breakdown.items() if part.group == "task"} == MATHVISTA_TASKS
    assert score.breakdown["logical reasoning"].n == 500


@pytest.mark.parametrize(
    ("answer", "answer_type", "precision", "response", "correct"),
    [
        ("14", "integer", None, "The number is 14.", True),
        ("14", "integer", float("nan"), "14.0", True),
        ("14", "integer", None, "15", False),
        ("0.6", "float", 1.0, "The fraction is 0.6, 6 of 10", False),  # the last number is not the answer
        ("0.6", "float", 1.0, "The answer is 0.6, six of 10", True),
        ("1.45", "float", 2, "Luca needs $1.45", True),
        ("2.50", "float", "2.0", "2.5", True),
        ("1.45", "float", 2.0, "1e999", False),
        ("0.0", "float", 1.0, "-0.04", True),
        ("0.5", "float", 1.0, "The answer is 1/2", True),
        ("-5", "integer", None, "–5", True),
        ("1234", "integer", None, "1{,}234", True),
        ("1,234", "integer", None, "1234", True),
        ("7", "integer", None, "7</s>", True),
        ("12", "integer", None, "3-12", False),
        ("dog", "text", None, "Dog.<|im_end|>", True),
        ("[2007, 2008]", "list", None, "between [2007,2008]", True),
        ("[2007, 2008]", "list", None, "2007", False),
    ],
)
def test_free_form_answers(answer, answer_type, precision, response, correct):
    row = {"question_type": "free_form", "answer_type": answer_type, "precision": precision, "answer": answer}
    assert get("mathvista").score([Prediction("1", response, row)]).score == 100 * correct


def test_only_an_extraction_takes_the_nearest_option():
    row = {
        "question_type": "multi_choice",
        "answer_type": "text",
        "choices": ["hong kong", "osaka"],
        "answer": "osaka",
    }
    mathvista = get("mathvista")
    assert mathvista.score([Prediction("1", "osakaa", row)]).score == 0
    assert mathvista.score([Prediction("1", "so B", {**row, "extraction": "osakaa"})]).score == 100
    assert mathvista.score([Prediction("1", "x", {**row, "extraction": "(B) hong kong"})]).score == 100


def choice_of_mathvista(choices, answer, response, **more):
    row = {"question_type": "multi_choice", "answer_type": "text", "choices": choices, "answer": answer}
    return get("mathvista").score([Prediction("1", response, {**row, **more})])


def test_choices_with_an_empty_one():
    for empty in (None, "", float("nan")):
        for response in ("D", "three", "The answer is (D) three"):
            assert choice_of_mathvista(["two", "one", empty, "three"], "three", response).score == 100
    assert choice_of_mathvista("['two' 'one' nan 'three']", "three", "D").score == 100
    # The empty text would be the nearest to anything short.
    assert choice_of_mathvista(["thee", "", "osaka"], "thee", "x", extraction="hee").score == 100


def test_choices_that_differ_in_case_or_occur_twice():
    assert choice_of_mathvista(["mW", "MW"], "MW", "MW").score == 100
    assert choice_of_mathvista(["mW", "MW"], "MW", "mW").score == 0
    assert choice_of_mathvista(["5", "7", "5"], "5", "C").score == 100
