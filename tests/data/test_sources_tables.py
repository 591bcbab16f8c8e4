"""CSV and TSV files: what is missing, what is a number, what is a list, compared with pandas' reading."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.data.formats.test_converters import shown
from tests.factories import png

from solo_vlm.data.formats.row_filter import RowFilter
from solo_vlm.data.sample import FilteredRow
from solo_vlm.data.sources import open_source
from solo_vlm.data.sources.files import DataFile
from solo_vlm.data.sources.tables import CsvSource
from solo_vlm.utils.errors import SoloError

PANDAS_WORDS = ("NA", "N/A", "NaN", "nan", "null", "NULL", "None", "n/a", "<NA>", "#N/A")


def rows_of(path) -> list[dict[str, Any]]:
    return [*CsvSource("x", [DataFile(str(path), path.stat().st_size)]).read(0)]


def write(path, *lines: str):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_columns_keep_what_they_are_written_as(tmp_path):
    """Numbers only where nothing is lost: an answer of 007, 1.50 or True stays."""
    columns = {
        "int": ("7", "-12", ""),
        "zeros": ("007", "8", "9"),
        "float": ("0.5", "3.0", "1e+20"),
        "price": ("1.50", "2.25", "3.0"),
        "date": ("2026-01-01", "2026-01-02", "2026-01-03"),
        "flag": ("true", "TRUE", "1"),
        "missing": ("NA", "3", "null"),
        "nan": ("1.5", "nan", "inf"),
        "large": ("9223372036854775808", "1", "2"),
        "text": ("a", '""', "None"),
        "empty": ("", "", ""),
    }
    lines = [",".join(columns), *(",".join(row) for row in zip(*columns.values(), strict=True))]
    read = rows_of(write(tmp_path / "x.csv", *lines))
    typed = {
        "int": [7, -12, None],
        "float": [0.5, 3.0, 1e20],
        "text": ["a", None, "None"],
        "empty": [None] * 3,
    }
    for name, written in columns.items():
        assert [row[name] for row in read] == typed.get(name, [*written]), name


def test_pandas_takes_words_for_missing_that_are_text_here(tmp_path):
    """An option may be called None, and a country NA; only an empty cell is missing in both."""
    path = write(tmp_path / "x.csv", "text", *PANDAS_WORDS, '""', "A cat.")
    texts = [row["text"] for row in rows_of(path)]
    assert texts == [*PANDAS_WORDS, None, "A cat."]
    assert pd.read_csv(path)["text"].isna().tolist() == [True] * len(PANDAS_WORDS) + [True, False]
    kept = pd.read_csv(path, keep_default_na=False, na_values=[""])["text"]
    assert [None if pd.isna(text) else text for text in kept] == texts


def test_filters_take_words_for_missing_numbers_as_pandas_does(tmp_path):
    cells = [*PANDAS_WORDS, "0", "0.25", "-3", "7", "1e3", ""]
    path = write(tmp_path / "x.csv", "n,score", *(f"{n},{cell}" for n, cell in enumerate(cells)))
    table = pd.read_csv(path)
    for expression in ("score > 0.2", "score <= 0.25", "not score > 0.2", "score != 7", "score in (0, 7)"):
        kept = [row["n"] for row in rows_of(path) if RowFilter(expression)(row)]
        asked = expression.removeprefix("not ").replace("(0, 7)", "[0, 7]")
        expected = table.eval(asked)
        if expression.startswith("not "):
            expected = ~expected
        # pandas' NaN differs from everything; here, as in SQL, nothing is known of it.
        expected &= table["score"].notna()
        assert kept == table["n"][expected].tolist(), expression


cells = st.text(st.sampled_from("ab,;\t\"'\n 0159.-+eäß🙂#\\"), max_size=6)
tables = st.integers(1, 3).flatmap(
    lambda columns: st.lists(st.lists(cells, min_size=columns, max_size=columns), min_size=1, max_size=5)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(table=tables, separator=st.sampled_from([",", "\t"]))
def test_any_table_that_pandas_wrote_keeps_its_cells(tmp_path, table, separator):
    """Numbers, too: whatever a column was read as, each value is written as the cell was."""
    path = tmp_path / ("x.tsv" if separator == "\t" else "x.csv")
    frame = pd.DataFrame(table, columns=[f"column {n}" for n in range(len(table[0]))])
    frame.to_csv(path, sep=separator, index=False)
    read = [["" if value is None else str(value) for value in row.values()] for row in rows_of(path)]
    assert read == table


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_texts_are_those_that_pandas_wrote(tmp_path, kind):
    texts = [
        "a, b",
        "two\nlines",
        'say "hi"',
        "tab\there",
        "ä 🙂",
        " space ",
        "'quoted'",
        "\\n",
        "#",
        "x\r\ny",
    ]
    path = tmp_path / f"x.{kind}"
    pd.DataFrame({"n": range(len(texts)), "text": texts}).to_csv(
        path, sep={"csv": ",", "tsv": "\t"}[kind], index=False
    )
    assert [row["text"] for row in rows_of(path)] == texts
    marked = tmp_path / f"bom.{kind}"
    marked.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert rows_of(marked) == rows_of(path)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (json.dumps(["a.png", "it's"]), ["a.png", "it's"]),
        (str(["a.png", "it's", 'say "x"']), ["a.png", "it's", 'say "x"']),
        (str(np.array(["a.png", "b.png"])), ["a.png", "b.png"]),  # Python would read 'a.pngb.png'
        (str(np.array(["a" * 50, "b" * 50])), ["a" * 50, "b" * 50]),  # on two lines
        (str([{"from": "human", "value": "it's"}]), [{"from": "human", "value": "it's"}]),
        ("[]", []),
        ("[12, 34, 56, 78]", None),  # a box
        ("[[1, 2], [3, 4]]", None),
        ("['a' ... 'z']", None),
        ("[a] or [b]", None),
        ('[{"a": 1, "a": 2}]', None),
        ("[" * 5000 + "]" * 5000, None),
    ],
)
def test_lists_of_texts_and_objects_are_read_from_cells(tmp_path, written, read):
    path = tmp_path / "x.csv"
    pd.DataFrame({"cell": [written]}).to_csv(path, index=False)
    assert rows_of(path)[0]["cell"] == (written if read is None else read)


def test_chats_and_several_images_are_read_from_a_table(tmp_path, picture):
    (tmp_path / "a.png").write_bytes(png(picture()))
    turns = [{"from": "human", "value": "<image><image>Which?"}, {"from": "gpt", "value": "Both."}]
    table = pd.DataFrame({"image": [["a.png", "a.png"]], "conversations": [turns]})
    table.to_csv(tmp_path / "x.csv", index=False)
    (row,) = open_source(tmp_path / "x.csv", format="auto").read(0)
    image = f"<{tmp_path}/a.png>"
    assert shown(row) == f"u:{image}{image}Which?|a:Both."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'image,text\na.png,"A cat.\nb.png,A dog.\n', "unexpected end of data"),
        (b'image,text\na.png,"A cat.\nb.png,"A dog."\n', "',' expected after '\"'"),
        (b"image,text\na.png\n", "line 2 has 1 cells, and the header 2"),
        (b"image,text\na.png,A cat, asleep\n", "line 2 has 3 cells, and the header 2"),
        (b"image,text,text\na.png,A,B\n", "two columns have the same name"),
        ("image,text\na.png,Käse\n".encode("latin-1"), "can't decode byte 0xe4"),
        ("image,text\na.png,A\n".encode("utf-16"), "can't decode byte 0xff"),
        (b"", "it is empty"),
        (b"image;text\na.png;A\n", "its only column is 'image;text': cells are separated by ','"),
        (b"index,image\n1,%b\n1,%b\n2,1\n" % (b"i" * 80, b"j" * 80), "which rows [0, 1] have"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(SoloError) as error:
        open_source(tmp_path / "x.csv", format="auto")
    assert str(error.value).startswith(f"{tmp_path}/x.csv is not a readable table: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_tables_are_read(tmp_path, picture):
    (tmp_path / "cat.png").write_bytes(png(picture()))
    write(tmp_path / "x.tsv", "picture\ttitle\tstars", "cat.png\tA cat.\t4", "cat.png\tA dog.\t2")
    options: dict[str, Any] = {"columns": {"image": "picture", "text": "title"}, "filter": "stars >= 3"}
    rows = open_source(tmp_path / "x.tsv", format="auto", **options).read(0)
    assert shown(rows[0]) == f"a:<{tmp_path}/cat.png>A cat."
    with pytest.raises(FilteredRow):
        rows[1]
