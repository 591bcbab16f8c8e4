"""Untrusted model folders: errors name absurd sizes, false headers, missing weights and outside links."""

from __future__ import annotations

import json
import os
import shutil
import struct
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.factories import make_llm, make_solo

from solo_vlm.data.encode import load_encoder
from solo_vlm.models.from_llm import from_llm
from solo_vlm.models.load import load_config, load_llm, load_model, load_processor, load_tokenizer
from solo_vlm.utils.errors import SoloError

WEIGHT = "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_solo("qwen3").save(folder / "solo")
    for part in make_llm("qwen3"):
        part.save_pretrained(folder / "llm")
    return folder


@pytest.fixture
def solo(models, tmp_path):
    return shutil.copytree(models / "solo", tmp_path / "solo")


@pytest.fixture
def llm(models, tmp_path):
    return shutil.copytree(models / "llm", tmp_path / "llm")


def set_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.get("text_config", config).update(changes)
    file.write_text(json.dumps(config))


def set_quantization(folder, settings):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))


def change_weights(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"}
    )


def set_header(file, change):
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


def set_header_length(file, length):
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])


ABSURD = {
    "hidden_size": 10**9,
    "intermediate_size": 10**9,
    "num_hidden_layers": 10**6,
    "num_attention_heads": 10**9,
    "head_dim": 10**9,
    "vocab_size": 10**12,
    "max_position_embeddings": 10**12,
}


@pytest.mark.parametrize("setting", ABSURD)
def test_absurd_sizes_are_rejected(solo, llm, setting):
    for folder, load in ((solo, load_model), (llm, load_llm)):
        set_config(folder, layer_types=None, **{setting: ABSURD[setting]})
        with pytest.raises(SoloError, match=r"config\.json") as caught:
            load(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["rms_norm_eps", "rope_parameters"])
def test_settings_that_are_not_a_number_are_rejected(solo, llm, setting):
    nan = float("nan")
    for folder, load in ((solo, load_model), (llm, load_llm)):
        set_config(folder, **{setting: {"rope_theta": nan} if setting == "rope_parameters" else nan})
        with pytest.raises(SoloError, match=r"config\.json.* NaN"):
            load(folder)


def test_context_must_be_positive(solo, llm):
    for folder, load in ((solo, load_model), (llm, load_llm)):
        set_config(folder, max_position_embeddings=-5)
        with pytest.raises(SoloError, match="max_position_embeddings = -5 is not positive"):
            load(folder)


def test_settings_that_imply_infinite_buffers_are_rejected(solo, llm):
    for folder, load in ((solo, load_model), (llm, load_llm)):
        set_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 0})
        with pytest.raises(SoloError, match="inv_freq is not finite"):
            load(folder)


def test_reason_of_a_nested_error_is_named(solo):
    set_config(solo, layer_types=["x", "x"])
    with pytest.raises(SoloError, match=r"validate_layer_type.*entries must be in"):
        load_model(solo)


@pytest.mark.parametrize("std", [[0, 0, 0], [0.2, -0.2, 0.2], [0.2, float("inf"), 0.2]])
def test_standard_deviation_must_be_positive(solo, std):
    for name, load in (("config.json", load_model), ("processor_config.json", load_processor)):
        settings = json.loads((solo / name).read_text())
        settings.get("image_processor", settings)["image_std"] = std
        (solo / name).write_text(json.dumps(settings))
        with pytest.raises(SoloError, match=r"image_std=.* is not positive and finite"):
            load(solo)


def test_filter_must_be_known(solo):
    settings = json.loads((solo / "processor_config.json").read_text())
    settings["image_processor"]["resample"] = 77
    (solo / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(SoloError, match="resample=77 is no filter of Pillow"):
        load_processor(solo)


def test_infinite_limits_are_accepted(llm):
    set_config(llm, time_step_limit=[0.0, float("inf")])
    load_config(llm)


def test_large_numbers_that_are_no_sizes_are_accepted(llm):
    large = {"rope_theta": 10**11, "seed": 2**63, "num_parameters": 7 * 10**9, "num_training_tokens": 10**13}
    set_config(llm, n_vocab=151936, num_embeddings=151936, model_max_length=10**30, **large)
    load_config(llm)


@pytest.mark.parametrize("layers", [1, 3, 1000])
def test_number_of_layers_must_match_the_weights(solo, llm, layers):
    for folder, load in ((solo, load_model), (llm, load_llm)):
        set_config(folder, layer_types=None, num_hidden_layers=layers)
        with pytest.raises(SoloError, match=r"layers|lacks the weight|no weight of the model"):
            load(folder)


def test_missing_weight_is_rejected(solo):
    change_weights(solo, lambda tensors: tensors.pop(WEIGHT))
    with pytest.raises(SoloError, match=f"lacks the weight {WEIGHT}"):
        load_model(solo)


def test_weight_of_another_shape_is_rejected(solo):
    change_weights(solo, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT][:5]}))
    with pytest.raises(
        SoloError, match=rf"{WEIGHT} has the shape \[5, 48\], but config\.json implies \[96, 48\]"
    ):
        load_model(solo)


def test_weight_of_integers_is_rejected_by_name(solo):
    change_weights(solo, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].view(torch.int32)}))
    with pytest.raises(SoloError, match=f"{WEIGHT} has the dtype I32"):
        load_model(solo)


@pytest.mark.parametrize(
    "settings",
    [None, {}, {"bits": 8}, *({"quant_method": name} for name in ("unknown", "fp8", "mxfp4", "gguf"))],
)
def test_integers_under_another_quantization_are_rejected_by_name(solo, settings):
    """transformers would convert them to floats without scales."""
    set_quantization(solo, settings)
    change_weights(solo, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(torch.int8)}))
    with pytest.raises(SoloError, match=f"{WEIGHT} has the dtype I8"):
        load_model(solo)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "torchao"])
def test_quantized_folder_needs_the_package_of_its_method(solo, method):
    if any(find_spec(name) for name in (method.replace("-", "_"), f"{method}model")):
        pytest.skip(f"{method} is installed")
    set_quantization(solo, {"quant_method": method, "bits": 4, "load_in_8bit": True})
    with pytest.raises(SoloError, match=f"cannot load {solo}: ") as caught:
        load_model(solo)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64])
def test_weights_of_any_float_dtype_are_read_by_value(solo, dtype):
    stored = {}

    def convert(tensors):
        stored[WEIGHT] = tensors[WEIGHT].to(dtype)
        tensors.update(stored)

    change_weights(solo, convert)
    loaded = load_model(solo).get_parameter(WEIGHT)
    torch.testing.assert_close(loaded, stored[WEIGHT].to(loaded.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("size", [{"longest_edge": 10**6}, {"height": 10**6, "width": 10**6}])
def test_absurd_image_size_is_rejected(solo, size):
    file = solo / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"]["size"] = size
    file.write_text(json.dumps(settings))
    with pytest.raises(SoloError, match=r"processor_config\.json: \w+ = 1,000,000 is absurd"):
        load_processor(solo)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_not_finite_is_rejected(solo, llm, value):
    change_weights(solo, lambda tensors: tensors[WEIGHT].view(-1)[7:8].fill_(value))
    with pytest.raises(SoloError, match=f"the weight {WEIGHT} is not finite"):
        load_model(solo)
    change_weights(llm, lambda tensors: tensors["model.norm.weight"][3:4].fill_(value))
    with pytest.raises(SoloError, match="is not finite"):
        from_llm(llm)


HEADERS = {
    "length of an exabyte": lambda file: set_header_length(file, 2**60),
    "length beyond the file": lambda file: set_header_length(file, file.stat().st_size),
    "length of nothing": lambda file: set_header_length(file, 0),
    "offset beyond the file": lambda file: set_header(
        file, lambda h: h[WEIGHT].update(data_offsets=[0, 2**50])
    ),
    "negative offset": lambda file: set_header(file, lambda h: h[WEIGHT].update(data_offsets=[-8, 8])),
    "overlapping tensors": lambda file: set_header(
        file, lambda h: h[WEIGHT].update(data_offsets=[0, 96 * 48 * 4])
    ),
    "shape without end": lambda file: set_header(file, lambda h: h[WEIGHT].update(shape=[2**62, 2**62])),
    "unknown dtype": lambda file: set_header(file, lambda h: h[WEIGHT].update(dtype="F1")),
    "another dtype": lambda file: set_header(file, lambda h: h[WEIGHT].update(dtype="F64")),
    "no object": lambda file: file.write_bytes(struct.pack("<Q", 2) + b"[]"),
    "no JSON": lambda file: file.write_bytes(struct.pack("<Q", 8) + b"\xff" * 8),
    "deep JSON": lambda file: file.write_bytes(struct.pack("<Q", 10**5) + b"[" * 10**5),
    "empty": lambda file: file.write_bytes(b""),
    "seven bytes": lambda file: file.write_bytes(b"1234567"),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_false_header_is_reported_with_the_file_name(solo, kind):
    HEADERS[kind](solo / "model.safetensors")
    with pytest.raises(SoloError, match=r"model\.safetensors is (damaged|truncated)") as caught:
        load_model(solo)
    assert "\n" not in str(caught.value)


def shard(folder, **places):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = load_file(folder / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors") | places
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "model-00002-of-00002.safetensors",
            "model-00002-of-00002.safetensors is missing: the index lists",
        ),
        ("../secret.safetensors", "not a file of the model's folder"),
        ("/etc/passwd", "not a file of the model's folder"),
        (7, "no weight_map of file names"),
    ],
)
def test_index_may_only_list_files_of_the_folder(solo, place, message):
    (solo.parent / "secret.safetensors").write_bytes((solo / "model.safetensors").read_bytes())
    shard(solo)
    load_model(solo)
    (solo / "model-00001-of-00001.safetensors").rename(solo / "model.safetensors")
    shard(solo, **{WEIGHT: place})
    with pytest.raises(SoloError, match=message):
        load_model(solo)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"]
)
def test_links_out_of_the_folder_need_a_setting(models, solo, monkeypatch, name):
    (solo / name).unlink()
    (solo / name).symlink_to(models / "solo" / name)
    for load in (load_model, load_processor, load_config, load_encoder):
        with pytest.raises(SoloError, match=f"{name} is a link to .* outside of the model's folder"):
            load(solo)
    monkeypatch.setenv("SOLO_ALLOW_OUTSIDE_FILES", "1")
    load_model(solo)
    load_processor(solo)


def test_links_out_of_nested_folders_need_a_setting(models, solo, llm):
    for folder, load in ((solo, load_processor), (llm, load_tokenizer)):
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/x.jinja").symlink_to(models / "solo/chat_template.jinja")
        with pytest.raises(SoloError, match=r"x\.jinja is a link to .* outside of the model's folder"):
            load(folder)


def test_default_chat_template_of_several_is_used(solo):
    template = load_processor(solo).chat_template
    (solo / "additional_chat_templates").mkdir()
    (solo / "additional_chat_templates/x.jinja").write_text("x")
    processor = load_processor(solo)
    assert processor.chat_template == template
    assert processor.end_of_turn_ids == load_model(solo).generation_config.eos_token_id
    (solo / "chat_template.jinja").unlink()
    with pytest.raises(SoloError, match=r"none of the chat templates \(x\) is named default"):
        load_processor(solo)


def test_links_in_the_hub_cache_are_followed(models, tmp_path):
    blobs, snapshot = (tmp_path / "models--a--b" / name for name in ("blobs", "snapshots/123"))
    shutil.copytree(models / "solo", blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    load_model(snapshot)
    load_processor(snapshot)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "vocab.json"])
def test_large_tokenizer_files_need_a_setting(solo, llm, monkeypatch, name):
    for folder, load in ((solo, load_processor), (llm, load_tokenizer)):
        file = folder / name
        with file.open("ab") as stream:
            stream.truncate(3 * 10**9)  # takes no space on disk
        with pytest.raises(
            SoloError, match=rf"{name} has 3,000,000,000 bytes, more than SOLO_MAX_FILE_BYTES"
        ):
            load(folder)
        monkeypatch.setenv("SOLO_MAX_FILE_BYTES", "100")
        with pytest.raises(SoloError, match="more than SOLO_MAX_FILE_BYTES = 100"):
            load(folder)
        monkeypatch.delenv("SOLO_MAX_FILE_BYTES")


@pytest.mark.parametrize("name", ["tf_model.h5", "flax_model.msgpack", "demo.mp4", "onnx/model.onnx"])
def test_large_files_that_are_not_read_are_accepted(solo, name):
    (solo / name).parent.mkdir(exist_ok=True)
    with (solo / name).open("wb") as stream:
        stream.truncate(3 * 10**9)
    load_processor(solo)


@pytest.mark.parametrize(("count", "length"), [(300_000, 1), (10_000, 1000)])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokens_beyond_any_use_are_rejected(solo, llm, name, count, length):
    tokens = [{"id": number, "content": "x" * length} for number in range(count)]
    if name == "tokenizer.json":
        key, added = "added_tokens", tokens
    else:
        key, added = "added_tokens_decoder", {str(token["id"]): token for token in tokens}
    for folder, load in ((solo, load_processor), (llm, load_tokenizer)):
        settings = json.loads((folder / name).read_text()) | {key: added}
        (folder / name).write_text(json.dumps(settings))
        with pytest.raises(SoloError, match=rf"{name} adds {count:,} tokens of {count * length:,} char"):
            load(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"added_tokens": 7}', "\0" * 100])
def test_damaged_tokenizer_is_named(solo, llm, text):
    for folder, load in ((solo, load_processor), (llm, load_tokenizer)):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(SoloError, match=r"tokenizer\.json(:| cannot| holds)"):
            load(folder)


def test_code_of_a_folder_is_never_run(llm, tmp_path):
    set_config(
        llm, model_type="stranger", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.M"}
    )
    (llm / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for load in (load_llm, load_config, from_llm):
        with pytest.raises(SoloError):
            load(llm)
    settings = json.loads((llm / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Stranger", "auto_map": {"AutoTokenizer": ["code.T", None]}}
    (llm / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(SoloError):
        load_tokenizer(llm)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 10**5, "\xff"])
def test_unreadable_config_is_rejected(solo, text):
    (solo / "config.json").write_text(text, encoding="latin-1")
    for load in (load_model, load_processor, load_config, load_encoder):
        with pytest.raises(SoloError, match=r"config\.json"):
            load(solo)


GENERATION = {
    "[": "cannot be read as JSON",
    "[]": "holds no JSON object",
    '{"eos_token_id": NaN}': "a number is NaN",
    '{"temperature": NaN, "do_sample": true}': "a number is NaN",
    '{"eos_token_id": 99999999999}': "is absurd",
    '{"eos_token_id": "a"}': "eos_token_id = a is no token ID",
    '{"eos_token_id": [[[1]]]}': r"eos_token_id = \[\[1\]\] is no token ID",
}
OWN_GENERATION = {
    '{"eos_token_id": 99999}': "eos_token_id = 99999 is not in the vocabulary",
    '{"suppress_tokens": [3, 9999999]}': "suppress_tokens = 9999999 is not in the vocabulary",
    '{"repetition_penalty": -1}': "repetition_penalty = -1 of",
    '{"repetition_penalty": Infinity}': "repetition_penalty = inf of",
    '{"top_k": "many"}': "top_k = many of",
    '{"do_sample": 1}': "do_sample = 1 of",
    '{"max_length": -5}': "max_length = -5 of",
    '{"num_beams": 4}': "num_beams = 4 of .* is neither of greedy decoding nor of sampling",
    '{"stop_strings": ["a"]}': "stop_strings",
    '{"max_time": 0}': "max_time = 0 of",
    '{"return_dict_in_generate": true}': "return_dict_in_generate = True of",
}


@pytest.mark.parametrize("text", GENERATION)
def test_unreadable_generation_settings_are_rejected(solo, llm, text):
    for folder, load in ((solo, load_model), (llm, load_llm), (llm, from_llm)):
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(SoloError, match=rf"generation_config\.json.*{GENERATION[text]}") as caught:
            load(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", OWN_GENERATION)
def test_impossible_generation_settings_are_rejected(solo, text):
    (solo / "generation_config.json").write_text(text)
    with pytest.raises(SoloError, match=OWN_GENERATION[text]) as caught:
        load_model(solo)
    assert "\n" not in str(caught.value)


def test_usual_generation_settings_are_accepted(solo):
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    settings |= {"num_beams": 1, "output_attentions": False, "eos_token_id": [1, 2], "max_length": 4096}
    (solo / "generation_config.json").write_text(json.dumps(settings))
    load_model(solo)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pipe_is_rejected(solo, name):
    (solo / name).unlink()
    os.mkfifo(solo / name)
    with pytest.raises(SoloError, match=f"{name} is not a regular file"):
        load_model(solo)


def test_endless_template_is_rejected_when_it_is_used(solo):
    (solo / "chat_template.jinja").write_text(
        "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}"
    )
    processor = load_processor(solo)
    with pytest.raises(ValueError, match="takes too many steps"):
        processor.encode_chat([{"role": "user", "content": "Hi."}], add_generation_prompt=True)


def test_valid_folders_load(models):
    assert torch.isfinite(load_model(models / "solo").lm_head.weight).all()
    load_processor(models / "solo")
    from_llm(models / "llm")


@pytest.mark.parametrize("load", [load_llm, load_tokenizer])
def test_adapter_beside_a_model_is_rejected(load, llm):
    """transformers would add it to the model."""
    (llm / "adapter_config.json").write_text("{}")
    with pytest.raises(SoloError, match="has an adapter beside the model: merge it"):
        load(llm)


def test_configuration_without_names_of_outputs_is_rejected(llm):
    set_config(llm, return_dict=False)
    with pytest.raises(SoloError, match="return_dict = false"):
        load_llm(llm)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "qwen3"])
def test_folder_without_a_tokenizer_is_rejected(family, tmp_path):
    """Their classes make a tokenizer of special tokens alone, to which all text is unknown."""
    make_llm(family)[0].save_pretrained(tmp_path)
    with pytest.raises(SoloError, match="has no vocabulary of a tokenizer"):
        load_tokenizer(tmp_path)


def test_file_in_place_of_a_folder_is_rejected(llm):
    with pytest.raises(SoloError, match="is a file: give the folder"):
        load_tokenizer(llm / "config.json")


def test_adapter_alone_is_rejected(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SoloError, match="only an adapter: use the merged model"):
        load_model(tmp_path)
