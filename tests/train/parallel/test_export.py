"""Export of a sharded model without gathering it."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.factories import make_solo, run_settings

from solo_vlm.models.load import load_model
from solo_vlm.train import Recipe
from solo_vlm.train.model import make_model
from solo_vlm.train.parallel.context import init_distributed
from solo_vlm.train.parallel.export import can_save_sharded, save_sharded


def export(plain, out):
    recipe = Recipe.parse(plain)
    with init_distributed(recipe) as context:
        model, processor = make_model(recipe, context)
        assert can_save_sharded(model)
        save_sharded(out, model, processor, context, file_size=50_000)


@pytest.fixture(scope="module")
def models(runs):
    """Return a folder with models, one of which has biases of routers, whole in every process."""
    solo = make_solo("inkling_text")
    for name, buffer in solo.model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.3, 0.3, len(buffer)))
    solo.save(runs / "inkling_text")
    return runs


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "size", "tensor"), [("llama", 2, 1), ("qwen3", 4, 2), ("inkling_text", 2, 1)]
)
def test_sharded_export_equals_saved_model(models, tmp_path, start, family, size, tensor):
    plain = run_settings(models, tmp_path / "run", model=family, parallel={"tensor": tensor})
    assert start(size, export, plain, tmp_path / "out").wait() == [0] * size
    expected = load_file(models / family / "model.safetensors")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(safe_open(tmp_path / "out" / name, "pt"))
            for name in set(index["weight_map"].values())
        }
        found = {key: files[name].get_tensor(key) for key, name in index["weight_map"].items()}
    assert found.keys() == expected.keys()
    assert all((found[key] == expected[key].float()).all() for key in expected)
    loaded = load_model(tmp_path / "out").state_dict()
    assert all(
        (loaded[key] == tensor).all() for key, tensor in load_model(models / family).state_dict().items()
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        path.name for path in (models / family).iterdir() if path.suffix != ".safetensors"
    }
    assert not (tmp_path / "out" / "sharded").exists()


def test_model_with_fused_experts_is_gathered():
    assert not can_save_sharded(make_solo("mixtral").model)
