"""Reports of a run: their content, and that they are self-contained."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image
from tests.evaluate.benchmark_rows import correct_response
from tests.evaluate.evaluation_runs import ScriptedBackend, open_task, write_data_root

from solo_vlm.evaluate.benchmarks import get
from solo_vlm.evaluate.report import PUBLISHED, category_plot
from solo_vlm.evaluate.run import EvaluationRun, ModelInfo

NASTY = "<script>alert(1)</script> | B"


class Page(HTMLParser):
    """Texts of table cells and sources of images."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.images: list[str] = []
        self.tags: set[str] = set()
        self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data}".strip()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run two tasks; every fourth response is wrong and hostile."""
    folder = tmp_path_factory.mktemp("report")
    write_data_root(folder / "data", ["mmstar", "mme"])
    tasks = [(get(task), open_task(task, folder / "data", folder / "cache")) for task in ("mmstar", "mme")]
    run = EvaluationRun(folder / "out", ModelInfo("my <model>", "test", "ab" * 32), max_new_tokens=16)

    class ByTask(ScriptedBackend):
        def generate(self, requests):
            requests = list(requests)
            text = requests[0].messages[0]["content"][-1]["text"]
            benchmark, rows = tasks[0] if "option's letter" in text else tasks[1]
            correct = [correct_response(benchmark.name, row) for row in rows.columns]
            self.answers = [NASTY if n % 4 == 0 else response for n, response in enumerate(correct)]
            return super().generate(requests)

    scores, _ = run.evaluate(ByTask([]), tasks)
    return folder / "out", scores


def test_report_shows_published_scores(finished):
    out, scores = finished
    page = Page((out / "report.html").read_text())
    header, own, *others = page.rows[:6]
    assert header[1:] == [score.name for score in scores]
    assert own[0] == "my <model>"
    assert own[1].startswith(f"{scores[0].score:.1f}")
    named = {row[0]: row[1:] for row in others}
    assert named["SOLO-7B published"] == ["35.5 unverified", "1,260.0"]
    assert named["LLaVA-1.5-7B published"] == ["33.1", "1,859.0"]
    assert named["EVEv2-7B published"] == ["", "1,709.0"]
    assert named["NEO-9B published"] == ["62.4", ""]


def test_published_scores_belong_to_known_benchmarks():
    for model in PUBLISHED:
        for task, score in model.scores.items():
            assert 0 < score < get(task).maximum
        assert model.unverified <= model.scores.keys()


def test_report_is_self_contained_without_scripts(finished):
    html = (finished[0] / "report.html").read_text()
    page = Page(html)
    assert page.tags.isdisjoint({"script", "link", "iframe"})
    assert "&lt;script&gt;" in html
    assert page.images
    kinds = {"image/png": 0, "image/jpeg": 0}
    for source in page.images:
        header, _, data = source.partition(",")
        kind = re.fullmatch(r"data:(image/\w+);base64", header)[1]
        image = Image.open(BytesIO(base64.b64decode(data)))
        assert image.get_format_mimetype() == kind
        kinds[kind] += 1
    assert kinds["image/png"] == 2  # one plot per task
    assert kinds["image/jpeg"] >= 2 * 12


def test_report_shows_prompt_extracted_answer_and_reference(finished):
    html = (finished[0] / "report.html").read_text()
    assert "Wrong answers: 8 of 8" in html
    assert "Correct answers: 12 of 22" in html
    assert "extracted nothing, reference yes" in html
    assert "Please answer yes or no" not in html  # lmms-eval replaces it
    assert "Answer the question using a single word or phrase." in html


def test_report_shows_the_run_metadata(finished):
    out, _ = finished
    rows = dict(row for row in Page((out / "report.html").read_text()).rows if len(row) == 2)
    facts = json.loads((out / "run.json").read_text())
    assert rows["sha256"] == "ab" * 32
    for name, version in facts["versions"].items():
        assert rows[name] == version
    assert rows["max_new_tokens"] == "16"


def test_markdown_has_the_same_tables(finished):
    out, scores = finished
    lines = (out / "report.md").read_text().splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert tables[0] == f"| model | {scores[0].name} | {scores[1].name} |"
    assert {line.count("|") for line in tables[:7]} == {4}
    for score in scores:
        low, high = score.interval
        assert f"**{score.score:,.1f}** ({low:,.1f} to {high:,.1f})" in tables[2]
        for name, part in score.breakdown.items():
            assert any(line.startswith(f"| {name} | {part.group} | {part.score:,.1f} |") for line in tables)


def test_plot_grows_with_the_number_of_categories(finished):
    sizes = [tuple(category_plot(score).get_size_inches()) for score in finished[1]]
    parts = [len(score.breakdown) for score in finished[1]]
    assert sizes[0][0] == sizes[1][0]
    assert (sizes[0][1] > sizes[1][1]) == (parts[0] > parts[1])
