"""What the page can ask for: images within limits, answers with figures, the attention of a word."""

from __future__ import annotations

import math
from io import BytesIO
from threading import Event

import numpy as np
import pytest
from PIL import Image
from tests.factories import ask, png

from solo_vlm.data.encode import Encoder
from solo_vlm.generate import GenerationPipeline
from solo_vlm.models.inspect_image import ImageLayout
from solo_vlm.serve.page.conversation import Question, Turn, WordQuestion
from solo_vlm.serve.page.images import HeldImage, ImageStore
from solo_vlm.serve.page.worker import BusyError, Worker
from solo_vlm.utils.errors import SoloError


def user(text="what is this?", *images):
    return Turn(role="user", text=text, images=images)


def model(text="a red circle"):
    return Turn(role="assistant", text=text)


def answer(service, *turns, tokens=6, should_stop=lambda: False, **options):
    pieces = []
    question = Question(turns=turns, max_new_tokens=tokens, **options)
    return service.answer(question, pieces.append, should_stop), "".join(pieces)


def test_an_upload_is_seen_as_the_model_sees_it(make_service, solo, picture):
    service = make_service()
    image = picture(90, 50)
    told = service.add_image(png(image))
    assert told["original"] == (90, 50)
    assert told["resized"] == (96, 64)
    assert (told["rows"], told["columns"], told["patches"], told["tokens"]) == (2, 3, 6, 9)
    seen = np.asarray(Image.open(BytesIO(service.seen_image(told["id"]))))
    patches = solo.processor.image_processor([image])["pixel_values"]
    assert np.array_equal(seen[32:64, 64:96].transpose(2, 0, 1).ravel(), patches[5])  # the last of six


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (b"<svg/>", "SVG is a drawing"),
        (png(Image.new("RGB", (64, 64)))[:-40], "truncated or damaged"),
        (png(Image.new("L", (101, 100))), "more than the limit of 10,000 pixels"),
        (png(Image.new("L", (2000, 1))), "exceeds max_aspect_ratio=200"),
    ],
)
def test_what_is_no_usable_image_is_refused(make_service, data, message):
    with pytest.raises(SoloError, match=message):
        make_service(pixels=10_000).add_image(data)


def test_an_answer_is_that_of_the_model_and_its_figures_add_up(make_service, solo, picture):
    service, image = make_service(), picture(96, 64)
    name = service.add_image(png(image))["id"]
    reply, streamed = answer(service, user("what is this?", name))
    pipeline = GenerationPipeline(solo.model, solo.processor)
    assert reply["answer"] == pipeline.answer([ask("what is this?", image)], 6)[0]
    assert reply["answer"] == streamed.strip()
    assert reply["vision_tokens"] == 2 * 3 + 2 + 1
    inputs = GenerationPipeline(solo.model, solo.processor).encode([ask("what is this?", image)])
    vision = np.isin(inputs["input_ids"], Encoder(solo.processor).vision_ids)
    assert (reply["text_tokens"], reply["vision_tokens"]) == ((~vision).sum(), vision.sum())
    assert 0 < reply["first_token_seconds"] < math.inf
    assert reply["tokens_per_second"] > 0
    one, _ = answer(service, user(), tokens=1)
    assert one["tokens_per_second"] is None


def test_an_answer_can_be_stopped(make_service):
    reply, _ = answer(make_service(), user(), tokens=50, should_stop=lambda: True)
    assert reply["answer_tokens"] == 1
    assert reply["finish"] == "stopped"


@pytest.mark.parametrize(
    ("turns", "options", "message"),
    [
        ((), {}, "turns alternate"),
        ((model(),), {}, "turns alternate"),
        ((user(), user()), {}, "turns alternate"),
        ((user(), model()), {}, "end here with the user's"),
        ((user("?", "unknown"),), {}, "no longer held: add it again"),
        ((user("?", "a", "b", "c"),), {}, "3 images in this chat, 2 are possible"),
        ((user("x" * 5001),), {}, "5,001 characters in this chat, 5,000 are possible"),
        ((user("a " * 2400),), {}, "the model's context 512: shorten it"),
        ((user(),), {"tokens": 101}, "at most 100 tokens"),
    ],
)
def test_what_cannot_be_answered_is_said(make_service, turns, options, message):
    with pytest.raises(SoloError, match=message):
        answer(make_service(images=2, characters=5000, new_tokens=100), *turns, **options)


def test_the_attention_of_a_word_is_divided_among_images_and_text(make_service, picture):
    service = make_service()
    names = [service.add_image(png(picture(96, 64, seed)))["id"] for seed in range(2)]
    turns = (user("what is this?", *names), model("a red circle"))
    told = service.attention(WordQuestion(turns=turns, start=2, end=5))
    assert [(image["rows"], image["columns"], len(image["weights"])) for image in told["images"]] == [
        (2, 3, 6)
    ] * 2
    for image in told["images"]:
        assert image["share"] == pytest.approx(sum(image["weights"]))
        assert min(image["weights"]) >= 0
    assert sum(image["share"] for image in told["images"]) + told["text_share"] == pytest.approx(1)
    assert 0 < told["text_share"] < 1

    layers = [service.attention(WordQuestion(turns=turns, start=2, end=5, layer=n)) for n in range(2)]
    means = np.mean([layer["images"][1]["weights"] for layer in layers], axis=0)
    np.testing.assert_allclose(told["images"][1]["weights"], means, atol=1e-6)
    other = service.attention(WordQuestion(turns=turns, start=6, end=12))
    assert other["images"][0]["weights"] != told["images"][0]["weights"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 3, "end": 3}, "not in the answer"),
        ({"start": 3, "end": 99}, "not in the answer"),
        ({"start": 0, "end": 1, "layer": 2}, "has 2 layers"),
    ],
)
def test_a_word_that_is_not_there_is_said(make_service, options, message):
    with pytest.raises(SoloError, match=message):
        make_service().attention(WordQuestion(turns=(user(), model()), **options))


def test_images_that_were_not_used_for_longest_go_first(make_service, picture):
    def image(size):
        return HeldImage(b"x" * size, b"", ImageLayout((1, 1), (32, 32), 1, 1))

    store = ImageStore(max_bytes=100)
    first, second = store.add(image(40)), store.add(image(40))
    store.get(first)
    third = store.add(image(40))
    assert store.bytes == 80
    assert store.get(first).bytes == store.get(third).bytes == 40
    with pytest.raises(SoloError, match="no longer held"):
        store.get(second)
    store.remove(first)
    store.remove(first)
    assert store.bytes == 40


def test_one_job_runs_and_the_queue_is_limited():
    worker, go, running, order = Worker(waiting=1), Event(), [], []

    def job(name):
        def work():
            running.append(name)
            order.append(list(running))
            go.wait(10)
            running.remove(name)

        return work

    futures = [worker.submit(job("a")), worker.submit(job("b"))]
    with pytest.raises(BusyError):
        worker.submit(job("c"))
    go.set()
    for future in futures:
        future.result(10)
    worker.submit(job("d")).result(10)
    assert order == [["a"], ["b"], ["d"]]
    worker.close()
