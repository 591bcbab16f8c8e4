"""Tests that the table of LLM families agrees with tiny models of the installed transformers."""

from __future__ import annotations

from datetime import date

import pytest
import transformers
from docs.make_models import PAGE, family_row, make_page, read_rows

from solo_vlm.check.tiny import text_families

TEXT = PAGE.read_text(encoding="utf-8")

pytestmark = pytest.mark.skipif(
    f"transformers {transformers.__version__} " not in TEXT, reason="the table is of another transformers"
)


def third_of_today(families: list[str]) -> list[object]:
    """Mark two thirds of the families as slow: the fast tests try all within three days."""
    today = date.today().toordinal()
    return [
        pytest.param(family, marks=[pytest.mark.slow] if (number + today) % 3 else [])
        for number, family in enumerate(families)
    ]


@pytest.mark.parametrize("family", third_of_today(text_families()))
def test_row_is_what_a_tiny_model_shows(family):
    assert family_row(family) == read_rows(TEXT)[family]


def test_every_family_is_listed():
    rows = read_rows(TEXT)
    assert list(rows) == text_families()
    assert make_page(rows) in TEXT
