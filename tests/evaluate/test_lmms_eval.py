"""The lmms-eval adapter with lmms-eval's own requests."""

from __future__ import annotations

from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model
from tests.factories import ask

from solo_vlm.evaluate.lmms_eval import DEFAULT_MAX_NEW_TOKENS, BackendModel, Solo
from solo_vlm.generate import GenerationOutput, GenerationPipeline, GenerationRequest


class ConstantBackend:
    """Backend that returns one text for every request and records the requests."""

    def __init__(self, text):
        self.text = text
        self.requests: list[GenerationRequest] = []

    def generate(self, requests):
        for request in requests:
            self.requests.append(request)
            yield [GenerationOutput(request.request_id, self.text)]


def request(row, settings, *images):
    def to_messages(_):
        content = [{"type": "image", "url": image} for image in images]
        return [{"role": "user", "content": [*content, {"type": "text", "text": f"question {row}"}]}]

    arguments = (f"question {row}", to_messages, settings, row, "task", "test")
    return Instance("generate_until", arguments, 0, {"task": "task", "doc_id": row, "repeats": 1})


def respond(text, settings, **options):
    backend = ConstantBackend(text)
    model = BackendModel(backend, **options)
    model.task_dict = {"task": {"test": [{}]}}
    (response,) = model.generate_until([request(0, settings)])
    return response, backend.requests[0].max_new_tokens


def test_responses_are_stripped_and_cut_at_stop_strings():
    assert respond("\n B \n", {})[0] == "B"
    assert respond("B ASSISTANT: C", {"until": ["ASSISTANT:"]})[0] == "B"
    assert respond("one, two; three", {"until": [";", ","]})[0] == "one"
    assert respond("so it is.\n\nB", {"until": ["\n\n"]})[0] == "so it is.\n\nB"
    assert respond("so it is.\n\nB", {"until": ["\n\n"]}, stop_at_blank_line=True)[0] == "so it is."


def test_max_new_tokens_of_task_default_and_override():
    assert respond("B", {"max_new_tokens": 16, "image_aspect_ratio": "original"})[1] == 16
    assert respond("B", {"until": ["\n\n"]})[1] == DEFAULT_MAX_NEW_TOKENS
    assert respond("B", {"max_new_tokens": 16}, max_new_tokens=4)[1] == 4


def test_lmms_eval_finds_and_runs_the_model(solo, tmp_path, picture):
    solo.save(tmp_path)
    assert get_model("solo") is Solo
    model = Solo.create_from_arg_string(f"pretrained={tmp_path},max_new_tokens=6", {"batch_size": 2})
    model.task_dict = {"task": {"test": [{}] * 3}}
    images = [[], [picture(64, 32)], [picture(64, 64), picture(32, 96, seed=1)]]
    responses = model.generate_until([request(row, {}, *images[row]) for row in range(3)])
    pipeline = GenerationPipeline(solo.model, solo.processor)
    alone = [pipeline.answer([ask(f"question {row}", *images[row])], 6)[0] for row in range(3)]
    assert responses == alone
