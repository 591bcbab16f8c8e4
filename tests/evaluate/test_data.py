"""Benchmarks from local files in every layout, against the rows that they were written from."""

from __future__ import annotations

import base64
import csv
import io
import json
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.evaluate.benchmark_rows import ANIMALS, USUAL, correct_response, make_rows

from solo_vlm.evaluate import data
from solo_vlm.evaluate.benchmarks import BENCHMARKS, get
from solo_vlm.evaluate.data import find_benchmark, load_benchmark
from solo_vlm.evaluate.predictions import Prediction, without_images
from solo_vlm.utils.errors import SoloError

COLORS = ("red", "green", "blue")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def png(picture):
    buffer = io.BytesIO()
    picture(32, 32).save(buffer, "png")
    return buffer.getvalue()


def hub_rows(task, png):
    return make_rows(task, image={"bytes": png, "path": "1.png"})


def write_tsv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def first_image(data, task):
    image = data[0][{"mathvista": "decoded_image", "mmmu_val": "image_1"}.get(task, "image")]
    return image[0] if isinstance(image, list) else image


def oracle_score(task, data):
    plain = data.with_format(None)
    answered = [
        Prediction(str(n), correct_response(task, row), without_images(row)) for n, row in enumerate(plain)
    ]
    return get(task).score(answered)


@pytest.mark.parametrize("task", BENCHMARKS)
def test_hub_parquet_files(task, png, tmp_path):
    rows = hub_rows(task, png)
    table = pa.Table.from_pylist(rows)
    folder = tmp_path / task / get(task).hub_files.rpartition("/")[0]
    folder.mkdir(parents=True)
    pq.write_table(table, folder / f"{get(task).split}-00000-of-00001.parquet")
    pq.write_table(table.slice(0, 1), folder / "train-00000-of-00001.parquet")
    data = load_benchmark(get(task), tmp_path)
    assert len(data) == len(rows)
    assert first_image(data, task).size == (32, 32)
    assert oracle_score(task, data).score == get(task).maximum


def test_arrow_saved_by_datasets(png, tmp_path):
    rows = hub_rows("ai2d", png)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "ai2d")
    data = load_benchmark(get("ai2d"), tmp_path)
    assert data["question"] == [row["question"] for row in rows]


def test_jsonl_with_image_paths(png, tmp_path):
    (tmp_path / "mme" / "images").mkdir(parents=True)
    (tmp_path / "mme" / "images" / "1.png").write_bytes(png)
    rows = make_rows("mme", image="images/1.png")
    (tmp_path / "mme" / "mme.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_benchmark(get("mme"), tmp_path)
    assert first_image(data, "mme").size == (32, 32)
    assert oracle_score("mme", data).score == 2800


def vlmevalkit_rows(task, png):
    """Return the rows with VLMEvalKit's columns; every second image is the index of the previous row."""
    rows = []
    for index, row in enumerate(make_rows(task)):
        letters = dict(zip("ABCD", ("dog", "cat", "bird", "fish"), strict=True))
        image = base64.b64encode(png).decode() if index % 2 == 0 else str(index - 1)
        common = {"index": index, "image": image, "question": row["question"]}
        if task == "mme":
            path = row["question_id"].split("/")[1]
            rows.append({**common, "answer": row["answer"], "category": row["category"], "image_path": path})
        elif task == "mathvista":
            columns = ("question_type", "answer_type", "precision", "unit", "answer", "choices")
            copied = {name: "" if row[name] is None else row[name] for name in columns}
            rows.append({**common, **copied, **{name: row["metadata"][name] for name in ("task", "skills")}})
        elif task == "seedbench":
            names = ("Scene Understanding", "Instance Identity", "Instance Location", "Instance Attributes")
            rows.append({**common, **letters, "answer": row["answer"], "category": names[index % 4]})
        elif task == "mmstar":
            question = row["question"].split("\n")[0]
            kept = {name: row[name] for name in ("answer", "category", "l2_category")}
            rows.append({**common, **letters, "question": question, **kept})
        else:
            count = len(row.get("choices") or row["options"])
            shown = {letter: text if n < count else "" for n, (letter, text) in enumerate(letters.items())}
            rows.append({**common, **shown, "answer": "ABCD"[int(row["answer"])]})
    return rows


@pytest.mark.parametrize("task", [task for task in BENCHMARKS if task not in USUAL])
def test_vlmevalkit_tsv_is_converted_to_the_hub_schema(task, png, tmp_path):
    rows = vlmevalkit_rows(task, png)
    write_tsv(tmp_path / task / "Some_Name.tsv", rows)
    data = load_benchmark(get(task), tmp_path)
    wanted = make_rows(task)
    answers = [correct_response(task, row) for row in wanted]
    assert [correct_response(task, row) for row in data] == answers
    assert oracle_score(task, data).score == get(task).maximum
    assert first_image(data.select([1]), task).size == (32, 32)
    schema_wide = {"mmstar": "category", "mme": "question_id", "ai2d": "options", "scienceqa": "choices"}
    if task in schema_wide:
        column = schema_wide[task]
        assert data[column] == [row[column] for row in wanted]
    if task == "mmstar":
        assert data["question"] == [row["question"] for row in wanted]


def test_changed_file_is_read_again(png, tmp_path):
    rows = vlmevalkit_rows("ai2d", png)
    write_tsv(tmp_path / "ai2d" / "AI2D_TEST.tsv", rows)
    assert len(load_benchmark(get("ai2d"), tmp_path)) == len(rows)
    write_tsv(tmp_path / "ai2d" / "AI2D_TEST.tsv", rows[:2])
    assert len(load_benchmark(get("ai2d"), tmp_path)) == 2


def test_missing_benchmark_error_has_the_download_command(tmp_path):
    (tmp_path / "scienceqa" / ".cache").mkdir(parents=True)
    (tmp_path / "scienceqa" / ".cache" / "test.parquet").touch()
    (tmp_path / "scienceqa" / "train-00000.parquet").touch()
    with pytest.raises(SoloError) as error:
        find_benchmark(get("scienceqa"), tmp_path)
    assert (
        f"hf download lmms-lab-encoder/ScienceQA --repo-type dataset --include 'ScienceQA-IMG/test-*' "
        f"--local-dir {tmp_path / 'scienceqa'}"
    ) in str(error.value)


def test_offline_error_has_the_download_command():
    with pytest.raises(SoloError, match=r"hf download lmms-lab-encoder/MME .* and pass --data-root"):
        load_benchmark(get("mme"), None)


def test_split_and_format_selection(tmp_path):
    for name in (
        "ScienceQA-FULL/test-0.parquet",
        "ScienceQA-IMG/test-0.parquet",
        "ScienceQA-IMG/train-0.parquet",
    ):
        (tmp_path / "scienceqa" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "scienceqa" / name).touch()
    kind, files = find_benchmark(get("scienceqa"), tmp_path)
    assert (kind, [file.parent.name for file in files]) == ("parquet", ["ScienceQA-IMG"])
    (tmp_path / "mathvista").mkdir()
    for name in ("testmini-0.parquet", "test-0.parquet", "x.tsv"):
        (tmp_path / "mathvista" / name).touch()
    kind, files = find_benchmark(get("mathvista"), tmp_path)
    assert (kind, [file.name for file in files]) == ("parquet", ["testmini-0.parquet"])


def test_unreadable_file_is_named(tmp_path):
    (tmp_path / "mme").mkdir()
    (tmp_path / "mme" / "test-0.parquet").write_text("no parquet")
    with pytest.raises(SoloError, match=r"cannot read .*test-0.parquet"):
        load_benchmark(get("mme"), tmp_path)
    (tmp_path / "mme" / "test-0.parquet").unlink()
    write_tsv(
        tmp_path / "mme" / "MME.tsv",
        [{"index": 0, "image": "nowhere.png", "category": "OCR", "image_path": "1"}],
    )
    with pytest.raises(SoloError, match=r"nowhere\.png"):
        load_benchmark(get("mme"), tmp_path)


WITH_GAP = ("Two", "One", None, "Three")
CHOICE_TASKS = ("mmstar", "seedbench", "ai2d", "ai2d_no_mask", "scienceqa", "scienceqa_full", "mathvista")


def rows_with_gap(task, png, empty):
    """Return a row in the hub's schema: the third option is empty, the fourth is correct."""
    row = next(row for row in hub_rows(task, png) if task != "mathvista" or row["choices"])
    texts = [empty if text is None else text for text in WITH_GAP]
    if task == "mmstar":
        return [{**row, "question": "How many?\nOptions: A: Two, B: One, C: , D: Three", "answer": "D"}]
    if task == "seedbench":
        lettered = {f"choice_{letter}": text for letter, text in zip("abcd", texts, strict=True)}
        return [{**row, **lettered, "answer": "D"}]
    if task == "mathvista":
        return [{**row, "choices": texts, "answer": "Three"}]
    column = "choices" if task.startswith("scienceqa") else "options"
    return [{**row, column: texts, "answer": 3 if column == "choices" else "3"}]


def prompt_and_score(task, folder):
    """Return the prompt of the only row and the score of the answer D."""
    from solo_vlm.evaluate.data import Rows
    from solo_vlm.evaluate.stock_tasks import LocalTask

    rows = Rows.of(get(task), load_benchmark(get(task), folder))
    score = get(task).score([Prediction(rows.ids[0], "D", rows.columns[0])])
    assert rows.images(0)[0].size == (32, 32)
    return LocalTask(get(task), rows.encoded).prompt(0), score


def assert_letters_are_kept(prompt, score):
    assert (score.score, score.bad_rows, score.unreadable) == (100, (), 0)
    pattern = r"\(?A[.:)] Two[,\s]+\(?B[.:)] One[,\s]+\(?C[.:)][,\s]+\(?D[.:)] Three"
    assert re.search(pattern, prompt), prompt


@pytest.mark.parametrize("empty", [None, ""])
@pytest.mark.parametrize("task", CHOICE_TASKS)
def test_empty_option_in_parquet_keeps_later_letters(task, empty, png, tmp_path):
    (tmp_path / task).mkdir()
    pq.write_table(pa.Table.from_pylist(rows_with_gap(task, png, empty)), tmp_path / task / "x.parquet")
    assert_letters_are_kept(*prompt_and_score(task, tmp_path))


@pytest.mark.parametrize("empty", [None, "", float("nan")])
@pytest.mark.parametrize("task", CHOICE_TASKS)
def test_empty_option_in_jsonl_keeps_later_letters(task, empty, png, tmp_path):
    (tmp_path / task).mkdir()
    (tmp_path / task / "1.png").write_bytes(png)
    (row,) = rows_with_gap(task, png, empty)
    image = "decoded_image" if task == "mathvista" else "image"
    row[image] = ["1.png"] if task == "seedbench" else "1.png"
    (tmp_path / task / "x.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8-sig")
    assert_letters_are_kept(*prompt_and_score(task, tmp_path))


@pytest.mark.parametrize("task", CHOICE_TASKS)
def test_empty_option_in_vlmevalkit_tsv_keeps_later_letters(task, png, tmp_path):
    letters = dict(zip("ABCD", WITH_GAP, strict=True))
    row = {"index": 391, "image": base64.b64encode(png).decode(), "question": "How many?", "answer": "D"}
    if task == "mathvista":
        kinds = {"question_type": "multi_choice", "answer_type": "text", "precision": "", "answer": "Three"}
        row |= {**kinds, "choices": "['Two' 'One' None\n 'Three']", "task": "t", "skills": "['a' 'b']"}
    else:
        row |= {**letters, "category": "Scene Understanding", "l2_category": "localization"}
    path = tmp_path / task / "x.tsv"
    write_tsv(path, [row])
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert_letters_are_kept(*prompt_and_score(task, tmp_path))


@pytest.mark.parametrize("task", [task for task in CHOICE_TASKS if task != "mathvista"])
@pytest.mark.parametrize("encoded", [False, True], ids=["images", "base64"])
def test_vlmevalkit_columns_in_parquet(task, encoded, png, tmp_path):
    image = base64.b64encode(png).decode() if encoded else {"bytes": png, "path": None}
    row = {
        "index": 391,
        "image": image,
        "question": "How many?",
        "answer": "D",
        "l2_category": "localization",
    }
    row |= {**dict(zip("ABCD", WITH_GAP, strict=True)), "category": "Scene Understanding"}
    (tmp_path / task).mkdir()
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / task / "x.parquet")
    assert_letters_are_kept(*prompt_and_score(task, tmp_path))


def test_new_cache_version_converts_again(png, tmp_path, monkeypatch):
    """The cache of `datasets` identifies the file, not its conversion."""
    write_tsv(tmp_path / "ai2d" / "x.tsv", vlmevalkit_rows("ai2d", png))
    with monkeypatch.context() as older:
        older.setattr(data, "hub_row", lambda task, row: {**row, "options": ["old"]})
        older.setattr(data, "_CACHE_VERSION", data._CACHE_VERSION - 1)
        assert load_benchmark(get("ai2d"), tmp_path)[0]["options"] == ["old"]
    assert load_benchmark(get("ai2d"), tmp_path)[0]["options"] == list(ANIMALS)


def test_jsonl_image_as_data_url(png, tmp_path):
    url = "data:;base64," + base64.encodebytes(png).decode()
    (tmp_path / "mme").mkdir()
    (tmp_path / "mme" / "x.jsonl").write_text(json.dumps(make_rows("mme", image=url)[0]) + "\n")
    assert first_image(load_benchmark(get("mme"), tmp_path), "mme").size == (32, 32)


@pytest.mark.parametrize("task", ["ai2d", "scienceqa"])
@pytest.mark.parametrize("options", ["['Two', 'One', '', 'Three']", "['Two' 'One' nan 'Three']"])
@pytest.mark.parametrize("answer", ["3", "D", "Three"])
def test_hub_columns_as_text_in_tsv(task, options, answer, png, tmp_path):
    column = "choices" if task == "scienceqa" else "options"
    image = base64.b64encode(png).decode()
    row = {"question": "How many?", column: options, "answer": answer, "hint": "", "image": image}
    write_tsv(tmp_path / task / "x.tsv", [row])
    assert_letters_are_kept(*prompt_and_score(task, tmp_path))


@pytest.mark.parametrize("answer", ["", "AB", "E", "A, B"])
def test_reference_that_is_not_exactly_one_option_is_rejected(answer, png, tmp_path):
    rows = vlmevalkit_rows("ai2d", png)
    rows[2]["answer"] = answer
    write_tsv(tmp_path / "ai2d" / "AI2D_TEST.tsv", rows)
    with pytest.raises(SoloError, match=rf"row 2: the answer '{answer}' is none of its options"):
        load_benchmark(get("ai2d"), tmp_path)


def test_duplicate_question_is_rejected(png, tmp_path):
    from solo_vlm.evaluate.data import Rows

    write_tsv(tmp_path / "mmstar" / "MMStar.tsv", vlmevalkit_rows("mmstar", png))
    write_tsv(tmp_path / "mmstar" / "MMStar (copy).tsv", vlmevalkit_rows("mmstar", png)[:3])
    with pytest.raises(SoloError, match="mmstar: rows 1 and 4 have the same index, 0"):
        Rows.of(get("mmstar"), load_benchmark(get("mmstar"), tmp_path))
