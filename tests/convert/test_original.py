"""Original folders to model folders and back: equal bytes, logits and chats, clear errors."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.convert.original_files import (
    CHAT,
    LOCATIONS,
    TEXT_TOKENS,
    VISION,
    original_settings,
    original_weights,
    write_original,
    write_sentencepiece,
)
from tests.factories import ROOT, ask

from solo_vlm import SoloForConditionalGeneration
from solo_vlm.convert.original import convert_original, convert_to_original
from solo_vlm.generate import GenerationPipeline
from solo_vlm.models.load import load_model, load_processor
from solo_vlm.train.model import load_base_model
from solo_vlm.utils.errors import SoloError

GOLDEN = ROOT / "tests" / "golden" / "original_tiny"
ROWS = TEXT_TOKENS + len(VISION + LOCATIONS + CHAT)
FORMATS = [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 3)]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def assert_same_bytes(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name


def golden_logits(model: SoloForConditionalGeneration) -> np.ndarray:
    golden = np.load(GOLDEN / "golden.npz")
    start, patch, row, _, end = golden["special_ids"].tolist()
    config = model.config
    config.vision_start_token_id, config.image_token_id = start, patch
    config.vision_row_token_id, config.vision_end_token_id = row, end
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(golden["input_ids"]), pixel_values=torch.tensor(golden["vision_patches"])
        ).logits.numpy()


def golden_folder(folder: Path, suffix: str, shards: int) -> Path:
    settings = json.loads((GOLDEN / "config.json").read_text())
    return write_original(folder, load_file(GOLDEN / "model.safetensors"), settings, suffix, shards)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Folder like SOLO-7B's in bfloat16, with its tokenizer."""
    folder = tmp_path_factory.mktemp("original") / "SOLO-tiny"
    settings = original_settings(ROWS)
    write_original(folder, original_weights(settings), settings, shards=2)
    write_sentencepiece(folder, VISION + LOCATIONS + CHAT)
    return folder


@pytest.mark.parametrize(("suffix", "shards"), FORMATS)
def test_golden_logits_from_every_format_on_disk(suffix, shards, tmp_path):
    source = golden_folder(tmp_path / "source", suffix, shards)
    convert_original(source, tmp_path / "solo")
    model = SoloForConditionalGeneration.from_pretrained(tmp_path / "solo").eval()
    expected = np.load(GOLDEN / "golden.npz")["logits"]
    np.testing.assert_allclose(golden_logits(model), expected, atol=1e-4)


@pytest.mark.parametrize(("suffix", "shards"), FORMATS)
def test_original_folder_loads_directly(suffix, shards, tmp_path):
    source = golden_folder(tmp_path / "source", suffix, shards)
    model, report = SoloForConditionalGeneration.from_pretrained(source, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.vision_token_ids == (32001, 32000, 32002, 32004)
    expected = np.load(GOLDEN / "golden.npz")["logits"]
    np.testing.assert_allclose(golden_logits(model.eval()), expected, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    assert "model.language_model.norm.weight" in read_weights(tmp_path / "saved")


@pytest.mark.parametrize(("suffix", "shards"), FORMATS)
def test_round_trip_preserves_every_byte(suffix, shards, tmp_path):
    settings = original_settings(ROWS)
    weights = original_weights(settings)
    source = write_original(tmp_path / "source", weights, settings, suffix, shards)
    write_sentencepiece(source, VISION + LOCATIONS + CHAT)
    convert_original(source, tmp_path / "solo")
    facts = convert_to_original(tmp_path / "solo", tmp_path / "back")
    assert facts["tensors"] == len(weights)
    assert_same_bytes(read_weights(tmp_path / "back"), weights)
    again = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: again[name] for name in settings} == settings
    same = (tmp_path / "back" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert same
    convert_original(tmp_path / "back", tmp_path / "solo again")
    assert_same_bytes(read_weights(tmp_path / "solo again"), read_weights(tmp_path / "solo"))


def test_shards_are_written_with_an_index(original, tmp_path, monkeypatch):
    from solo_vlm.convert import checkpoint_files, model_folder

    def in_small_shards(folder, tensors):
        checkpoint_files.write_checkpoint(folder, tensors, max_shard_bytes=50_000)

    monkeypatch.setattr(model_folder, "write_checkpoint", in_small_shards)
    convert_original(original, tmp_path / "solo")
    assert len(list((tmp_path / "solo").glob("model-*.safetensors"))) > 3
    model = load_model(tmp_path / "solo")
    expected = read_weights(original)["model.layers.3.mlp.up_proj.weight"]
    assert torch.equal(model.model.language_model.layers[3].mlp.up_proj.weight.cpu(), expected)
    convert_to_original(tmp_path / "solo", tmp_path / "back")
    assert_same_bytes(read_weights(tmp_path / "back"), read_weights(original))


def test_converted_and_original_folder_give_equal_answers(original, tmp_path, picture):
    converted = convert_original(original, tmp_path / "solo")
    assert converted.vocabulary == converted.tokens == ROWS
    assert converted.dtype == "bfloat16"
    answers = []
    for folder in (original, tmp_path / "solo"):
        pipeline = GenerationPipeline.from_pretrained(folder, dtype="float32", device="cpu")
        assert pipeline.processor.image_layout == "original"
        assert pipeline.model.config.vision_token_ids == converted.vision_token_ids
        inputs = pipeline.encode([ask("what is this?", picture(64, 40))])
        new = pipeline.generate(inputs, max_new_tokens=20)[0][:, inputs["input_ids"].shape[1] :]
        assert new.max() < TEXT_TOKENS  # vision tokens, locations and padding are suppressed
        answers.append(new.tolist())
    assert answers[0] == answers[1]


def test_converted_folders_pad_left_and_stop_at_eos(original, tmp_path):
    convert_original(original, tmp_path / "solo")
    convert_to_original(tmp_path / "solo", tmp_path / "back")
    for folder in ("solo", "back"):
        settings = json.loads((tmp_path / folder / "tokenizer_config.json").read_text())
        assert settings["padding_side"] == "left"
    generation = json.loads((tmp_path / "solo/generation_config.json").read_text())
    assert generation["eos_token_id"] == [2]


# --- vocabularies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "rows", "tokens", "dropped"),
    [
        (VISION + LOCATIONS + CHAT, ROWS, ROWS, []),  # SOLO-7B, 33031 rows
        (VISION + LOCATIONS, ROWS - 2, ROWS - 2, []),  # before chat tokens were added, 33029 rows
        (VISION + LOCATIONS, ROWS, ROWS, []),  # rows for chat tokens that the tokenizer lacks
        (VISION + LOCATIONS + CHAT, ROWS - 2, ROWS - 2, CHAT),  # the reverse
        (VISION + LOCATIONS, 1536, ROWS - 2, []),  # padded to a multiple of 128
        (VISION + LOCATIONS + CHAT, 1536, ROWS, []),
        ([], ROWS - 2, ROWS - 2, []),  # the LLM's own tokenizer
    ],
)
def test_vocabulary_for_any_rows_and_tokens(pieces, rows, tokens, dropped, tmp_path):
    settings = original_settings(rows, num_hidden_layers=1)
    source = write_original(tmp_path / "source", original_weights(settings), settings)
    write_sentencepiece(source, pieces)
    converted = convert_original(source, tmp_path / "solo")
    assert (converted.vocabulary, converted.tokens) == (rows, tokens)
    tokenizer = load_processor(tmp_path / "solo").tokenizer
    assert tokenizer.convert_tokens_to_ids(VISION) == list(range(TEXT_TOKENS, TEXT_TOKENS + 5))
    assert tokenizer.convert_tokens_to_ids("<loc_1024>") == TEXT_TOKENS + 5 + 1023
    vocabulary = tokenizer.get_vocab()
    assert max(vocabulary.values()) < rows
    assert not set(dropped) & set(vocabulary)
    suppressed = load_model(tmp_path / "solo", device="cpu").generation_config.suppress_tokens
    assert suppressed == list(range(TEXT_TOKENS, rows))


def test_rows_of_the_weights_override_the_config(tmp_path):
    settings = original_settings(ROWS, num_hidden_layers=1)
    source = write_original(
        tmp_path / "source", original_weights(settings), settings | {"vocab_size": ROWS - 2}
    )
    write_sentencepiece(source, VISION + LOCATIONS)
    assert convert_original(source, tmp_path / "solo").vocabulary == ROWS


def test_tokenizer_of_another_model_is_rejected(tmp_path):
    settings = original_settings(TEXT_TOKENS + 3, num_hidden_layers=1)
    source = write_original(tmp_path / "source", original_weights(settings), settings)
    write_sentencepiece(source, VISION)
    with pytest.raises(SoloError, match="do not match"):
        convert_original(source, tmp_path / "solo")


def test_broken_tokenizer_is_rejected(tmp_path):
    settings = original_settings(ROWS, num_hidden_layers=1)
    source = write_original(tmp_path / "source", original_weights(settings), settings)
    (source / "tokenizer.model").write_bytes(b"no protocol buffer")
    with pytest.raises(SoloError, match="cannot read the tokenizer of"):
        convert_original(source, tmp_path / "solo")
    assert not (tmp_path / "solo").exists()


def test_without_tokenizer_no_processor_is_written(tmp_path, caplog):
    source = golden_folder(tmp_path / "source", "safetensors", 1)
    assert convert_original(source, tmp_path / "solo").tokens is None
    assert "has no tokenizer" in caplog.text
    assert not (tmp_path / "solo" / "processor_config.json").exists()


# --- broken and malicious files: a clear error, nothing left behind --------------------------------------


class Code:
    """Object that makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def assert_rejected(source: Path, tmp_path: Path, *mentioned: str) -> None:
    with pytest.raises(SoloError) as caught:
        convert_original(source, tmp_path / "out" / "solo")
    for words in mentioned:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("**/*"))


@pytest.fixture
def source(tmp_path):
    """Return a function that writes an original folder to break."""

    def make(suffix: str, shards: int = 2, **changes) -> Path:
        settings = original_settings(64, num_hidden_layers=1)
        weights = original_weights(settings) | changes.pop("weights", {})
        return write_original(tmp_path / "source", weights, settings | changes, suffix, shards)

    return make


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_truncated_shard_is_rejected(source, tmp_path, suffix):
    folder = source(suffix)
    file = next(folder.glob(f"*-00001-of-*.{suffix}"))
    cut(file)
    assert_rejected(folder, tmp_path, str(file), "truncated")


def test_truncation_error_names_the_first_affected_key(source, tmp_path):
    folder = source("safetensors", 1)
    cut(folder / "model.safetensors")
    assert_rejected(folder, tmp_path, "model.safetensors is truncated: ", "is incomplete")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_missing_shard_is_rejected(source, tmp_path, suffix):
    folder = source(suffix)
    file = next(folder.glob(f"*-00002-of-*.{suffix}"))
    file.unlink()
    assert_rejected(folder, tmp_path, f"{file} is missing", "model.embed_vision_patch.weight")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_wrong_shape_is_rejected(source, tmp_path, suffix):
    key = "model.layers.0.mlp.up_proj.weight"
    folder = source(suffix, 1, weights={key: torch.zeros(48, 63)})
    assert_rejected(folder, tmp_path, f"model.{suffix}", key, "[48, 63]", "[48, 64]")


def test_missing_and_unknown_keys_are_rejected(source, tmp_path):
    folder = source("safetensors", 1, num_hidden_layers=2)
    assert_rejected(folder, tmp_path, "lacks", "layers.1.")
    folder = source("safetensors", 1, weights={"model.vision_tower.weight": torch.zeros(2)})
    assert_rejected(folder, tmp_path, "model.vision_tower.weight", "not a weight of this model")


def test_index_with_an_extra_key_is_rejected(source, tmp_path):
    folder = source("safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = content["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(content))
    assert_rejected(folder, tmp_path, "lacks model.extra.weight")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [None, 2, 4])
def test_pickle_with_code_is_rejected_and_not_run(source, tmp_path, protocol):
    trace = tmp_path / "trace"
    folder = source("bin", 1)
    file = folder / "pytorch_model.bin"
    if protocol is None:
        torch.save({"model.norm.weight": torch.zeros(2), "code": Code(trace)}, file)
    else:
        file.write_bytes(pickle.dumps({"code": Code(trace)}, protocol=protocol))
    named = "objects other than tensors" if protocol == 4 else "code (posix.mkdir)"
    assert_rejected(folder, tmp_path, str(file), named, "nothing in it was run")
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"PK\x03\x04 broken", b"\xff" * 9])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_other_file_formats_are_rejected(source, tmp_path, name, content):
    folder = source("safetensors", 1)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    assert_rejected(folder, tmp_path, name)


def test_missing_weights_broken_config_and_other_models_are_rejected(source, tmp_path, original):
    folder = source("safetensors", 1, architectures=["MistralForCausalLM"])
    assert_rejected(folder, tmp_path, "not a checkpoint of the original SOLO code")
    (folder / "config.json").write_text("{")
    assert_rejected(folder, tmp_path, "config.json cannot be read")
    folder = source("safetensors", 1)
    (folder / "model.safetensors").unlink()
    assert_rejected(folder, tmp_path, "has no weights")
    with pytest.raises(SoloError, match="is not a SOLO model"):
        convert_to_original(original, tmp_path / "back")


def test_existing_destination_is_left_unchanged(original, tmp_path):
    (tmp_path / "solo").mkdir()
    (tmp_path / "solo" / "mine.txt").write_text("keep")
    with pytest.raises(SoloError, match="exists already"):
        convert_original(original, tmp_path / "solo")
    assert (tmp_path / "solo" / "mine.txt").read_text() == "keep"


def test_only_mistral_decoders_convert_back(solo, tmp_path):
    solo.save(tmp_path / "llama")
    with pytest.raises(SoloError, match=r"supports Mistral only.*llama"):
        convert_to_original(tmp_path / "llama", tmp_path / "back")
    shutil.rmtree(tmp_path / "llama")


def test_original_folder_without_tokenizer_loads(tmp_path):
    source = golden_folder(tmp_path / "source", "bin", 1)
    assert load_model(source, device="cpu").config.image_token_id == 32001
    with pytest.raises(SoloError, match="tokenizer"):
        load_processor(source)


def test_training_starts_from_an_original_folder(original):
    """Its config says "mistral": read as a plain LLM, it would silently lose its patch embedding."""
    model, processor = load_base_model(original)
    assert isinstance(model, SoloForConditionalGeneration)
    assert processor.image_layout == "original"
