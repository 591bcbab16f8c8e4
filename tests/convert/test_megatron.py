"""Megatron-LLM checkpoints, split by independent code, convert to the tensors that were split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.convert.original_files import (
    LOCATIONS,
    TEXT_TOKENS,
    VISION,
    megatron_arguments,
    original_settings,
    original_weights,
    write_megatron,
    write_original,
    write_sentencepiece,
)
from tests.factories import ask

from solo_vlm.convert.checkpoint_files import open_safetensors
from solo_vlm.convert.megatron import convert_megatron
from solo_vlm.convert.original import convert_original
from solo_vlm.generate import GenerationPipeline
from solo_vlm.utils.errors import SoloError

ROWS = TEXT_TOKENS + len(VISION + LOCATIONS)
PADDED = 2048  # padded to a multiple of 128 times the ranks
SETTINGS = original_settings(ROWS)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return original_weights(SETTINGS)


@pytest.fixture(scope="module")
def expected(weights, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Return the same weights, converted from the original format."""
    folder = tmp_path_factory.mktemp("expected")
    convert_original(write_original(folder / "source", weights, SETTINGS), folder / "solo")
    return read(folder / "solo")


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    write_sentencepiece(tmp_path / "tokenizer", VISION + LOCATIONS)
    return tmp_path / "tokenizer"


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in open_safetensors(folder / "model.safetensors").items()}


def assert_identical(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_identical_tensors_from_any_split(tensor, pipeline, weights, expected, tokenizer, tmp_path):
    source = write_megatron(tmp_path / "megatron", weights, SETTINGS, tensor, pipeline, PADDED)
    converted = convert_megatron(source, tmp_path / "solo", tokenizer_folder=tokenizer)
    assert converted.vocabulary == converted.tokens == ROWS
    assert_identical(read(tmp_path / "solo"), expected)


def test_names_from_before_the_first_training_step(weights, expected, tmp_path):
    source = write_megatron(tmp_path / "megatron", weights, SETTINGS, 2, 1, PADDED, is_trained=False)
    convert_megatron(source, tmp_path / "solo", vocabulary=ROWS)
    assert_identical(read(tmp_path / "solo"), expected)


def test_heads_in_halves_order(weights, expected, tmp_path):
    settings = SETTINGS | {"num_attention_heads": 4, "num_key_value_heads": 2}  # heads of 8 rows
    weights = original_weights(settings)
    convert_original(write_original(tmp_path / "source", weights, settings), tmp_path / "solo")
    for number, interleaved in enumerate((True, False)):
        source = write_megatron(
            tmp_path / f"megatron{number}", weights, settings, 2, 1, PADDED, interleaved=interleaved
        )
        rotary = "interleaved" if interleaved else "halves"
        convert_megatron(source, tmp_path / f"solo{number}", vocabulary=ROWS, rotary=rotary)
        assert_identical(read(tmp_path / f"solo{number}"), read(tmp_path / "solo"))


def test_without_tokenizer_and_vocabulary_padding_is_kept(weights, expected, tmp_path):
    source = write_megatron(tmp_path / "megatron", weights, SETTINGS, 2, 1, PADDED)
    assert convert_megatron(source, tmp_path / "solo").vocabulary == PADDED
    head = read(tmp_path / "solo")["lm_head.weight"]
    assert torch.equal(head[:ROWS], expected["lm_head.weight"])
    with pytest.raises(SoloError, match="2048 rows of tokens: the vocabulary cannot be 2049"):
        convert_megatron(source, tmp_path / "other", vocabulary=2049)
    with pytest.raises(SoloError, match="has no tokenizer: name the folder"):
        convert_megatron(source, tmp_path / "other", tokenizer_folder=tmp_path)


def test_tokens_are_added_to_the_tokenizer_of_the_llm(weights, expected, tmp_path):
    source = write_megatron(tmp_path / "megatron", weights, SETTINGS, 2, 1, PADDED)
    write_sentencepiece(source, [])
    assert convert_megatron(source, tmp_path / "solo").vocabulary == ROWS
    assert_identical(read(tmp_path / "solo"), expected)


def test_config_matches_the_arguments_and_the_model_answers(weights, tokenizer, tmp_path, picture):
    source = write_megatron(tmp_path / "megatron", weights, SETTINGS, 2, 1, PADDED)
    convert_megatron(source, tmp_path / "solo", tokenizer_folder=tokenizer)
    pipeline = GenerationPipeline.from_pretrained(tmp_path / "solo", device="cpu")
    text = pipeline.model.config.text_config
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "sliding_window",
        "rms_norm_eps",
        "max_position_embeddings",
    ):
        assert getattr(text, name) == SETTINGS[name]
    assert text.rope_parameters["rope_theta"] == 10000.0
    assert pipeline.model.dtype == torch.bfloat16
    assert pipeline.processor.image_layout == "paper"
    pipeline.answer([ask("what is this?", picture(64, 32))], max_new_tokens=3)


def test_iteration_by_number_or_folder(weights, expected, tmp_path):
    source = write_megatron(tmp_path / "megatron", weights, SETTINGS, 1, 1, PADDED)
    (source / "iter_0000100").mkdir()
    (source / "latest_checkpointed_iteration.txt").write_text("100")
    convert_megatron(source, tmp_path / "by number", vocabulary=ROWS, iteration=300)
    convert_megatron(source / "iter_0000300", tmp_path / "by folder", vocabulary=ROWS)
    assert_identical(read(tmp_path / "by number"), expected)
    assert_identical(read(tmp_path / "by folder"), expected)
    with pytest.raises(SoloError, match="iter_0000100 is not a Megatron checkpoint"):
        convert_megatron(source, tmp_path / "latest")
    with pytest.raises(SoloError, match="iter_0000007 is missing"):
        convert_megatron(source, tmp_path / "other", iteration=7)


def test_checkpoint_with_a_distributed_optimizer(weights, expected, tmp_path):
    source = write_megatron(tmp_path / "megatron", weights, SETTINGS, 2, 1, PADDED)
    for rank in range(2):
        folder = source / "iter_0000300" / f"mp_rank_{rank:02d}"
        (folder / "model_optim_rng.pt").rename(folder / "model_rng.pt")
        state = folder.with_name(f"{folder.name}_000")
        state.mkdir()
        torch.save({"optimizer": torch.zeros(3)}, state / "optim.pt")
    convert_megatron(source, tmp_path / "solo", vocabulary=ROWS)
    assert_identical(read(tmp_path / "solo"), expected)


# --- other objects in the pickles -----------------------------------------------------------------------


def with_foreign_objects() -> dict:
    """Return objects of classes that are not installed: Megatron's enums and numpy's RNG states."""
    import sys
    from enum import Enum
    from types import ModuleType

    import numpy as np

    module = ModuleType("megatron.model.enums")
    module.PositionEmbeddingType = Enum("PositionEmbeddingType", ["rotary"], module=module.__name__)
    sys.modules |= {"megatron": ModuleType("megatron"), "megatron.model": ModuleType("megatron.model")}
    sys.modules[module.__name__] = module
    arguments = megatron_arguments(SETTINGS, 1, 1, PADDED)
    arguments.position_embedding_type = module.PositionEmbeddingType.rotary
    return {"args": arguments, "rng_state": [{"np_rng_state": np.random.RandomState(0).get_state()}]}


def test_objects_of_megatron_become_placeholders(weights, expected, tmp_path, monkeypatch):
    import sys

    before = dict(sys.modules)
    source = write_megatron(
        tmp_path / "megatron", weights, SETTINGS, 1, 1, PADDED, extra=with_foreign_objects()
    )
    for name in sys.modules.keys() - before.keys():
        if name.startswith("megatron"):
            del sys.modules[name]
    convert_megatron(source, tmp_path / "solo", vocabulary=ROWS)
    assert_identical(read(tmp_path / "solo"), expected)


class Code:
    """Object that makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.trace),)


def assert_rejected(source: Path, tmp_path: Path, *mentioned: str) -> None:
    with pytest.raises(SoloError) as caught:
        convert_megatron(source, tmp_path / "out" / "solo", vocabulary=ROWS)
    for words in mentioned:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("**/*"))


def test_code_in_pickles_is_rejected_and_not_run(weights, tmp_path):
    trace = tmp_path / "trace"
    source = write_megatron(
        tmp_path / "megatron", weights, SETTINGS, 1, 1, PADDED, extra={"hook": Code(trace)}
    )
    assert_rejected(source, tmp_path, "model_optim_rng.pt", "code (posix.mkdir)", "nothing in it was run")
    assert not trace.exists()


@pytest.fixture
def broken(weights, tmp_path):
    """Return a function that writes a 2 x 2 checkpoint and applies `change` to the content of one pickle."""

    def make(change) -> tuple[Path, Path]:
        source = write_megatron(tmp_path / "megatron", weights, SETTINGS, 2, 2, PADDED)
        file = source / "iter_0000300" / "mp_rank_01_000" / "model_optim_rng.pt"
        content = torch.load(file, weights_only=False)
        change(content)
        torch.save(content, file)
        return source, file

    return make


def test_missing_and_truncated_ranks_are_rejected(broken, tmp_path):
    source, file = broken(lambda content: None)
    file.write_bytes(file.read_bytes()[:5000])
    assert_rejected(source, tmp_path, str(file), "truncated")
    file.unlink()
    assert_rejected(source, tmp_path, f"{file} is missing")


def test_part_of_the_wrong_shape_is_rejected(broken, tmp_path):
    key = "layers.1.mlp.dense_4h_to_h.weight"

    def change(content):
        content["model"]["language_model"]["encoder"][key] = torch.zeros(64, 23, dtype=torch.bfloat16)

    source, file = broken(change)
    assert_rejected(source, tmp_path, str(file), key, "[64, 23]", "down_proj")


def test_missing_part_is_rejected(broken, tmp_path):
    source, _ = broken(lambda content: content["model"]["language_model"].pop("embed_vision_patch"))
    assert_rejected(source, tmp_path, "embed_vision_patch is in 1 of 2 parts only")


def test_missing_arguments_missing_model_and_interleaved_pipelines_are_rejected(weights, tmp_path):
    for member, message in (("args", "args"), ("model", "no language model")):
        source = write_megatron(tmp_path / member, weights, SETTINGS, 1, 1, PADDED, extra={member: None})
        assert_rejected(source, tmp_path, message)
    source = write_megatron(tmp_path / "virtual", weights, SETTINGS, 1, 1, PADDED, extra={"model0": {}})
    assert_rejected(source, tmp_path, "interleaved pipeline")
    arguments = megatron_arguments(SETTINGS, 1, 1, PADDED)
    del arguments.ffn_hidden_size
    source = write_megatron(tmp_path / "less", weights, SETTINGS, 1, 1, PADDED, extra={"args": arguments})
    assert_rejected(source, tmp_path, "lack ffn_hidden_size")
