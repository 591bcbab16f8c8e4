"""Hash and n-gram search against brute force."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from tests.evaluate.evaluation_runs import noise

from solo_vlm.evaluate.contamination.matching import HashIndex, NgramIndex, perceptual_hash


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.mark.parametrize("distance", [0, 1, 4, 10, 16])
def test_hash_index_matches_brute_force(distance):
    rng = np.random.default_rng(distance)
    known = [int(value) for value in rng.integers(0, 2**64, 500, dtype=np.uint64)]
    asked = []
    for value in known[:200]:
        flipped = rng.choice(64, int(rng.integers(0, 20)), replace=False)
        asked.append(value ^ sum(1 << int(bit) for bit in flipped))
    index = HashIndex(((value, number) for number, value in enumerate(known)), distance)
    hits = 0
    for value in asked:
        bits = [(value ^ other).bit_count() for other in known]
        expected = [(number, count) for number, count in enumerate(bits) if count <= distance]
        assert sorted(index.near(value)) == expected
        hits += len(expected)
    assert 0 < hits < len(asked) * 2


def test_hash_tolerates_resizing_and_compression_only():
    original = noise(7, 320, 240)
    copies = [original.resize((100, 75)), original.convert("L").convert("RGB"), original.resize((640, 480))]
    copies.append(Image.open(BytesIO(jpeg(original, 30))))
    distances = [(perceptual_hash(original) ^ perceptual_hash(copy)).bit_count() for copy in copies]
    assert max(distances) <= 4
    others = [
        (perceptual_hash(original) ^ perceptual_hash(noise(n, 320, 240))).bit_count() for n in range(8, 40)
    ]
    assert min(others) > 10


def test_ngram_length_follows_question_lengths():
    words = [f"w{n}" for n in range(40)]
    texts = {("short", "1"): " ".join(words[:7]), ("middle", "1"): " ".join(words[:10])}
    texts |= {("long", str(n)): " ".join(words[n:]) for n in range(3)}
    overlap = NgramIndex.of(texts)
    assert overlap.lengths == {"short": 8, "middle": 10, "long": 13}
    assert overlap.compared == {"short": 0, "middle": 1, "long": 3}
    runs = overlap.find("W0, w1 (w2) w3; w4 w5 w6 -- w7 w8 w9!")
    assert [overlap.questions[run] for run in runs] == [[("middle", "1")]]
    assert overlap.find(" ".join(words[:9])) == set()
    assert overlap.find(" ".join(words[20:33])) == {" ".join(words[20:33])}
