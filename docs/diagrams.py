"""Show Mermaid diagrams as pictures, so that the site loads no script.

A page keeps the source of a diagram in a `mermaid` fence, which GitHub renders by itself. `make docs-
assets` draws each source once into `docs/assets/diagrams/`, under a digest of the source, and this MkDocs
hook replaces the fence by the picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
FENCE = re.compile(r"^```mermaid\n(.*?)^```$", re.M | re.S)


def find_diagrams() -> Iterator[tuple[str, Path]]:
    """Yield the source of every diagram in the documentation, with the path of its picture."""
    for page in sorted(DOCS.rglob("*.md")):
        for source in FENCE.findall(page.read_text(encoding="utf-8")):
            yield source, picture_path(source)


def picture_path(source: str) -> Path:
    """Return where the picture of a diagram belongs; a changed source gets another path."""
    return DOCS / "assets" / "diagrams" / f"{sha256(source.encode()).hexdigest()[:12]}.svg"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the diagrams of a page by their pictures (called by MkDocs)."""

    def as_picture(fence: re.Match[str]) -> str:
        path = picture_path(fence[1])
        if not path.is_file():
            from mkdocs.exceptions import PluginError

            raise PluginError(f"{page.file.src_uri}: a diagram has no picture; run `make docs-assets`")
        depth = page.file.src_uri.count("/")
        return f"![Diagram]({'../' * depth}{path.relative_to(DOCS).as_posix()})"

    return FENCE.sub(as_picture, markdown)
