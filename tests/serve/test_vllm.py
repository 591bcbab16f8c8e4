"""vLLM, the embedded engine and transformers generate the same greedy text; images; a LoRA adapter."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request

import pytest
import torch
from openai import AuthenticationError, BadRequestError, OpenAI
from tests.factories import TEXTS, ask, make_solo
from transformers import LlamaConfig, LlamaForCausalLM

from solo_vlm.generate import GenerationPipeline
from solo_vlm.models.from_llm import compose
from solo_vlm.quickstart.llm import train_tokenizer
from solo_vlm.serve.limits import Limits
from solo_vlm.serve.vllm import vllm_command
from solo_vlm.utils.errors import SoloError

from .conftest import question, served, wait_until

TOKENS = 16
KEY = {"SOLO_API_KEY": "secret"}


def test_command_has_the_limits_that_vllm_supports():
    limits = Limits(max_batch=3, max_images=2, max_tokens=77)
    command = vllm_command("folder", "name", "127.0.0.1", 8000, limits, "bfloat16", prefix_caching=False)
    *pairs, last = command[3:]
    options = dict(zip(pairs[::2], pairs[1::2], strict=True))
    assert options["--model"] == "folder" and options["--served-model-name"] == "name"
    assert options["--dtype"] == "bfloat16" and last == "--no-enable-prefix-caching"
    assert options["--max-num-seqs"] == "3"
    assert json.loads(options["--limit-mm-per-prompt"]) == {"image": 2}
    assert json.loads(options["--override-generation-config"])["max_new_tokens"] == 77


@pytest.mark.parametrize("limits", [Limits(allow_image_urls=True), Limits(max_seconds=1.0)])
def test_limit_unsupported_by_vllm_is_rejected(limits):
    with pytest.raises(SoloError, match="--engine vllm does not support --"):
        vllm_command("folder", "name", "127.0.0.1", 8000, limits)


@pytest.mark.parametrize("design", [{"image_attention": "bidirectional"}, {"image_positions": "2d"}])
def test_design_unsupported_by_vllm_is_rejected(tmp_path, run, design):
    make_solo().save(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | design))
    code, _, error = run("serve", "--model", tmp_path / "model", "--engine", "vllm")
    assert code == 2
    assert "--engine vllm runs causal attention with 1-D positions only" in error


@pytest.mark.parametrize(
    ("family", "part"),
    [("granite", "logits_scaling"), ("gemma2", "final_logit_softcapping"), ("phi", "the bias of its head")],
)
def test_decoder_whose_logits_vllm_would_change_is_rejected(tmp_path, run, family, part):
    make_solo(family).save(tmp_path / "model")
    code, _, error = run("serve", "--model", tmp_path / "model", "--engine", "vllm")
    assert code == 2
    assert f"vLLM does not apply {part} of {family} models" in error


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"eos_token_id": None}, "lacks '</s>' (1), where answers end: add it"),
        ({"eos_token_id": [1, 50]}, "has 'O' (50), where no answer ends"),
        ({"begin_suppress_tokens": [50]}, "vLLM would not suppress 'O' (50)"),
    ],
    ids=str,
)
def test_settings_that_vllm_would_not_follow_are_rejected(tmp_path, run, changes, fault):
    make_solo().save(tmp_path / "model")
    settings = tmp_path / "model" / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | changes))
    code, _, error = run("serve", "--model", tmp_path / "model", "--engine", "vllm")
    assert (code, fault in " ".join(error.split())) == (2, True)


# ------------------------------------------------------------------------------------- with vLLM installed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a tiny model with a head size that vLLM supports."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=320)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    solo = compose(LlamaForCausalLM(config).eval(), tokenizer)
    solo.model.model.embed_vision_patch.weight.data.mul_(20.0)
    path = tmp_path_factory.mktemp("vllm") / "my-model"
    solo.save(path)
    return path


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """Return a LoRA adapter with random weights, large enough to change answers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(
        r=8, target_modules=r".*language_model.*\.(q_proj|v_proj|up_proj)", init_lora_weights=False
    )
    model = get_peft_model(GenerationPipeline.from_pretrained(folder).model, lora)
    path = tmp_path_factory.mktemp("adapter") / "lora"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vllm(folder, adapter, tmp_path_factory):
    """Yield a client of `solo serve --engine vllm` with model and adapter."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "solo_vlm", "serve", "--model", str(folder), "--port", str(port)]
    command += ["--engine", "vllm", "--dtype", "float32", "--max-images", "3"]
    command += ["--", "--enable-lora", "--lora-modules", f"my-lora={adapter}"]
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **KEY})

    def ready() -> bool:
        assert process.poll() is None, log.read_text()[-5000:]
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200
        except OSError:
            return False

    try:
        wait_until(ready, seconds=800)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY["SOLO_API_KEY"], max_retries=0)
    finally:
        process.terminate()
        process.wait()


CHATS = {
    "text": ("a red circle left of a blue square", []),
    "one image": ("what is this?", [(64, 96)]),
    "an image of one patch": ("what is this?", [(32, 32)]),
    "three images": ("what is this? seven", [(96, 64), (32, 64), (128, 128)]),
}


def answer_of(client, model, text, images) -> str:
    body = question(text, *images, max_tokens=TOKENS)
    return complete(client.chat.completions.create(model=model, **body).choices[0].message.content)


def complete(text: str) -> str:
    """Drop an incomplete last character, as vLLM does and transformers does not."""
    return text.rstrip("\ufffd").strip()


@pytest.mark.vllm
@pytest.mark.parametrize("name", CHATS)
def test_all_engines_give_the_same_greedy_text(vllm, folder, picture, name):
    text, sizes = CHATS[name]
    images = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    pipeline = GenerationPipeline.from_pretrained(folder)
    with served(pipeline, Limits()) as server:
        ours = OpenAI(base_url=server.url, api_key="none", max_retries=0)
        of_transformers = answer_of(ours, "tiny", text, images)
    of_vllm = answer_of(vllm, "my-model", text, images)
    assert of_vllm == of_transformers == complete(pipeline.answer([ask(text, *images)], TOKENS)[0])


@pytest.mark.vllm
def test_adapter_answers_as_under_peft(vllm, folder, adapter, picture):
    from peft import PeftModel

    pipeline = GenerationPipeline.from_pretrained(folder)
    chat = ask("what is this?", picture(64, 96))
    plain = pipeline.answer([chat], TOKENS)[0]
    merged = PeftModel.from_pretrained(pipeline.model, adapter).merge_and_unload()
    expected = GenerationPipeline(merged, pipeline.processor).answer([chat], TOKENS)[0]
    ours = answer_of(vllm, "my-lora", "what is this?", [picture(64, 96)])
    assert ours == complete(expected) != complete(plain)


@pytest.mark.vllm
def test_images_are_limited_and_never_fetched(vllm, picture):
    with pytest.raises(BadRequestError):
        answer_of(vllm, "my-model", "x", [picture()] * 4)
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}
    with pytest.raises(BadRequestError, match="domain"):
        vllm.chat.completions.create(model="my-model", messages=[{"role": "user", "content": [part]}])


@pytest.mark.vllm
def test_key_is_required(vllm):
    with pytest.raises(AuthenticationError):
        vllm.with_options(api_key="wrong").models.list()
    assert "my-model" in [model.id for model in vllm.models.list()]
