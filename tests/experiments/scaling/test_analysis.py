"""Analysis of tables by `solo scaling fit` and `plot`: laws, predictions, plots and errors."""

from __future__ import annotations

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scaling_fit import LAWS, runs

LAW = LAWS["hoffmann_2022"]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr("solo_vlm.experiments.scaling.laws.fit_scaling_law.__defaults__", (50, 0))


def rows(points=40, **extra):
    n, d, loss = runs(LAW, seed=0, points=points, noise=0.001)
    return [{"n": a, "d": b, "loss": c, "note": "x", **extra} for a, b, c in zip(n, d, loss, strict=True)]


def write(path, rows):
    lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_json_has_the_law_with_intervals_and_optima(run, tmp_path):
    table = write(tmp_path / "points.csv", rows())
    status, out, _ = run("scaling", "fit", table, "--json", "--budget", "1e21", "--budget", "1e24")
    assert status == 0
    facts = json.loads(out)
    assert facts["n_points"] == 40
    for name in ("E", "A", "B", "alpha", "beta", "a", "b"):
        low, high = facts["intervals"][name]
        assert low < getattr(LAW, name) < high
        assert low <= facts[name] <= high
    assert [optimum["flops"] for optimum in facts["optima"]] == [1e21, 1e24]
    optimum = facts["optima"][1]
    assert optimum["n"] == pytest.approx(LAW.optimum(1e24).n, rel=0.2)
    assert 6 * optimum["n"] * optimum["d"] == pytest.approx(1e24)


def test_tokens_are_derived_from_flops(run, tmp_path):
    by_tokens = write(tmp_path / "tokens.csv", rows())
    by_flops = [{"flops": 6 * row["n"] * row["d"], "n": row["n"], "loss": row["loss"]} for row in rows()]
    by_flops = write(tmp_path / "flops.csv", by_flops)
    facts = [json.loads(run("scaling", "fit", table, "--json")[1]) for table in (by_tokens, by_flops)]
    assert facts[0]["alpha"] == pytest.approx(facts[1]["alpha"], rel=1e-6)
    assert any("flops / (6 n)" in note for note in facts[1]["notes"])


def test_held_out_rows_are_predicted_not_fitted(run, tmp_path):
    held = {"run": "large", "n": 1e11, "d": 1e13, "loss": float(LAW.loss(1e11, 1e13)), "holdout": True}
    table = [{**row, "run": "small", "holdout": False} for row in rows()] + [{**held, "note": "x"}]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "results.parquet")
    facts = json.loads(run("scaling", "fit", tmp_path / "results.parquet", "--json")[1])
    assert facts["n_points"] == 40
    (prediction,) = facts["holdout"]
    assert prediction["run"] == "large"
    assert abs(prediction["error"]) < 0.02
    assert prediction["interval"][0] < prediction["predicted"] < prediction["interval"][1]


def test_separate_vision_tokens_give_a_mixture_law(run, tmp_path):
    table = []
    for number, row in enumerate(rows()):
        share = (0.0, 0.3, 0.6)[number % 3]
        text, vision = (1 - share) * row["d"], share * row["d"]
        loss = float(LAW.loss(row["n"], text + 0.5 * vision))
        table.append({"n": row["n"], "d_text": text, "d_vision": vision, "loss": loss})
    facts = json.loads(run("scaling", "fit", write(tmp_path / "mixed.csv", table), "--json")[1])
    assert facts["mixture"]["g"] == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("value", ["much", "-1", "0", "nan", "inf", ""])
def test_invalid_value_is_reported_with_row_and_column(run, tmp_path, value):
    table = rows(8)
    table[4]["loss"] = value
    status, _, err = run("scaling", "fit", write(tmp_path / "points.csv", table))
    assert status == 2
    assert "row 5, column loss" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n,tokens,loss\n1,2,3\n", "expected n and loss, and d"),
        ("", "no rows"),
        ("n,d,loss\n1,2,3\n", "1 points"),
    ],
)
def test_table_without_points_is_rejected(run, tmp_path, text, message):
    (tmp_path / "points.csv").write_text(text)
    status, _, err = run("scaling", "fit", tmp_path / "points.csv")
    assert status == 2
    assert message in err
    assert run("scaling", "fit", tmp_path / "missing.csv")[0] == 2


def test_plots_are_images_and_a_self_contained_page(run, tmp_path):
    table = write(tmp_path / "points.csv", rows())
    status, out, _ = run("scaling", "fit", table, "--out", tmp_path / "fit", "--budget", "1e22")
    assert status == 0
    assert "95% interval" in out and "Optimal for a budget" in out
    assert json.loads((tmp_path / "fit/fit.json").read_text())["n_points"] == 40
    assert run("scaling", "plot", table, "--out", tmp_path / "plots")[0] == 0
    for folder in (tmp_path / "fit", tmp_path / "plots"):
        for name in ("law.png", "optimum.png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")
        page = (folder / "laws.html").read_text()
        assert not re.search(r"<(script|link|img)[^>]+(src|href)=(?![\"']?data:)", page)
        assert page.count("data:image/png;base64,") == 2
        assert "Points" in page and "95% interval" in page
