"""Pages in one file: templates of the package, and images as data URLs."""

from __future__ import annotations

import base64
from importlib.resources import files
from io import BytesIO
from typing import Any

from jinja2 import Environment
from PIL import Image


def render(package: str, template: str, **values: Any) -> str:
    """A page from a Jinja template that lies in a package; values of an HTML page are escaped."""
    source = files(package).joinpath(template).read_text()
    environment = Environment(autoescape=".html" in template, trim_blocks=".md" in template)
    return environment.from_string(source).render(**values)


def image_url(image: Image.Image) -> str:
    """An image as a PNG in a data URL."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return png_url(buffer.getvalue())


def thumbnail_url(image: Image.Image, side: int = 256) -> str:
    """An image, made smaller where it is larger than `side`, as a JPEG in a data URL."""
    small, buffer = image.copy(), BytesIO()
    small.thumbnail((side, side))
    small.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def png_url(png: bytes) -> str:
    """The bytes of a PNG as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
