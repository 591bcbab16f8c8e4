"""The page in a real browser, with the real server and a model trained to name colors.

Screenshots are left in `test-artifacts/web`.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.request import urlopen

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tests.factories import ROOT, make_solo, png, run_settings

pytestmark = pytest.mark.browser

ARTIFACTS = ROOT / "test-artifacts" / "web"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
QUESTION = "what is this?"


def sentence(color):
    return f"hello {color} world, a {color} square"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a model that names the color of an image of two patches."""
    from solo_vlm.train import Recipe, train

    folder = tmp_path_factory.mktemp("model")
    rows = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": sentence(color)}]},
            ],
            "images": [{"bytes": png(Image.new("RGB", (64, 32), color)), "path": None}],
        }
        for color in ("red", "blue") * 16
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "images.parquet", row_group_size=4)
    make_solo().save(folder / "start")
    recipe = run_settings(folder, folder / "out", model="start", steps=60, checkpoint={"save_interval": 60})
    recipe["data"]["sources"] = [{"path": "images.parquet"}]
    return train(Recipe.parse(recipe)).model


@contextmanager
def running(model, folder, *options, **environment):
    """Run `solo web` without opening the page; yield its address."""
    command = [sys.executable, "-m", "solo_vlm", "web", "--model", str(model), "--port", "0", "--no-open"]
    environment = {**os.environ, "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1", **environment}
    process = subprocess.Popen(
        [*command, *options], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        address = re.search(r"http://\S+", process.stdout.readline())
        assert address, "the server did not start"
        yield address[0]
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    """Yield the address of a running `solo web` that writes no file."""
    folder = tmp_path_factory.mktemp("server")
    with running(trained, folder, "--max-image-mib", "1") as address:
        yield address
        assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip("no Chromium on the PATH: on Debian or Ubuntu, apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # Containers often lack what Chromium's sandbox needs; the page is our own.
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=SIZES)
def size(request):
    return request.param


@pytest.fixture
def page(browser, server, size):
    """Open the page; scripts must not fail, and only its server may be contacted."""
    width, height = SIZES[size]
    phone = {"device_scale_factor": 2, "has_touch": True, "is_mobile": True} if size == "phone" else {}
    context = browser.new_context(viewport={"width": width, "height": height}, **phone)
    page = context.new_page()
    failures, requested = [], []
    page.on("pageerror", lambda error: failures.append(error))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(server)
    page.wait_for_selector("#model:not(:empty)")
    yield page
    context.close()
    assert not failures
    assert not [url for url in requested if not url.startswith((server, "data:"))]


@pytest.fixture
def keep(page, size):
    """Return a function that takes a screenshot and checks that everything fits the width."""
    ARTIFACTS.mkdir(parents=True, exist_ok=True)

    def take(name):
        page.wait_for_timeout(200)
        page.screenshot(path=ARTIFACTS / f"{name}-{size}.png")
        widths = "[document.documentElement.scrollWidth, ...Array.from(document.querySelectorAll("
        widths += "'button, label, p, img, textarea, canvas, select'), e => e.getBoundingClientRect().right)]"
        assert max(page.evaluate(widths)) <= SIZES[size][0]

    return take


def drop(page, data, name="image.png"):
    """Drop a file on the page, like a file manager."""
    page.evaluate(
        """([data, name]) => {
            const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], name));
            const options = { dataTransfer, bubbles: true, cancelable: true };
            document.body.dispatchEvent(new DragEvent("drop", options));
        }""",
        [base64.b64encode(data).decode(), name],
    )


def picture(color, width=64, height=32):
    return png(Image.new("RGB", (width, height), color))


def ask(page, text=QUESTION):
    asked = page.locator(".metrics").count()
    page.fill("#prompt", text)
    page.click("#send")
    page.locator(".metrics").nth(asked).wait_for()


def text_of(page, selector):
    return page.inner_text(selector).replace("\xa0", " ")


def opaque(page, canvas):
    """Return the drawn columns of a canvas, as shares of its width."""
    return page.evaluate(
        """(id) => {
            const canvas = document.getElementById(id);
            const row = canvas.getContext("2d").getImageData(0, 0, canvas.width, 1).data;
            const columns = [...Array(canvas.width).keys()].filter((x) => row[4 * x + 3]);
            return columns.map((x) => x / canvas.width);
        }""",
        canvas,
    )


def test_dropped_image_shows_its_patch_grid(page, keep):
    assert page.is_visible("#drop")
    keep("empty")
    drop(page, picture("red", 300, 100))
    page.wait_for_selector("#pending img")
    assert (
        text_of(page, "#layout") == "300 × 100 pixels · seen as 320 × 128 · 4 × 10 = 40 patches · 45 tokens"
    )
    lines = opaque(page, "lines")
    assert {round(10 * place) for place in lines} == set(range(1, 10))
    assert all(abs(10 * place - round(10 * place)) < 0.1 for place in lines)
    keep("grid")
    page.uncheck("#grid")
    assert opaque(page, "lines") == []


def test_answer_is_streamed_and_measured(page, keep):
    page.evaluate(
        """() => {
            window.seen = [];
            const look = () => window.seen.push(document.querySelector(".assistant p")?.textContent);
            const watched = { childList: true, characterData: true, subtree: true };
            new MutationObserver(look).observe(document.getElementById("transcript"), watched);
        }"""
    )
    drop(page, picture("blue"))
    page.wait_for_selector("#pending img")
    ask(page)
    assert page.inner_text(".assistant p >> nth=0") == sentence("blue")
    growing = [text for text in page.evaluate("window.seen") if text and sentence("blue").startswith(text)]
    assert len(set(growing)) >= 4
    assert growing == sorted(growing, key=len)
    metrics = text_of(page, ".metrics")
    assert re.fullmatch(
        r"\d+ text \+ 4 vision tokens( \(\d+ cached\))? · answer \d+ · first token \d+ ms · \d+ tokens/s",
        metrics.replace(".", ""),
    ), metrics
    keep("answer")


def test_word_shows_its_attention(page, keep, size):
    drop(page, picture("red"))
    page.wait_for_selector("#pending img")
    ask(page)
    assert opaque(page, "heat") == []
    word = page.locator(".word", has_text="red").first
    with page.expect_response("**/api/attention") as answered:
        word.click()
    page.wait_for_selector(".word[aria-pressed=true]")
    left, right = answered.value.json()["images"][0]["weights"]
    assert page.inner_text("#word") == "red"
    share = float(re.match(r"([\d.]+)%", page.inner_text("#share"))[1])
    assert share == pytest.approx(100 * (left + right), abs=0.5)
    colors = page.evaluate(
        """() => {
            const canvas = document.getElementById("heat");
            const at = (x) => [...canvas.getContext("2d").getImageData(x, 2, 1, 1).data].slice(0, 3);
            return [at(2), at(canvas.width - 2)];
        }"""
    )
    brightest = [255, 236, 140]
    assert (colors[0] == brightest, colors[1] == brightest) == (left >= right, right >= left)
    box = page.locator("#picture").bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= SIZES[size][1]  # visible, next to the word
    keep("attention")
    with page.expect_response("**/api/attention") as answered:
        page.select_option("#layer", "1")
    assert answered.value.json()["images"][0]["weights"] != [left, right]
    page.click("#clear")
    assert opaque(page, "heat") == []
    assert not page.is_visible("#attention")


def test_several_images_and_turns_and_a_new_chat(page, keep):
    for color in ("red", "blue"):
        drop(page, picture(color))
        page.wait_for_selector("#pending img")
        ask(page)
    assert page.locator(".assistant").count() == 2
    assert "8 vision tokens" in text_of(page, ".metrics >> nth=1")
    page.locator(".assistant").nth(1).locator(".word").first.click()
    page.wait_for_selector(".word[aria-pressed=true]")
    assert page.locator("#thumbnails button").count() == 2
    assert re.fullmatch(r"[\d.]+%\s+[\d.]+%", page.inner_text("#thumbnails"))
    keep("several")
    page.click("#reset")
    assert page.locator(".turn").count() == 0
    assert page.is_visible("#drop")
    ask(page)
    assert "+ 0 vision tokens" in text_of(page, ".metrics")


def test_errors_are_shown_on_the_page(page, keep):
    drop(page, b"<svg></svg>", "drawing.svg")
    page.wait_for_selector("#error:not([hidden])")
    assert "drawing.svg" in page.inner_text("#error")
    assert "Unsupported image format. Use JPEG, PNG" in page.inner_text("#error")
    drop(page, b"x" * (2**20 + 1), "large.png")
    page.locator("#error", has_text="large.png: larger than the limit of 1 MiB").wait_for()
    drop(page, picture("red", 1024, 1024))
    page.wait_for_selector("#pending img")
    assert not page.is_visible("#error")
    page.fill("#prompt", QUESTION)
    page.click("#send")
    page.wait_for_selector("#error:not([hidden])")
    assert "maximum context length is 512 tokens" in page.inner_text("#error")
    assert page.input_value("#prompt") == QUESTION  # typed text is kept
    keep("error")
    page.click("#pending button")
    ask(page)
    assert not page.is_visible("#error")


def test_page_works_by_keyboard(page):
    """Send, select a word of the answer, and hide its attention, without a pointer."""
    drop(page, picture("red"))
    page.wait_for_selector("#pending img")
    page.focus("#prompt")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    page.wait_for_selector(".metrics")
    page.locator(".turn.user button").focus()
    for key in ("Tab", "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector(".word[aria-pressed=true]")
    page.focus("#clear")
    page.keyboard.press("Enter")
    assert not page.is_visible("#attention")
    assert page.evaluate("document.activeElement.className") == "word"


def test_stop_ends_the_answer_on_the_server(page, server):
    """The text stays, and the model is free for the next request."""

    def running():
        lines = urlopen(f"{server}/metrics", timeout=60).read().decode().splitlines()
        return next(line for line in lines if line.startswith("solo_running ")).endswith(" 1.0")

    page.evaluate(
        """() => {
            const [log, stop] = ["transcript", "stop"].map((id) => document.getElementById(id));
            const atFirstText = () => log.querySelector(".assistant:not(.waiting)") && stop.click();
            new MutationObserver(atFirstText).observe(log, { childList: true, subtree: true });
        }"""
    )
    page.fill("#prompt", QUESTION)
    page.click("#send")
    page.wait_for_selector(".metrics")
    assert page.locator(".metrics").inner_text() == "stopped"
    deadline = time.monotonic() + 30
    while running():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("size", ["desktop", "phone"], indirect=True)
def test_page_asks_for_the_api_key_once(browser, trained, tmp_path, size):
    width, height = SIZES[size]
    with running(trained, tmp_path, SOLO_API_KEY="secret") as address:
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto(address)
        page.wait_for_selector("#locked[open]")
        assert not page.is_visible("#refused")
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=ARTIFACTS / f"key-{size}.png")
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#refused:visible")
        page.keyboard.type("secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#model:not(:empty)")
        assert not page.is_visible("#locked") and not page.is_visible("#error")
        drop(page, picture("red"))
        page.wait_for_selector("#pending img")
        ask(page)
        page.locator(".word").first.click()
        page.wait_for_selector(".word[aria-pressed=true]")
        page.reload()
        page.wait_for_selector("#model:not(:empty)")  # the key lives as long as the tab
        page.close()
