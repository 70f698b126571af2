"""The page: one HTML file with everything in it, that asks nothing of any server.

`html` has the page and its blocks, the macros of `page.html`. Names and paths come from runs, which others may have
written: every text is escaped.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.environment import TemplateModule
from markupsafe import Markup

JPEG_QUALITY = 85
PALETTE = 255  # colours of an embedded drawing


class Part(NamedTuple):
    """A chapter of the page."""

    anchor: str
    title: str
    blocks: list[Markup]


def embedded(png: bytes, is_photo: bool) -> str:
    """A picture as the page holds it: a photo as JPEG, a drawing with few colours."""
    from PIL import Image

    kind, data, image = "jpeg" if is_photo else "png", io.BytesIO(), Image.open(io.BytesIO(png)).convert("RGB")
    if is_photo:
        image.save(data, "JPEG", quality=JPEG_QUALITY, optimize=True)
    else:
        image.quantize(PALETTE).save(data, "PNG", optimize=True)
    shown = data.getvalue() if is_photo else min(data.getvalue(), png, key=len)
    return f"data:image/{kind};base64,{base64.b64encode(shown).decode()}"


def _open_template() -> TemplateModule:
    here = Path(__file__).parent
    templates = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["embedded"] = embedded
    templates.globals |= {
        "style": Markup((here / "page.css").read_text()),
        "script": Markup((here / "page.js").read_text()),
    }
    return templates.get_template("page.html").module


html = _open_template()
