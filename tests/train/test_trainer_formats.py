"""From data as people have it to a trained model: a YAML of at most ten lines, and one command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tests.data.formats.test_converters import messages, turns
from tests.factories import read_steps, tar_bytes

RECIPE = """\
model: {model}
out: run
steps: 2
global_batch: 2
data:
  sequence_length: 128
  streams: 2
  sources:
    - {source}
"""


@pytest.fixture
def folder(tmp_path, picture, monkeypatch) -> Path:
    """Return a folder with photos, in which commands run."""
    for name in ("cat/1", "cat/2", "dog/3", "dog/4"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(96, 64, seed=int(name[-1])).save(tmp_path / "photos" / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def llava(number: int) -> dict:
    image = ("cat/1.png", "cat/2.png", "dog/3.png", None)[number % 4]
    row = {"id": number, "conversations": turns("<image>\nWhat?" if image else "2 + 2?", "A cat.")}
    return row | ({"image": image} if image else {})


def write_llava(folder: Path) -> None:
    (folder / "chats.json").write_text(json.dumps([llava(number) for number in range(40)]))


def write_finevision(folder: Path) -> None:
    rows = [
        {
            "images": [{"bytes": Path(folder, "photos/cat/1.png").read_bytes(), "path": None}],
            "texts": [{"user": "What?", "assistant": "A cat."}],
            "visual_dependency_min": number % 5 + 1,
        }
        for number in range(40)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet", row_group_size=5)


def write_lines(folder: Path, rows: list[dict]) -> None:
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_tar(folder: Path) -> None:
    photo = (folder / "photos/cat/1.png").read_bytes()
    members = {
        f"{n}.{suffix}": data for n in range(40) for suffix, data in (("png", photo), ("txt", b"a cat"))
    }
    (folder / "x.tar").write_bytes(tar_bytes(members))


def write_arrow(folder: Path) -> None:
    """Write a file as `datasets` does."""
    table = pa.Table.from_pylist([{"question": "2 + 2?", "answer": "4"}] * 40)
    (folder / "saved").mkdir()
    (folder / "saved/state.json").write_text("{}")
    with (
        pa.OSFile(str(folder / "saved/data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as stream,
    ):
        stream.write_table(table)


SOURCES = {
    "llava": (write_llava, "{path: chats.json, images: photos}"),
    "sharegpt": (
        lambda folder: write_lines(folder, [{"conversations": turns("Hi", f"Hello {n}")} for n in range(40)]),
        "{path: x.jsonl}",
    ),
    "chatml": (
        lambda folder: write_lines(
            folder,
            [{"messages": messages("Hi", "A cat.", user="human"), "images": ["photos/cat/1.png"]}] * 40,
        ),
        "{path: x.jsonl}",
    ),
    "cauldron": (write_finevision, "{path: x.parquet, format: cauldron}"),
    "finevision": (write_finevision, '{path: x.parquet, filter: "visual_dependency_min >= 3"}'),
    "captions": (
        lambda folder: write_lines(folder, [{"photo": "dog/3.png", "title": "A dog."}] * 40),
        "{path: x.jsonl, images: photos, columns: {image: photo, text: title}}",
    ),
    "imagefolder": (lambda folder: None, "{path: photos}"),
    "webdataset": (write_tar, "{path: x.tar}"),
    "hf": (write_arrow, "{path: saved, format: hf}"),
}


def train(run, folder: Path, solo_folder: Path, source: str, *overrides: str) -> tuple[int, str, str]:
    text = RECIPE.format(model=solo_folder, source=source)
    assert len(text.splitlines()) <= 10
    (folder / "train.yaml").write_text(text)
    return run("train", "train.yaml", *overrides)


@pytest.mark.parametrize("name", SOURCES)
def test_ten_lines_of_yaml_train_on_data_as_it_is(run, folder, solo_folder, name):
    write, source = SOURCES[name]
    write(folder)
    code, out, error = train(run, folder, solo_folder, source)
    assert code == 0, error
    assert "2 steps" in out
    if name not in ("webdataset", "imagefolder", "cauldron"):
        assert "reading rows as" in " ".join(error.split())
    assert (folder / "run/model/config.json").is_file()
    counts = json.loads((folder / "run/manifest.json").read_text())["outcome"]["data"]
    assert counts["documents"] > 0
    assert counts.get("skipped", 0) == 0
    assert (counts.get("filtered", 0) > 0) == (name == "finevision")
    assert any("filtered/" in key for key in read_steps(folder / "run")[-1]) == (name == "finevision")


def test_each_source_is_said_once_to_be_read_in_a_format(run, folder, solo_folder):
    write_llava(folder)
    held_out = "validation={sources: [{path: held_out.json, images: photos}], sequences: 1}"
    (folder / "held_out.json").write_text((folder / "chats.json").read_text())
    source = "{path: chats.json, images: photos}"
    code, _, error = train(run, folder, solo_folder, source, held_out, "steps=null", "data.epochs=1")
    assert code == 0, error
    assert sorted(re.findall(r"(\w+)\.json: reading rows as", " ".join(error.split()))) == [
        "chats",
        "held_out",
    ]


@pytest.mark.parametrize("preset", ["full", "lora", "patches"])
def test_preset_trains_on_data_named_in_the_command(run, folder, solo_folder, preset):
    write_llava(folder)
    sources = "data.sources=[{path: chats.json, images: photos}]"
    smaller = ("data.workers=0", "data.sequence_length=128", "global_batch=2", "data.streams=2")
    code, _, error = run("train", f"presets/{preset}", f"model={solo_folder}", sources, *smaller)
    assert code == 0, error
    assert (folder / "run/model/config.json").is_file()


def test_plan_counts_only_the_rows_that_the_filter_keeps(run, folder, solo_folder):
    write_finevision(folder)
    plans = []
    for source in ("{path: x.parquet}", '{path: x.parquet, filter: "visual_dependency_min >= 3"}'):
        code, out, error = train(
            run, folder, solo_folder, source, "--dry-run", "--json", "data.epochs=4", "steps=null"
        )
        assert code == 0, error
        plans.append(json.loads(out))
    assert plans[1]["steps"] < plans[0]["steps"]


def test_wrong_columns_give_one_line_with_found_and_expected(run, folder, solo_folder):
    write_lines(folder, [{"photo": "dog/3.png", "title": "A dog."}] * 4)
    for source, message in (
        ("{path: x.jsonl}", "rows have photo, title, but"),
        ("{path: x.jsonl, format: llava}", "rows have photo, title, but llava has conversations"),
        ("{path: x.jsonl, columns: {image: foto}}", "did you mean photo?"),
        ("{path: x.jsonl, images: fotos}", "no folder"),
        ('{path: x.jsonl, filter: "stars >= 3"}', "filter names stars, but rows have photo, title"),
        ("{path: x.jsonl, format: lava}", "format"),
    ):
        code, out, error = train(run, folder, solo_folder, source)
        assert (code, out) == (2, "")
        (line,) = error.strip().splitlines()
        assert message in line


def test_resume_with_another_filter_is_refused_in_one_line(run, folder, solo_folder):
    write_finevision(folder)
    source = '{path: x.parquet, filter: "visual_dependency_min >= 3"}'
    assert train(run, folder, solo_folder, source, "checkpoint.save_interval=1")[0] == 0
    (folder / "run/model").rename(folder / "moved")
    code, _, error = train(
        run, folder, solo_folder, source.replace(">= 3", ">= 2"), "checkpoint.save_interval=1"
    )
    assert code == 2
    (line,) = [line for line in error.splitlines() if line.startswith("solo: ")]
    assert "data.sources[0].filter was visual_dependency_min >= 3, now visual_dependency_min >= 2" in line


def test_commands_about_data_read_it_as_training_does(run_data, folder, solo_folder):
    write_finevision(folder)
    source = {"path": "x.parquet", "filter": "visual_dependency_min >= 3"}
    settings = {"model": str(solo_folder), "data": {"sequence_length": 128, "sources": [source]}}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(settings))
    for arguments in (("stats", "--exact"), ("stats",), ("verify",)):
        code, out, error = run_data(arguments[0], "mixture.yaml", *arguments[1:], "--json")
        assert code == 0, error
        facts = json.loads(out)
        assert facts["sources"][0]["samples"] == 24
        assert facts["sources"][0]["filtered"] == 16
        assert not facts["sources"][0].get("skipped")
        assert not facts["sources"][0].get("rejected")
    assert " filtered" in run_data("stats", "mixture.yaml", "--exact")[1].replace("\n", "")
    assert "16 left out by its filter" in run_data("verify", "mixture.yaml")[1]
    code, out, _ = run_data("view", "mixture.yaml", "--out", "x.html", "--samples", 40, "--json")
    assert json.loads(out)["samples"] == 24
