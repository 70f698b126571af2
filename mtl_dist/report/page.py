"""The page: one HTML file with everything in it, that asks nothing of any server.

Names and paths come from runs, which others may have written: every text is escaped.
"""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import NamedTuple

from mtl_dist.report.drawing import Figure
from mtl_dist.report.mistakes import Mistake, Mistakes
from mtl_dist.report.tables import Cell, Table

JPEG_QUALITY = 85
PALETTE = 255  # colours of an embedded drawing
# Should anything in the page ever ask a server, the browser refuses.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"


class Part(NamedTuple):
    """A chapter of the page."""

    anchor: str
    title: str
    blocks: list[str]  # HTML


def render_page(*, title: str, lead: list[str], parts: list[Part], footer: list[str]) -> bytes:
    """Write the page; `lead` and `footer` are paragraphs of plain text."""
    here = Path(__file__)
    style, script = (here.with_name(name).read_text() for name in ("page.css", "page.js"))
    links = "".join(f'<li><a href="#{part.anchor}">{escape(part.title)}</a></li>' for part in parts)
    chapters = "\n".join(
        f'<section id="{part.anchor}" aria-labelledby="{part.anchor}-title">\n'
        f'<h2 id="{part.anchor}-title">{escape(part.title)}</h2>\n' + "\n".join(part.blocks) + "\n</section>"
        for part in parts
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{"".join(paragraph(line, kind="lead") for line in lead)}
</header>
<nav aria-label="Chapters"><ul>{links}</ul></nav>
<main>
{chapters}
</main>
<footer>
{"".join(paragraph(line) for line in footer)}
</footer>
<script>
{script}</script>
</body>
</html>
""".encode()


def paragraph(text: str, *, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>\n' if kind else f"<p>{escape(text)}</p>\n"


def heading(text: str) -> str:
    """A heading within a chapter."""
    return f"<h3>{escape(text)}</h3>"


def grid(blocks: list[str]) -> str:
    """Blocks beside each other where there is room."""
    return f'<div class="grid">{"".join(blocks)}</div>'


def folded(summary: str, *blocks: str) -> str:
    """Blocks that open on a click."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(blocks)}</details>"


def preformatted(text: str) -> str:
    """A text as it is, in a fixed width."""
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def definitions(pairs: list[tuple[str, str]]) -> str:
    """Names and what they are."""
    return "<dl>" + "".join(f"<dt>{escape(n)}</dt><dd><code>{escape(t)}</code></dd>" for n, t in pairs) + "</dl>"


def table_block(table: Table, *, sortable: bool = True) -> str:
    """A table in a container of its own that scrolls where it is wider than the screen."""
    numeric = [any(row[place].is_number for row in table.rows) for place in range(len(table.columns))]
    head = "".join(
        f'<th scope="col"{" class=n" if is_number else ""}{" data-lower" if name in table.lower else ""}>'
        f"{escape(name)}{' ↓' if name in table.lower else ''}</th>"
        for name, is_number in zip(table.columns, numeric)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(row[0].text)}</th>{"".join(map(_cell, row[1:]))}</tr>\n' for row in table.rows
    )
    lower = "↓: lower is better." if table.lower else ""
    note = " ".join(filter(None, (table.note, lower)))
    note = f"<small>{escape(note)}</small>" if note else ""
    kind = ' class="sortable"' if sortable and len(table.rows) > 1 else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}"><table{kind}>'
        f"<caption><span>{escape(table.caption)}{note}</span></caption>"
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    kinds = " ".join(
        kind for kind, holds in (("n", cell.is_number), ("best", cell.is_best), ("apart", cell.is_apart)) if holds
    )
    sort = "" if cell.sort is None else f' data-sort="{cell.sort:.9g}"'
    shown = escape(cell.text) + (f"<small>{escape(cell.below)}</small>" if cell.below else "")
    if cell.is_number:
        shown = shown.replace("-", "\N{MINUS SIGN}")
    kind = f' class="{kinds}"' if kinds else ""
    return f"<td{kind}{sort}>{shown}</td>"


def figure_block(figure: Figure, *, level: int = 3) -> str:
    """A figure with its heading, of a level below those around it, its caption and links to its files."""
    image = f'<img src="{_embedded(figure)}" alt="{escape(figure.alt)}">'
    kind = "photo wide" if figure.is_photo else "wide" if figure.is_wide else "dense" if figure.is_dense else ""
    if kind:
        image = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(figure.title)}">{image}</div>'
        kind = f' class="{kind}"'
    return (
        f"<figure{kind}><h{level}>{escape(figure.title)}</h{level}>{image}<figcaption>{escape(figure.caption)} "
        f'<a href="figures/{figure.name}.png">PNG</a>, <a href="figures/{figure.name}.csv">CSV</a>'
        "</figcaption></figure>"
    )


def mistakes_block(mistakes: Mistakes) -> str:
    """The worst frames of a task as cards."""
    if not mistakes.worst:
        return heading(mistakes.title) + paragraph("None.")
    cards = "".join(f"<li>{_card(mistake)}</li>" for mistake in mistakes.worst)
    return (
        f'{heading(mistakes.title)}<ul class="cards">{cards}</ul>'
        f'<p class="soft"><a href="figures/errors_{mistakes.task}.csv">CSV</a></p>'
    )


def _card(mistake: Mistake) -> str:
    lines = "<br>".join(map(escape, mistake.lines))
    source = _data_uri(_as_jpeg(mistake.png), "jpeg")
    return (
        f'<figure><img src="{source}" alt="{escape(mistake.alt)}" width="128" height="128">'
        f"<figcaption>{lines}<br><small>{escape(mistake.image)}</small></figcaption></figure>"
    )


def _embedded(figure: Figure) -> str:
    if figure.is_photo:
        return _data_uri(_as_jpeg(figure.png), "jpeg")
    from PIL import Image

    data = io.BytesIO()
    Image.open(io.BytesIO(figure.png)).convert("RGB").quantize(PALETTE).save(data, "PNG", optimize=True)
    return _data_uri(min(data.getvalue(), figure.png, key=len), "png")


def _as_jpeg(png: bytes) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(data, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return data.getvalue()


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
