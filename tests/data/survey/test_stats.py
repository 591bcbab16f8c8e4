"""Statistics of a mixture: exact counts against the data, estimates against the exact counts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from solo_vlm.data.encode import load_encoder
from solo_vlm.data.mixture import Mixture
from solo_vlm.data.packing import pack
from solo_vlm.data.sources import open_source
from solo_vlm.data.survey.reading import draw_rows, estimate_totals
from solo_vlm.data.survey.stats import estimate_instances, mixture_stats
from solo_vlm.train.recipe import Recipe

LENGTH = 64


def pieces(length: int) -> list[int]:
    """Return the lengths of the pieces of a long text."""
    return [LENGTH] * (length // LENGTH) + ([length % LENGTH] if length % LENGTH else [])


@pytest.fixture(scope="module")
def stats(made):
    mixture = Mixture.load(made.file)
    encoder = load_encoder(made.folder / "model")
    return lambda samples: mixture_stats(mixture, encoder, samples).as_dict()


def test_exact_counts_match_the_data(made, stats):
    facts = stats(None)
    captions, texts = facts["sources"]
    vision, text = (sum(column) for column in zip(*made.captions, strict=True))
    assert facts["exact"] is True
    assert (captions["samples"], captions["images"], captions["skipped"]) == (120, 120, {})
    assert (captions["vision_tokens"], captions["text_tokens"]) == (vision, text)
    assert (texts["samples"], texts["images"], texts["vision_tokens"]) == (30, 0, 0)
    assert texts["tokens"] == texts["text_tokens"] == sum(made.texts)
    lengths = [[sum(both) for both in made.captions], [p for length in made.texts for p in pieces(length)]]
    for source, own in zip(facts["sources"], lengths, strict=True):
        assert source["instances"] == len(pack(own, LENGTH))
        assert source["fill"] == sum(own) / (source["instances"] * LENGTH)
        assert all(low == high == source[name] for name, (low, high) in source["interval_95"].items())
    total = facts["total"]
    for name in ("instances", "samples", "images", "tokens", "text_tokens", "vision_tokens"):
        assert total[name] == captions[name] + texts[name]
    assert captions["share"] + texts["share"] == pytest.approx(1)
    assert total["vision_share"] == vision / (vision + text + sum(made.texts))


def test_estimate_from_all_rows_is_exact(stats):
    exact, estimate = stats(None), stats(1000)
    assert estimate["exact"] is False
    for name in ("samples", "images", "tokens", "text_tokens", "vision_tokens"):
        assert estimate["total"][name] == exact["total"][name]
        assert estimate["total"]["interval_95"][name] == [exact["total"][name]] * 2


def test_estimate_reads_few_rows_and_is_close(stats):
    exact, estimate = stats(None), stats(40)
    low, high = estimate["total"]["interval_95"]["tokens"]
    assert low < estimate["total"]["tokens"] < high
    assert high - low < 0.4 * exact["total"]["tokens"]
    assert estimate["total"]["tokens"] == pytest.approx(exact["total"]["tokens"], rel=0.2)
    assert estimate["total"]["instances"] == pytest.approx(exact["total"]["instances"], rel=0.2)


def test_95_percent_intervals_cover_the_true_total():
    """Shards differ in size and content; 400 samples, each of 4 rows from each of 30 shards."""
    rng = np.random.default_rng(1)
    rows = [rng.gamma(2, 10 + shard % 7, (int(rng.integers(6, 20)), 1)) for shard in range(150)]
    expected = sum(shard.sum() for shard in rows)
    errors, covered = [], 0
    for _ in range(400):
        shards = rng.choice(len(rows), 30, replace=False)
        drawn = [(len(rows[shard]), rng.permutation(rows[shard])[:4]) for shard in shards]
        estimate = estimate_totals(len(rows), drawn)
        errors.append(estimate.totals[0] / expected - 1)
        covered += abs(estimate.totals[0] - expected) <= estimate.margins[0]
    assert abs(np.mean(errors)) < 0.01
    assert 0.91 < covered / 400 < 0.98


def test_rows_are_sampled_evenly_over_shards(made):
    source = open_source(made.folder / "captions.parquet")  # 24 shards of 5 rows
    drawn = list(draw_rows(source, 20, np.random.default_rng(0)))
    assert len(drawn) == 10
    for number, (shard, _, _) in enumerate(drawn):
        assert number * 24 // 10 <= shard < (number + 1) * 24 // 10
    assert all(len(rows) == 5 and len(chosen) == len(set(chosen)) == 2 for _, rows, chosen in drawn)


def test_packed_sequences_of_a_large_source_are_estimated_from_a_sample():
    lengths = np.random.default_rng(0).integers(1, 1001, 20_000)
    expected = len(pack(map(int, lengths), 1000))
    drawn = lengths[::40].tolist()
    estimate = estimate_instances(int(lengths.sum()), drawn, 1000, 128, np.random.default_rng(0))
    assert estimate == pytest.approx(expected, rel=0.03)
    assert estimate_instances(0, [], 1000, 128, np.random.default_rng(0)) == 0


def test_unusable_rows_are_counted_by_reason(broken, run_data):
    for options in (["--exact"], ["--samples", 100]):
        code, out, error = run_data("stats", broken, "--json", *options)
        assert (code, error) == (0, "")
        bad, texts = json.loads(out)["sources"]
        assert bad["samples"] == 1
        assert bad["skipped"] == {"image": 1, "too-long": 1, "schema": 2, "image-count": 1}
        assert texts["skipped"] == {}


def test_table_has_counts_and_intervals(made, run_data):
    code, out, error = run_data("stats", made.file, "data.sequence_length=128", "--samples", 50)
    assert (code, error) == (0, "")
    assert "Estimate from up to 50 rows per source" in out
    assert "captions.parquet" in out and "texts.jsonl" in out, out
    assert "95% intervals" in out
    code, out, _ = run_data("stats", made.file, "--exact")
    assert code == 0
    assert "Estimate" not in out


def test_recipe_is_accepted_as_mixture(made, tmp_path):
    recipe = {**yaml.safe_load(made.file.read_text()), "out": "run", "steps": 3}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    mixture = Mixture.load(path, ["data.seed=5"])
    assert mixture.data == Recipe.load(path, ["data.seed=5"]).data
    assert mixture.source_paths() == (str(made.folder / "captions.parquet"), str(made.folder / "texts.jsonl"))


def test_urls_are_unchanged():
    settings = {"root": "r", "model": "m", "data": {"sources": [{"path": "s3://b/x"}, {"path": "y"}]}}
    assert Mixture.parse(settings).source_paths() == ("s3://b/x", "r/y")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.sources=[{path: nothing.parquet}]"], "no data files at"),
        (["data.sequence_lenght=5"], "did you mean sequence_length"),
        (["model=nowhere"], "nowhere"),
        (["data.sources=[{path: empty.jsonl}]"], "has no rows"),
    ],
)
@pytest.mark.parametrize("verb", ["stats", "verify", "view"])
def test_user_error_is_one_line_with_exit_code_2(made, run_data, verb, overrides, message, tmp_path):
    (made.folder / "empty.jsonl").touch()
    options = ["--out", tmp_path / "page.html"] if verb == "view" else []
    code, out, error = run_data(verb, made.file, *overrides, *options)
    assert (code, out) == (2, "")
    (line,) = error.splitlines()
    assert line.startswith("solo: ")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_missing_mixture_error_says_what_to_pass(run_data):
    assert run_data("stats", "nowhere.yaml")[::2] == (
        2,
        "solo: no mixture nowhere.yaml: give the path of a YAML file, or a name such as quickstart/stage1\n",
    )
