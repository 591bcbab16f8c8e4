"""Pages rendered from templates."""

from __future__ import annotations

import pytest
from jinja2 import UndefinedError

from solo_vlm.utils.pages import render


def test_missing_template_value_is_an_error(tmp_path, monkeypatch):
    package = tmp_path / "reports"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "page.html.jinja").write_text("<p>{{ score.mean }}</p>")
    monkeypatch.syspath_prepend(tmp_path)
    assert render("reports", "page.html.jinja", score={"mean": "1 < 2"}) == "<p>1 &lt; 2</p>"
    with pytest.raises(UndefinedError, match="mean"):
        render("reports", "page.html.jinja", score={"average": 1})
