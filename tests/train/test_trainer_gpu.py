"""GPU-only code (flash attention, compiled kernels, casts) against independent references."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tests import factories as tiny
from tests.factories import (
    LLM_CONFIGS,
    ProcessGroup,
    ask,
    image_rows,
    make_solo,
    png,
    read_steps,
    run_recipe,
    run_settings,
    text_rows,
    write_training_data,
)

from solo_vlm.data.collate import collate, model_inputs
from solo_vlm.data.encode import Encoder
from solo_vlm.data.sample import parse_sample
from solo_vlm.generate import GenerationPipeline, PrefixCache, user_turn
from solo_vlm.models.packed import attention
from solo_vlm.models.packed.attention import packed_attention
from solo_vlm.models.packed.isolation import isolate_documents
from solo_vlm.models.solo.modeling_solo import supervised_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DEVICE = "cuda"
STEPS = 60


@pytest.fixture(scope="module", autouse=True)
def heads_for_flash():
    """Use head sizes that flash attention supports (multiples of 8), unlike the other tests' tiny models."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}.items():
            patch.setitem(tiny.SIZES, name, size)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a model and training data."""
    path = tmp_path_factory.mktemp("gpu")
    write_training_data(path, image_rows(40), text_rows(120))
    make_solo("llama").save(path / "llama")
    return path


def trained(folder, name, kill_after=None, **changes):
    """Return the losses of a run in its own process, optionally killed after some steps and restarted."""
    out = folder / name
    plain = run_settings(
        folder, out, **{"steps": STEPS, "precision": "bf16", "checkpoint": {"save_interval": 10}, **changes}
    )
    plain["data"] |= {"sequence_length": 256, "workers": 2}
    group = ProcessGroup(1, run_recipe, plain)
    if kill_after:
        while not (out / "metrics.jsonl").exists() or len(read_steps(out)) < kill_after:
            assert group.processes[0].is_alive()
            time.sleep(0.002)
        group.kill()
        assert len(read_steps(out)) < STEPS, "it had ended before it was killed"
        group = ProcessGroup(1, run_recipe, plain)
    assert group.wait() == [0]
    return [line["loss"] for line in read_steps(out)]


@pytest.fixture(scope="module")
def whole(folder):
    return trained(folder, "whole")


def distance(one, other):
    """Return the error relative to the second argument."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


def by_definition(states, bounds, window, scale):
    """Compute attention in float64, document by document, with all scores."""
    query, key, value = (each.double() for each in states)
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    documents = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        scores = query[:, :, start:end] @ key[:, :, start:end].mT * (scale or query.shape[-1] ** -0.5)
        place = torch.arange(end - start, device=query.device)
        away = place[:, None] - place
        hidden = (away < 0) | (away >= (window or len(place)))
        documents.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value[:, :, start:end])
    return torch.cat(documents, 2).transpose(1, 2)


@pytest.mark.parametrize(
    ("dtype", "size", "window", "scale", "is_flash", "tolerance"),
    [
        (torch.bfloat16, 64, None, None, True, 1e-2),
        (torch.bfloat16, 128, None, 0.3, True, 1e-2),
        (torch.bfloat16, 64, 33, None, True, 1e-2),
        (torch.bfloat16, 256, 200, None, True, 1e-2),
        (torch.bfloat16, 12, None, None, False, 1e-2),
        (torch.float32, 64, None, None, False, 1e-3),
        (torch.float32, 12, 33, None, False, 1e-3),
    ],
)
def test_attention_matches_reference(monkeypatch, dtype, size, window, scale, is_flash, tolerance):
    lengths = [1, 7, 128, 1000, 3, 640, 2, 300]
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    states = [
        torch.randn(1, heads, sum(lengths), size, device=DEVICE, dtype=dtype, requires_grad=True)
        for heads in (8, 2, 2)
    ]
    flash, calls = attention._flash, []
    monkeypatch.setattr(attention, "_flash", lambda *given: calls.append(1) or flash(*given))
    packed, _ = packed_attention(
        None,
        *states,
        None,
        scaling=scale,
        sliding_window=window,
        cu_seq_lens_q=bounds.int(),
        max_length_q=max(lengths),
    )
    assert bool(calls) == is_flash
    expected = by_definition(states, bounds, window, scale)
    assert distance(packed, expected) < tolerance
    weight = torch.randn_like(packed)
    ours = torch.autograd.grad((packed * weight).sum(), states)
    reference = torch.autograd.grad((expected * weight.double()).sum(), states)
    assert max(map(distance, ours, reference)) < tolerance


@pytest.mark.parametrize(("window", "is_flash"), [(None, True), (33, False)])
def test_attention_with_sinks_matches_float64(monkeypatch, window, is_flash):
    lengths = [1, 7, 128, 1000, 3, 640, 2, 300]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    states = [torch.randn(1, heads, sum(lengths), 64, dtype=torch.bfloat16) for heads in (8, 2, 2)]
    states.append(torch.randn(8, dtype=torch.bfloat16))
    flash, calls = attention._flash, []
    monkeypatch.setattr(attention, "_flash", lambda *given: calls.append(1) or flash(*given))

    def attend(device, dtype):
        inputs = [part.to(device, dtype).requires_grad_() for part in states]
        output, _ = packed_attention(
            None,
            *inputs[:3],
            None,
            s_aux=inputs[3],
            sliding_window=window,
            cu_seq_lens_q=bounds.to(device),
            max_length_q=max(lengths),
        )
        weight = torch.linspace(-1, 1, output.numel(), dtype=dtype, device=device).view_as(output)
        return [output, *torch.autograd.grad((output * weight).sum(), inputs)]

    ours, expected = attend(DEVICE, torch.bfloat16), attend("cpu", torch.float64)
    assert bool(calls) == is_flash
    assert max(distance(one, other.to(DEVICE)) for one, other in zip(ours, expected, strict=True)) < 2e-2


@pytest.mark.parametrize("family", LLM_CONFIGS)
def test_packed_logits_match_each_document_alone(family):
    """In bfloat16, packed logits are as close to float32 as those of plain attention per document."""
    solo = make_solo(family)
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "a blue square"}]}]
    picture = png(Image.effect_noise((96, 64), 90).convert("RGB"))
    chats = [("what is this?", [picture]), ("a red circle", []), ("seven", [picture, picture])]
    encoder = Encoder(solo.processor)
    documents = [encoder(parse_sample({"messages": ask(text, *some) + answer})) for text, some in chats]
    model = solo.model.to(DEVICE)

    @torch.no_grad()
    def alone():
        rows = [model_inputs(model, collate([document], len(document), 0)) for document in documents]
        return torch.cat([model(**{**row, "labels": None}, use_cache=False).logits[0] for row in rows])

    model.set_attn_implementation("eager")
    reference = alone()
    model.bfloat16()
    rounded = alone()
    isolate_documents(model)
    batch = {**model_inputs(model, collate(documents, 256, 0)), "labels": None}
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0, : len(reference)]
    assert distance(packed, reference) < 1.5 * distance(rounded, reference) + 2e-3


def test_chunked_loss_equals_cross_entropy():
    head = torch.nn.Linear(256, 5000, bias=False, device=DEVICE)
    states = torch.randn(1, 4000, 256, device=DEVICE, requires_grad=True)
    labels = torch.randint(5000, (1, 4000), device=DEVICE)
    labels[torch.rand(labels.shape, device=DEVICE) < 0.5] = -100
    found = []
    for loss in (
        supervised_cross_entropy(states, labels, head),
        F.cross_entropy(head(states)[0, :-1].double(), labels[0, 1:]),
    ):
        found.append([loss, *torch.autograd.grad(loss, [states, head.weight])])
    assert max(map(distance, *found)) < 1e-4


def test_run_learns_and_resumes_after_sigkill(folder, whole):
    """Losses match within run-to-run noise: flash attention sums in no fixed order."""
    again, killed = trained(folder, "again"), trained(folder, "killed", kill_after=25)
    assert whole[-1] < 0.5 * whole[0]
    noise = max(abs(one - other) / one for one, other in zip(whole, again, strict=True))
    assert killed == pytest.approx(whole, rel=2 * noise + 1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp32"},
        {"compile": True},
        *(
            {"activation_checkpointing": mode, "compile": on}
            for mode in ("selective", "full")
            for on in (False, True)
        ),
    ],
    ids=str,
)
def test_memory_and_speed_settings_keep_losses(folder, whole, changes):
    name = "-".join(f"{key}-{value}" for key, value in changes.items())
    losses = trained(folder, name, steps=6, **changes)
    assert losses[:3] == pytest.approx(whole[:3], rel=1e-2)


def test_cached_and_streamed_answers_agree(folder, whole):
    """Answers agree in a batch, alone, with the prefix cache, compiled, and on CPU."""
    chats = [[user_turn("what is this?", [Image.new("RGB", (64, 32), color)])] for color in ("red", "blue")]
    pipeline = GenerationPipeline.from_pretrained(folder / "whole" / "model")
    assert pipeline.model.device.type == DEVICE
    cached = GenerationPipeline(pipeline.model, pipeline.processor, PrefixCache())
    compiled = GenerationPipeline(pipeline.model, pipeline.processor, compile=True)

    def alone(one):
        return [one.stream(chat, lambda text: None, 8).text for chat in chats]

    assert pipeline.answer(chats, 8) == ["red", "blue"]
    for one in (
        pipeline,
        cached,
        cached,
        compiled,
        GenerationPipeline.from_pretrained(folder / "whole" / "model", device="cpu"),
    ):
        assert alone(one) == ["red", "blue"]


@pytest.mark.parametrize("patches", [1, 3])
def test_wrong_number_of_patches_ends_process(patches):
    program = (
        "import torch; from tiny import make_solo; model = make_solo().model.cuda()\n"
        "ids = torch.tensor([[1, *[model.config.image_token_id] * 2]], device='cuda')\n"
        f"pixels = torch.zeros(({patches}, model.config.patch_dim), dtype=torch.uint8, device='cuda')\n"
        "print(model(input_ids=ids, pixel_values=pixels).logits.sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode
    assert "differ in number" in done.stderr or "device-side assert" in done.stderr
