"""Tasks of lmms-eval's own: task files in a folder, with local data, from the command line."""

from __future__ import annotations

import json
from textwrap import dedent

import datasets
import numpy as np
import pytest
from tests.evaluate.evaluation_runs import noise
from tests.factories import make_solo, png

from solo_vlm.evaluate.run import EvaluationRun, ModelInfo
from solo_vlm.evaluate.run_folder import RunFolder
from solo_vlm.evaluate.stock_tasks import TaskError, TaskFiles, open_stock_task
from solo_vlm.generate import GenerationOutput
from solo_vlm.utils.errors import SoloError

ROWS = 30
COLORS = ("red", "green", "blue")

UTILS = """
    import socket

    calls = []

    def visual(doc):
        return [doc["image"].convert("RGB")]

    def text(doc, lmms_eval_specific_kwargs=None):
        return doc["question"] + "\\nAnswer with one word."

    def score(doc, results):
        is_correct = float(results[0].lower() == doc["answer"])
        return {"accuracy": is_correct, "f1": {"said": results[0], "answer": doc["answer"]}}

    def f1_of_red(results):
        hits = sum(r["said"] == r["answer"] == "red" for r in results)
        found = sum((r["said"] == "red") + (r["answer"] == "red") for r in results)
        return 2 * hits / found if found else 0.0

    def total(results):  # not a function of its argument alone
        calls.extend(results)
        return float(len(calls))

    def submit(results, args):
        return None

    def ask_judge(doc, results):
        try:
            socket.create_connection(("judge.example.com", 443), timeout=5)
        except Exception:  # goes on and guesses, as lmms-eval's judges do
            pass
        return {"accuracy": 1.0}
"""
TASK = """
    task: {name}
    dataset_path: parquet
    dataset_kwargs:
      data_files: {{test: {data}}}
    test_split: test
    output_type: {output_type}
    doc_to_visual: !function {utils}.visual
    doc_to_text: !function {utils}.text
    doc_to_target: answer
    generation_kwargs: {{max_new_tokens: 3, until: ["#"]}}
    process_results: !function {utils}.{process}
    metric_list: {metrics}
"""
METRICS = """
      - {metric: accuracy, aggregation: mean, higher_is_better: true}
      - {metric: f1, aggregation: !function utils.f1_of_red, higher_is_better: true}
"""


def write_data(path, change=None):
    rows = [
        {
            "image": {"bytes": png(noise(number, 32, 32)), "path": None},
            "question": f"Which color has picture {number}?",
            "answer": COLORS[number % 3],
            **(change or {}),
        }
        for number in range(ROWS)
    ]
    strings = {name: datasets.Value("string") for name in ("question", "answer")}
    features = datasets.Features({"image": datasets.Image(), **strings})
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write task files: one that works, others that cannot."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data" / "test.parquet"
    write_data(data)
    (folder / "utils.py").write_text(dedent(UTILS))
    (folder / "other.py").write_text("import no_such_package\n" + dedent(UTILS))
    usual = {
        "output_type": "generate_until",
        "utils": "utils",
        "process": "score",
        "data": data,
        "metrics": METRICS,
    }
    only = METRICS.partition("\n      - {metric: f1")[0]
    tasks = {
        "colors": {},
        "judged": {"process": "ask_judge", "metrics": only},
        "packaged": {"utils": "other", "metrics": only},
        "likely": {"output_type": "multiple_choice"},
        "empty": {"data": folder / "missing.parquet"},
        "counted": {"metrics": METRICS.replace("f1_of_red", "total")},
        "submitted": {
            "metrics": METRICS.replace("aggregation: mean", "aggregation: !function utils.submit").replace(
                "f1_of_red", "submit"
            )
        },
    }
    for name, change in tasks.items():
        (folder / f"{name}.yaml").write_text(dedent(TASK.format(**{**usual, **change, "name": name})))
    (folder / "both.yaml").write_text("group: both\ntask: [colors, judged]\n")
    return folder


class Scripted:
    """Backend that answers each request by its row, and records the requests."""

    def __init__(self, answer, stop_after=None):
        self.answer, self.stop_after, self.asked = answer, stop_after, []

    def generate(self, requests):
        for request in requests:
            if self.stop_after is not None and len(self.asked) == self.stop_after:
                raise SoloError("the server is offline")
            self.asked.append(request)
            yield [GenerationOutput(request.request_id, self.answer(request.request_id))]


def opened(folder, name, data_root=None):
    ((task, file),) = TaskFiles(folder).resolve(name).items()
    return open_stock_task(task, file, data_root)


def mostly_right(row):
    return "red" if row % 5 == 0 else COLORS[row % 3]


def run_task(folder, name, out, backend):
    run = EvaluationRun(out, ModelInfo("scripted", "test", "0" * 64))
    return run.evaluate(backend, [opened(folder, name)])


def test_own_metrics_with_intervals_prompts_limits_and_predictions(folder, tmp_path):
    backend = Scripted(mostly_right)
    (score,), failed = run_task(folder, "colors", tmp_path, backend)
    said = [mostly_right(row) for row in range(ROWS)]
    correct = np.array([answer == COLORS[row % 3] for row, answer in enumerate(said)])
    assert failed == {}
    assert (score.task, score.n, score.expected_n, score.score) == ("colors", ROWS, ROWS, correct.mean())
    assert score.interval[0] < correct.mean() < score.interval[1]
    f1 = score.breakdown["f1"]
    assert f1.score == pytest.approx(2 * 10 / (said.count("red") + 10))
    assert f1.interval[0] < f1.score < f1.interval[1]
    assert backend.asked[0].max_new_tokens == 3
    texts = [part["text"] for part in backend.asked[0].messages[0]["content"] if part["type"] == "text"]
    assert texts == ["Which color has picture 0?\nAnswer with one word."]
    predictions = RunFolder(tmp_path).read_predictions("colors")
    assert [prediction.response for prediction in predictions] == said
    assert [prediction.row["lmms_eval"]["accuracy"] for prediction in predictions] == correct.astype(
        float
    ).tolist()
    assert RunFolder(tmp_path).read_scores() == [score]
    report = (tmp_path / "report.html").read_text()
    assert "colors: 0.8667" in report
    assert "Which color has picture 0?" in report


def test_runs_are_compared_by_question(folder, tmp_path, run):
    run_task(folder, "colors", tmp_path / "a", Scripted(mostly_right))
    run_task(folder, "colors", tmp_path / "b", Scripted(lambda row: COLORS[row % 3]))
    code, printed, _ = run("eval", "compare", tmp_path / "a", tmp_path / "b", "--json")
    assert code == 0
    (task,) = json.loads(printed)["tasks"]
    assert (task["n"], task["second"], task["only_first"], task["only_second"]) == (ROWS, 1, 0, 4)
    assert task["difference"] == pytest.approx(4 / ROWS)
    assert task["interval"][0] < task["difference"] < task["interval"][1]


def test_interrupted_task_resumes(folder, tmp_path):
    with pytest.raises(SoloError, match="offline"):
        run_task(folder, "colors", tmp_path, Scripted(mostly_right, stop_after=12))
    backend = Scripted(mostly_right)
    (score,), _ = run_task(folder, "colors", tmp_path, backend)
    assert [request.request_id for request in backend.asked] == list(range(12, ROWS))
    assert score.n == ROWS


def test_data_root_replaces_the_data_of_a_task(folder, tmp_path):
    write_data(tmp_path / "empty" / "test-00000-of-00001.parquet", {"answer": "red"})
    task = opened(folder, "empty", tmp_path)
    run = EvaluationRun(tmp_path / "out", ModelInfo("scripted", "test", "0" * 64))
    (score,), _ = run.evaluate(Scripted(lambda row: "Red"), [task])
    assert score.score == 1.0


def test_aggregation_with_a_memory_has_no_interval(folder, tmp_path):
    (score,), _ = run_task(folder, "counted", tmp_path, Scripted(mostly_right))
    assert score.breakdown["f1"].interval is None
    assert score.interval is not None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("judged", "its scorer connects to judge.example.com; tasks that need a judge"),
        ("packaged", "a package is missing: No module named 'no_such_package'"),
        ("likely", "its output_type multiple_choice is not supported"),
        ("empty", "FileNotFoundError: "),
    ],
)
def test_task_that_cannot_run_is_rejected_before_any_response(folder, name, reason):
    with pytest.raises(TaskError, match=reason):
        opened(folder, name)


def test_task_without_a_number_has_no_score(folder, tmp_path):
    with pytest.raises(SoloError, match="submitted: it has no score"):
        run_task(folder, "submitted", tmp_path, Scripted(mostly_right))
    assert len(RunFolder(tmp_path).read_predictions("submitted")) == ROWS


def test_group_is_resolved_to_its_tasks(folder):
    files = TaskFiles(folder).resolve("both")
    assert {name: file.name for name, file in files.items()} == {
        "colors": "colors.yaml",
        "judged": "judged.yaml",
    }


def test_command_runs_what_it_can_and_fails_with_one_line_per_task(folder, tmp_path, run):
    make_solo().save(tmp_path / "model")
    arguments = ["--model", tmp_path / "model", "--include-path", folder, "--limit", 4]
    tasks = "both,packaged,empty"
    code, stdout, stderr = run(
        "eval", "run", *arguments, "--tasks", tasks, "--out", tmp_path / "out", "--json"
    )
    assert code == 2
    printed = json.loads(stdout)
    assert [score["name"] for score in printed["scores"]] == ["colors (partial: 4 of 30)"]
    assert list(printed["failed"]) == ["judged", "packaged", "empty"]
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert [line.split(":")[1].strip() for line in lines] == ["judged", "packaged", "empty"]
    assert "judge.example.com" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow  # reads two thousand task files
def test_unknown_task_suggests_near_names(folder, tmp_path, run):
    code, _, stderr = run(
        "eval", "run", "--model", tmp_path, "--out", tmp_path / "out", "--tasks", "docvqa_vall"
    )
    assert code == 2
    assert "unknown task docvqa_vall; did you mean docvqa_val or" in stderr
    assert len(stderr.strip().splitlines()) == 1
