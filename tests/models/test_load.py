"""Saved folders work the same in plain transformers: left padding and stop tokens."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tests.factories import ask, make_llm, make_solo
from transformers import AutoModelForImageTextToText, AutoProcessor

from solo_vlm.check.tiny import text_families, tiny_llm
from solo_vlm.generate import GenerationPipeline
from solo_vlm.generate.exactness import _with_image
from solo_vlm.models.from_llm import ImageDesign, compose, from_llm
from solo_vlm.models.load import decoder_layers, load_model, save_model
from solo_vlm.train.model import load_base_model
from solo_vlm.utils.errors import SoloError

CHATML_EOS_LAST = (  # like OLMo 3
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ eos_token }}{% else %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def padding_side(folder) -> str:
    return json.loads((folder / "tokenizer_config.json").read_text())["padding_side"]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformers_batch_of_unequal_prompts_equals_single_prompts(family, picture, tmp_path):
    solo = make_solo(family)
    solo.processor.tokenizer.padding_side = "right"  # as set by training tools
    solo.save(tmp_path / "solo")
    assert padding_side(tmp_path / "solo") == "left"
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "solo").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "solo")
    prompts = [
        "<vpatch>what is this?",
        "<vpatch> hello",
        "<vpatch>a red circle left of a blue square?",
    ]
    images = [picture(64, 64, seed=1), picture(32, 32, seed=2), picture(96, 32, seed=3)]

    def answer(texts, pictures):
        inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(new, skip_special_tokens=True)

    together = answer(prompts, images)
    assert together == [answer([p], [i])[0] for p, i in zip(prompts, images, strict=True)]
    assert len(set(together)) > 1


def make_chatml_llm(folder):
    llm, tokenizer = make_llm()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|stop|>"]})
    tokenizer.chat_template = CHATML_EOS_LAST
    llm.resize_token_embeddings(len(tokenizer))
    llm.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|stop|>")
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<|im_end|>", "<|stop|>")}


def test_generation_stops_at_eos_end_of_turn_and_llm_stop_tokens(tmp_path):
    ends = make_chatml_llm(tmp_path / "llm")
    from_llm(tmp_path / "llm").save(tmp_path / "solo")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "solo").eval()
    assert set(model.generation_config.eos_token_id) == ends
    inputs = AutoProcessor.from_pretrained(tmp_path / "solo").apply_chat_template(
        ask("hello"), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    for end in ends:
        forced = torch.full((model.config.text_config.vocab_size,), -1.0)
        forced[end] = 1.0
        output = model.generate(
            **inputs, max_new_tokens=5, logits_processor=[lambda ids, scores, to=forced: to.expand_as(scores)]
        )
        assert output[0, inputs["input_ids"].shape[1] :].tolist() == [end]


def test_folder_without_stop_tokens_still_stops(tmp_path):
    ends = make_chatml_llm(tmp_path / "llm")
    from_llm(tmp_path / "llm").save(tmp_path / "solo")
    settings = json.loads((tmp_path / "solo/generation_config.json").read_text())
    del settings["eos_token_id"]
    (tmp_path / "solo/generation_config.json").write_text(json.dumps(settings))
    pipeline = GenerationPipeline.from_pretrained(tmp_path / "solo", device="cpu")
    assert set(pipeline.eos_token_ids) == ends - {max(ends)}  # only the generation config had <|stop|>
    assert set(pipeline.model.generation_config.eos_token_id) == set(pipeline.eos_token_ids)


def test_plain_llm_is_saved_with_left_padding(tmp_path):
    llm, tokenizer = make_llm()
    tokenizer.padding_side = "right"
    save_model(tmp_path, llm, tokenizer)
    assert padding_side(tmp_path) == "left"


def edit_config(folder: Path, **settings) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize("family", ["rwkv", "xlstm", "gpt_neo", "mamba2", "inkling_text"])
def test_edited_configuration_that_no_layer_follows_is_rejected(family, tmp_path):
    make_solo(family).save(tmp_path / "model")
    edit_config(tmp_path / "model", image_attention="bidirectional")
    with pytest.raises(SoloError, match=r"image_attention=bidirectional: .*: use causal"):
        load_model(tmp_path / "model", device="cpu")


@pytest.mark.parametrize("family", ["rwkv", "xlstm", "gpt_neo", "inkling_text", "inkling2_text"])
def test_edited_configuration_is_not_ignored_by_transformers_either(family, tmp_path):
    make_solo(family).save(tmp_path / "model")
    edit_config(tmp_path / "model", image_attention="bidirectional")
    with pytest.raises(ValueError, match=f"image_attention=bidirectional: {family} follows no masks"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "model")


def test_edited_patch_embedding_is_not_made_anew_by_transformers(tmp_path):
    make_solo().save(tmp_path / "model")
    edit_config(tmp_path / "model", patch_embedding="conv")
    with pytest.raises(ValueError, match="patch_embedding=conv in"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "model")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [{"image_attention": "bidirectional"}, {"image_positions": "2d"}, {"patch_embedding": "conv"}],
    ids=str,
)
def test_edited_configuration_is_followed_or_rejected_by_every_family(settings, tmp_path):
    followed = 0
    for family in text_families():
        with suppress(SoloError):
            solo = make_solo(family)
            inputs = _with_image(solo.model)
            solo.save(tmp_path / family)
            edit_config(tmp_path / family, **settings)
            changed = load_model(tmp_path / family, device="cpu")
            assert not torch.equal(changed(**inputs).logits, solo.model(**inputs).logits), family
            followed += 1
    assert followed >= {"image_attention": 115, "image_positions": 100, "patch_embedding": 0}[min(settings)]


@pytest.mark.parametrize("settings", [{"vision_row_token_id": 5}, {"image_mean": [0.5, 0.5, 0.5]}], ids=str)
def test_edited_configuration_that_contradicts_the_processor_is_rejected(settings, tmp_path):
    """Rows would not be found, or pixels normalized in another way than the folder says."""
    compose(*make_llm(), design=ImageDesign(image_positions="2d")).save(tmp_path / "model")
    edit_config(tmp_path / "model", **settings)
    for load in (GenerationPipeline.from_pretrained, load_base_model):
        with pytest.raises(SoloError, match=r": \[.* in config.json, \[.* in the processor's files"):
            load(tmp_path / "model")


def test_edited_configuration_that_ties_a_separate_head_is_rejected(tmp_path):
    """transformers would keep both with a warning, but tie them in a model made anew, as for sharding."""
    solo = make_solo("qwen3")
    solo.save(tmp_path / "model")
    edit_config(
        tmp_path / "model",
        text_config={**solo.model.config.text_config.to_dict(), "tie_word_embeddings": True},
    )
    with pytest.raises(SoloError, match=r"tie_word_embeddings, but .* a head of their own: set it to false"):
        load_model(tmp_path / "model", device="cpu")


@pytest.mark.parametrize(
    ("family", "layers"), [("llama", 4), ("ctrl", 4), ("zamba", 5), ("modernbert-decoder", 4)]
)
def test_decoder_layers_are_those_of_the_configuration(family, layers):
    """CTRL's are not marked, Zamba's contain others, and what ModernBERT calls its decoder is its head."""
    assert len(decoder_layers(tiny_llm(family))) == layers
