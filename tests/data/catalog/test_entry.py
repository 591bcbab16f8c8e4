"""Catalog: counts against the paper's totals, and the documentation page."""

from __future__ import annotations

import pytest
from tests.factories import ROOT

from solo_vlm.data.catalog.entry import DATA_SETS, markdown_table

PAGE = ROOT / "docs" / "catalog.md"


@pytest.mark.parametrize(
    ("stage", "tokens", "text_tokens", "vision_tokens", "instances"),
    [
        (1, 6_764_080_695, 4_553_623_160, 2_210_457_535, 195_122),
        (2, 14_846_598_913, 6_814_674_150, 8_031_924_763, 445_565),
        (3, 1_279_664_194, 797_032_867, 482_631_327, 38_324),
    ],
)
def test_stages_sum_to_the_papers_totals(stage, tokens, text_tokens, vision_tokens, instances):
    counts = [count for entry in DATA_SETS.values() for count in entry.stages if count.stage == stage]
    assert sum(count.tokens for count in counts) == tokens
    assert sum(count.text_tokens for count in counts) == text_tokens
    assert sum(count.vision_tokens for count in counts) == vision_tokens
    assert sum(count.instances for count in counts) == instances


def test_every_entry_is_complete():
    for entry in DATA_SETS.values():
        assert bool(entry.stages) != bool(entry.group)
        for fact in (entry.title, entry.source, entry.license, entry.raw_schema, entry.evidence, entry.files):
            assert fact, entry.name
    assert sum(bool(entry.samples) for entry in DATA_SETS.values()) == 32


def test_documentation_shows_the_catalog():
    assert markdown_table(DATA_SETS.values()) in PAGE.read_text(encoding="utf-8"), (
        "docs/catalog.md is out of date: paste the output of `solo data list --markdown`"
    )
