"""Page of samples: pixels, tokens and labels equal the model's inputs."""

from __future__ import annotations

import json
import re

import numpy as np
from tests.factories import png

from solo_vlm.data.encode import Encoder
from solo_vlm.data.sample import parse_sample
from solo_vlm.data.survey.view import seen_images, shown_tokens


def encoded(solo, content: list[dict], *images):
    row = {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a red circle"}],
        "images": [{"bytes": png(image)} for image in images],
    }
    return Encoder(solo.processor)(parse_sample(row))


def test_images_are_reassembled_exactly(solo, picture):
    images = [picture(96, 64), picture(32, 128, seed=1)]  # multiples of the patch size are not resized
    document = encoded(solo, [{"type": "image"}, {"type": "image"}], *images)
    seen = list(seen_images(document))
    assert [image[1:] for image in seen] == [(2, 3), (4, 1)]
    for (image, _, _), original in zip(seen, images, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(original))


def test_tokens_are_shown_with_their_kind(solo, picture):
    document = encoded(solo, [{"type": "image"}, {"type": "text", "text": "what is this?"}], picture(96, 64))
    encoder = Encoder(solo.processor)
    vision = np.isin(document.input_ids, encoder.vision_ids)
    tokens = list(shown_tokens(document, vision, encoder.tokenizer))
    assert sum(token.count for token in tokens) == len(document)
    assert [(token.text, token.count) for token in tokens if token.kind == "vision"] == [
        *(("<vision>", 1), ("<vpatch>", 3), ("<vrow_sep>", 1), ("<vpatch>", 3), ("</vision>", 1))
    ]
    supervised = "".join(token.text for token in tokens if token.kind == "supervised")
    assert supervised.strip().startswith("a red circle")
    assert "what is this?" in "".join(token.text for token in tokens if token.kind == "context")


def test_page_is_self_contained(made, run_data, tmp_path):
    out = tmp_path / "page.html"
    code, stdout, error = run_data("view", made.file, "--out", out, "--samples", 7, "--json")
    assert (code, error) == (0, "")
    assert json.loads(stdout) == {"out": str(out), "samples": 7}
    page = out.read_text()
    assert page.count("<article>") == 7
    assert page.count("src=") == page.count('src="data:image/png;base64,') == 4
    assert len(re.findall(r"captions\.parquet, row group \d+, row \d", page)) == 4
    assert '<span class="supervised">' in page
    assert "http" not in page

    run_data("view", made.file, "--out", tmp_path / "again.html", "--samples", 7)
    run_data("view", made.file, "--out", tmp_path / "other.html", "--samples", 7, "--seed", 1)
    assert (tmp_path / "again.html").read_text() == page
    assert (tmp_path / "other.html").read_text() != page


def test_skipped_rows_are_shown_with_the_reason(broken, run_data, tmp_path):
    out = tmp_path / "page.html"
    assert run_data("view", broken, "--out", out, "--samples", 12)[0] == 0
    page = out.read_text()
    assert "skipped: too-long: " in page
    assert "skipped: schema: " in page
