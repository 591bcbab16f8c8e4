"""Sweeps: their runs and models, and one from data to law."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from tests.factories import make_llm
from transformers import AutoModel, AutoTokenizer, Qwen3Config

from solo_vlm.experiments.scaling.sweep import SweepSettings, prepare, scaled_rates, write_sized_model
from solo_vlm.models.load import load_config
from solo_vlm.utils.errors import SoloError


@pytest.fixture(scope="session")
def llm(tmp_path_factory):
    """Return a folder with a tiny LLM."""
    folder = tmp_path_factory.mktemp("llm")
    for part in make_llm():
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(llm, tmp_path):
    """Return a function that makes settings of a sweep of two sizes without data."""

    def make(**changes):
        source = [{"path": "train.parquet"}]
        plain = {
            "root": str(tmp_path / "sweep"),
            "llm": str(llm),
            "base_width": 48,
            "sizes": {
                "small": {"hidden_size": 24, "head_dim": 6},
                "large": {"hidden_size": 96, "head_dim": 6, "num_hidden_layers": 3},
            },
            "tokens": [640, 1280],
            "recipe": {
                "global_batch": 2,
                "data": {"sources": source, "sequence_length": 32},
                "validation": {"sources": source},
                "optimizer": {"learning_rate": 1e-3, "min_learning_rate": 1e-4},
            },
            **changes,
        }
        return SweepSettings.parse(plain, "sweep")

    return make


def test_sweep_runs_every_size_at_every_budget(settings):
    held_out = {"name": "next", "size": {"hidden_size": 192, "head_dim": 6}, "tokens": 6400}
    runs = prepare(settings(holdout=[held_out]))
    assert [(run.size, run.recipe.steps, run.holdout) for run in runs] == [
        ("small", 10, False),
        ("small", 20, False),
        ("large", 10, False),
        ("large", 20, False),
        ("next", 100, True),
    ]
    assert len({run.name for run in runs}) == 5
    rates = {run.size: run.recipe.optimizer for run in runs}
    assert {size: rate.learning_rate for size, rate in rates.items()} == {
        "small": pytest.approx(2e-3),
        "large": pytest.approx(5e-4),
        "next": pytest.approx(2.5e-4),
    }
    assert rates["small"].min_learning_rate == pytest.approx(2e-4)
    assert {rate.patch_learning_rate for rate in rates.values()} == {1e-3}


def test_flops_budget_sets_tokens_per_size(settings):
    """D = C / (6 N), with N counted on the model without its embeddings."""
    sweep = settings(tokens=[], flops=[1e9])
    for run in prepare(sweep):
        model = AutoModel.from_pretrained(run.recipe.mixture.at(run.recipe.model))
        n = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
        assert run.recipe.steps == round(1e9 / (6 * n) / 64)
    with pytest.raises(SoloError, match="less than one step"):
        prepare(settings(tokens=[], flops=[1e6]))


def test_initial_standard_deviation_follows_the_width(llm, tmp_path):
    spreads = {}
    for width in (24, 96):
        write_sized_model(tmp_path / str(width), llm, {"hidden_size": width, "head_dim": 6}, base_width=48)
        model = AutoModel.from_pretrained(tmp_path / str(width))
        spreads[width] = model.language_model.layers[0].mlp.up_proj.weight.std().item()
        assert load_config(tmp_path / str(width)).text_config.num_hidden_layers == 2
    assert spreads[24] / spreads[96] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(("head_dim", "scaled"), [(12, 24), (20, 20)])
def test_derived_head_dim_follows_the_width_in_families_with_another_default(llm, tmp_path, head_dim, scaled):
    """Qwen3's default is 128 at any width."""
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}
    tokenizer = AutoTokenizer.from_pretrained(llm)
    Qwen3Config(**sizes, head_dim=head_dim, intermediate_size=64, vocab_size=len(tokenizer)).save_pretrained(
        tmp_path / "qwen"
    )
    tokenizer.save_pretrained(tmp_path / "qwen")
    write_sized_model(tmp_path / "wide", tmp_path / "qwen", {"hidden_size": 96}, base_width=48)
    assert load_config(tmp_path / "wide").text_config.head_dim == scaled


def test_existing_model_of_another_size_is_rejected(settings):
    prepare(settings())
    with pytest.raises(SoloError, match="hidden_size 24, the sweep 36"):
        prepare(settings(sizes={"small": {"hidden_size": 36, "head_dim": 6}}))
    with pytest.raises(SoloError, match="initializer_range"):
        prepare(settings(base_width=64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flops": [1e9]}, "tokens or as flops"),
        ({"tokens": []}, "tokens or as flops"),
        ({"sizes": {"small": {"num_hidden_layers": 2}}}, "hidden_size"),
        ({"sizes": {"small": {"hidden_size": 24, "hidden_layers": 2}}}, "did you mean num_hidden_layers"),
        ({"recipe": {"data": {"sources": []}}}, "validation"),
        ({"recipe": {"steps": 3, "validation": {"sources": []}}}, "recipe.steps is set by the sweep"),
        ({"holdout": [{"name": "small", "size": {"hidden_size": 24}, "tokens": 640}]}, "another size"),
        ({"token": [640]}, "did you mean tokens"),
    ],
)
def test_invalid_settings_are_rejected(settings, changes, message):
    with pytest.raises(SoloError, match=message):
        prepare(settings(**changes))


def test_default_learning_rates_are_scaled():
    optimizer = scaled_rates({}, width=128, base_width=64)["optimizer"]
    assert optimizer["learning_rate"] == pytest.approx(2.5e-5)
    assert optimizer["patch_learning_rate"] == 5e-5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sweep_resumes_after_sigterm_and_fits_a_law(run, tmp_path):
    root = tmp_path / "sweep"
    command = ["scaling", "sweep", "sweeps/toy", *toy_sweep(root), "--processes", "2"]
    first = subprocess.Popen([sys.executable, "-m", "solo_vlm", *command], stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    line = next(line for line in first.stderr if ": done, 1 of" in line)
    first.send_signal(signal.SIGTERM)
    first.stderr.read()
    assert first.wait() == 128 + signal.SIGTERM
    finished = line.split(":")[0]
    manifest = root / "runs" / finished / "manifest.json"
    before = manifest.stat().st_mtime_ns

    status, out, err = run(*command, "--json")
    assert status == 0, err
    assert f"{finished}: done" not in err
    assert manifest.stat().st_mtime_ns == before
    facts = json.loads(out)
    assert facts["n_points"] == 9
    assert [prediction["run"] for prediction in facts["holdout"]] == ["w64-d2560"]
    rows = pq.read_table(root / "results.parquet").to_pylist()
    assert len(rows) == 10
    for row in rows:
        assert row["d"] == row["d_text"] + row["d_vision"]
        assert 0.9 * row["steps"] * 256 < row["d"] <= row["steps"] * 256
        assert row["d_vision"] > 0 and row["loss"] > 0
        # Kaplan's 6 N D leaves out attention and what the embeddings and the head compute.
        assert row["flops"] > 6 * row["n_non_embedding"] * row["d"]
    assert (root / "plots" / "law.png").is_file()
    held_out = {path.stem for path in (root / "data").glob("heldout_*.parquet")}
    assert held_out == {"heldout_text", "heldout_stage2"}

    status, _, err = run(*command, "recipe.seed=1")
    assert status == 2
    assert "another recipe" in err


def toy_sweep(root):
    """Return overrides: three sizes at three short budgets, and one held-out run."""
    sizes = ", ".join(
        f"w{width}: {{hidden_size: {width}, intermediate_size: {2 * width}, num_hidden_layers: {layers}, "
        f"num_attention_heads: {width // 16}, num_key_value_heads: {width // 16}}}"
        for width, layers in ((16, 1), (32, 1), (48, 2))
    )
    held = "hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 4"
    return [
        f"root={root}",
        "toy_data={text: 1500, stage2: 5000, heldout_text: 20, heldout_stage2: 60}",
        f"sizes={{{sizes}}}",
        "tokens=[512, 1024, 2048]",
        f"holdout=[{{name: w64, size: {{{held}}}, tokens: 2560}}]",
        "recipe.validation.sequences=4",
    ]
