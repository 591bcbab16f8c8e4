"""Draw the documentation's diagrams and screenshots: `make docs-assets`, after `make quickstart`.

Everything is real: the page of `solo serve` with the quickstart's model, the report that the quickstart
wrote, an evaluation of its model on held-out digits in the format of MMStar, answers while its last stage
trains, and the report of the ablation whose results are in `benchmarks/results/`. Chromium draws them; npm
provides Mermaid for the diagrams.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from diagrams import DOCS, find_diagrams
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = DOCS.parent
ASSETS = DOCS / "assets"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MERMAID = "mermaid@11"
WIDTH = 1100
ABLATION = "no-stage1"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def draw_diagrams(browser: Browser, quickstart: Path) -> None:
    """Render every Mermaid diagram of the documentation to SVG."""
    folder = ASSETS / "diagrams"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    page = browser.new_page()
    page.set_content("<body></body>")
    page.add_script_tag(content=_mermaid())
    for source, path in find_diagrams():
        svg = page.evaluate(
            """async (source) => {
                mermaid.initialize({ startOnLoad: false, theme: "neutral", htmlLabels: false,
                                     flowchart: { htmlLabels: false, rankSpacing: 28, wrappingWidth: 320 } });
                document.body.innerHTML = (await mermaid.render("diagram", source)).svg;
                const svg = document.querySelector("svg");
                svg.style.background = "white";
                svg.setAttribute("width", svg.viewBox.baseVal.width);
                return new XMLSerializer().serializeToString(svg);
            }""",
            source,
        )
        path.write_text(svg + "\n", encoding="utf-8")


def _mermaid() -> str:
    """Fetch Mermaid from the npm registry."""
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(
            ["npm", "pack", "--silent", MERMAID], cwd=folder, check=True, capture_output=True, text=True
        )
        with tarfile.open(Path(folder, packed.stdout.split()[-1])) as archive:
            script = archive.extractfile("package/dist/mermaid.min.js")
            assert script is not None
            return script.read().decode()


def draw_page(browser: Browser, quickstart: Path) -> None:
    """Ask about a held-out image on the page of `solo serve`, and choose a word of the answer."""
    rows = pq.read_table(quickstart / "data" / "heldout_captions.parquet").to_pylist()
    image = max((row["images"][0]["bytes"] for row in rows), key=_area)
    with tempfile.TemporaryDirectory() as folder, _serve(quickstart / "sft" / "model") as address:
        picture = Path(folder, "scene.png")
        picture.write_bytes(image)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(address)
        page.wait_for_selector("#model:not(:empty)")
        page.set_input_files("#file", picture)
        page.wait_for_selector("#pending img")
        page.fill("#prompt", "Describe the image.")
        page.click("#send")
        words = page.locator(".assistant .word")
        page.locator("#send:visible").wait_for()
        words.last.wait_for()
        words.last.click()
        page.wait_for_selector(".word[aria-pressed=true]")
        _save(page, "web.png", full_page=False)


def _area(image: bytes) -> int:
    width, height = Image.open(io.BytesIO(image)).size
    return width * height


@contextmanager
def _serve(model: Path) -> Iterator[str]:
    """Run the server, and yield the address of its page."""
    command = [sys.executable, "-m", "solo_vlm", "web", "--no-open", "--model", str(model), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"http://[\w.:\[\]]+", line):
                yield found[0]
                return
        raise SystemExit("solo web did not start")
    finally:
        process.terminate()
        process.wait(60)


def draw_quickstart_report(browser: Browser, quickstart: Path) -> None:
    """Take a picture of the report that `solo quickstart` wrote."""
    _save_report(browser, quickstart / "report.html", "quickstart-report.png")


def draw_evaluation_report(browser: Browser, quickstart: Path) -> None:
    """Evaluate the quickstart's model on held-out digits, as questions in MMStar's format."""
    rows = pq.read_table(quickstart / "data" / "heldout_digits.parquet").to_pylist()[:40]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data", "mmstar")
        data.mkdir(parents=True)
        questions = [_question(number, row) for number, row in enumerate(rows)]
        pq.write_table(pa.Table.from_pylist(questions), data / "val.parquet")
        out = Path(folder, "eval")
        model = ["--model", quickstart / "sft" / "model", "--max-new-tokens", 8]
        _solo("eval", "run", *model, "--tasks", "mmstar", "--data-root", data.parent, "--out", out)
        _save_report(browser, out / "report.html", "evaluation-report.png")


def _question(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """Turn a held-out digit into a question with four options."""
    answer = DIGITS.index(row["messages"][-1]["content"][0]["text"])
    options = [DIGITS[(answer + 3 * (place - number % 4)) % 10] for place in range(4)]
    listed = ", ".join(f"{letter}: {option}" for letter, option in zip("ABCD", options, strict=True))
    return {
        "index": number,
        "question": f"Which digit is this?\nOptions: {listed}",
        "image": row["images"][0],
        "answer": "ABCD"[number % 4],
        "category": "fine-grained perception",
        "l2_category": "recognition",
        "meta_info": {"source": "digits", "split": "val", "image_path": f"images/{number}.png"},
    }


def draw_answers(browser: Browser, quickstart: Path) -> None:
    """Repeat the start of the quickstart's last stage, with questions about held-out images."""
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name in ("digits", "qa"):
            rows = pq.read_table(quickstart / "data" / f"heldout_{name}.parquet").to_pylist()
            asked = [row for row in rows if len(row["messages"]) == 2]
            files[name] = f"{folder}/{name}.parquet"
            pq.write_table(pa.Table.from_pylist(list(map(_asked, asked))), files[name])
        out = Path(folder, "sft")
        validation = {"questions": files, "interval": 10, "samples": 5, "best": "digits/accuracy"}
        changes = [
            "steps=40",
            f"root={quickstart.resolve()}",
            f"out={out}",
            f"validation={json.dumps(validation)}",
        ]
        _solo("train", "quickstart/sft", *changes)
        _save_report(browser, out / "answers.html", "training-answers.png")


def _asked(row: dict[str, Any]) -> dict[str, Any]:
    """Turn a held-out sample of one turn into a question."""
    question, answer = (
        " ".join(part["text"] for part in message["content"] if part["type"] == "text")
        for message in row["messages"]
    )
    return {"images": row["images"], "question": question, "answer": answer}


def draw_ablation_report(browser: Browser, quickstart: Path) -> None:
    """Write the report of an ablation from its results in `benchmarks/results/`."""
    from solo_vlm.experiments.ablations.report import Comparison, Report, write_report
    from solo_vlm.experiments.ablations.settings import Ablation

    results = ROOT / "benchmarks" / "results" / "ablations-cpu.json"
    facts = json.loads(results.read_text(encoding="utf-8"))["reports"][ABLATION]
    report = Report(
        Ablation.load(ABLATION),
        facts["fraction"],
        {name: variant["steps"] for name, variant in facts["variants"].items()},
        [
            Comparison(name, metric["kind"], metric["n"], metric["values"])
            for name, metric in facts["metrics"].items()
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        write_report(report, Path(folder))
        _save_report(browser, Path(folder, "report.html"), "ablation-report.png")


def draw_patch_grid(browser: Browser, quickstart: Path) -> None:
    """Draw the patch grid over scikit-learn's photograph of a temple."""
    import sklearn.datasets

    photo = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"
    _solo("inspect", "--image", photo, "--out", ASSETS / "patch_grid.png")
    _shrink(ASSETS / "patch_grid.png")


def _solo(*arguments: Any) -> None:
    subprocess.run([sys.executable, "-m", "solo_vlm", *map(str, arguments)], check=True)


def _save_report(browser: Browser, report: Path, name: str) -> None:
    page = browser.new_page(viewport={"width": WIDTH, "height": 900})
    page.goto(report.resolve().as_uri())
    _save(page, name)


def _save(page: Page, name: str, full_page: bool = True) -> None:
    """Save a screenshot of at most 1,400 pixels in height as a small PNG."""
    page.wait_for_timeout(300)
    size = page.viewport_size
    assert size is not None
    height = page.evaluate("document.documentElement.scrollHeight") if full_page else size["height"]
    page.set_viewport_size({"width": size["width"], "height": min(height, 1400)})
    page.screenshot(path=ASSETS / name)
    page.close()
    _shrink(ASSETS / name)


def _shrink(path: Path) -> None:
    """Reduce a picture to 256 colors."""
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


DRAW: dict[str, Callable[[Browser, Path], None]] = {
    "diagrams": draw_diagrams,
    "patch-grid": draw_patch_grid,
    "page": draw_page,
    "quickstart": draw_quickstart_report,
    "evaluation": draw_evaluation_report,
    "answers": draw_answers,
    "ablation": draw_ablation_report,
}


def main() -> None:
    """Draw the named pictures, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*", choices=[*DRAW, []], help="pictures to draw; default: all")
    parser.add_argument(
        "--quickstart", type=Path, default=Path("runs/quickstart"), help="a finished quickstart"
    )
    arguments = parser.parse_args()
    if not (executable := next(filter(None, map(shutil.which, BROWSERS)), None)):
        raise SystemExit("no Chromium on the PATH; on Debian or Ubuntu: apt-get install chromium")
    if not (arguments.quickstart / "metrics.json").is_file():
        raise SystemExit(f"{arguments.quickstart} has no finished quickstart; run `make quickstart`")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for name in arguments.names or DRAW:
            print(f"docs-assets: {name}", flush=True)
            DRAW[name](browser, arguments.quickstart)


if __name__ == "__main__":
    main()
