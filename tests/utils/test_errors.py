"""Tests of `utils.errors`."""

from __future__ import annotations

import pytest

from solo_vlm.utils.errors import did_you_mean, first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one\n"), "one"),
        (ValueError("one of:\n\n  (1) two\nthree"), "one of: (1) two"),
        (ValueError("nothing:\n"), "nothing:"),
        (KeyError("model_type"), "missing 'model_type'"),
        (NotImplementedError(), "NotImplementedError"),
        (OSError(2, "No such file"), "[Errno 2] No such file"),
    ],
)
def test_first_line_of_any_exception(error, line):
    assert first_line(error) == line


def test_close_names_are_suggested():
    assert did_you_mean("captons", ["captions", "qa"]) == "; did you mean captions?"
    assert did_you_mean("zebra", ["captions", "qa"]) == ""
