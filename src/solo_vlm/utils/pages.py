"""Self-contained HTML pages and Markdown, rendered from Jinja templates, with inlined images and figures."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image

from solo_vlm.utils.files import new_file

_DPI = 120


def render(package: str, template: str, **values: Any) -> str:
    """Render a Jinja template of a package.

    HTML templates extend `base.html.jinja`, next to this module, and have their values escaped.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, ""), PackageLoader("solo_vlm.utils", "")]),
        autoescape=".html" in template,
        trim_blocks=".md" in template,
        undefined=StrictUndefined,
    )
    return environment.get_template(template).render(**values)


def save_figure(figure: Any, path: Path) -> None:
    """Save a matplotlib figure as a PNG file."""
    with new_file(path) as partial:
        figure.savefig(partial, dpi=_DPI, format="png")


def figure_url(figure: Any) -> str:
    """Return a matplotlib figure as a PNG in a data URL."""
    buffer = BytesIO()
    figure.savefig(buffer, dpi=_DPI, format="png")
    return png_url(buffer.getvalue())


def image_url(image: Image.Image) -> str:
    """Return an image as a PNG in a data URL."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return png_url(buffer.getvalue())


def thumbnail(image: Image.Image, side: int = 256) -> Image.Image:
    """Return a copy of an image, scaled down to at most `side` pixels per edge."""
    small = image.copy()
    small.thumbnail((side, side))
    return small


def thumbnail_url(image: Image.Image, side: int = 256) -> str:
    """Return an image as a JPEG in a data URL, scaled down to at most `side` pixels per edge."""
    buffer = BytesIO()
    thumbnail(image, side).save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def png_url(png: bytes) -> str:
    """Return the bytes of a PNG as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
