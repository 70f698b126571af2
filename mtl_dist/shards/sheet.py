"""Draw a contact sheet: images of a set with their labels below them, for eyes that check a data set."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mtl_dist.data.cache import Cache
from mtl_dist.data.index import Index, index_dir
from mtl_dist.data.reader import ShardReader
from mtl_dist.tasks import AUS, EXPRESSIONS, Batch

MAX_SHARDS = 8  # that are fetched: rows were shuffled over all shards at writing, so a few show the whole set
NUM_COLUMNS = 8
SIDE = 144  # pixels of an image
GAP = 16
LINE = 17
TEXT_LINES = 4
MARGIN, HEAD = 24, 64
INK, FAINT, PAPER = (32, 34, 38), (150, 153, 160), (255, 255, 255)
MISSING = "-"  # the font has no dash


def draw_sheet(uri: str, index: Index, *, num_images: int, seed: int) -> bytes:
    """Return a PNG of up to `num_images` samples of up to 8 shards, drawn by the seed, in the order of their rows."""
    samples = choose_samples(index.shard_rows, num_images=num_images, seed=seed)
    batch = ShardReader(uri, index, Cache()).read_batch(samples, SIDE)
    rows = batch.rows[:, 0].numpy()
    pixels = batch.inputs[:, 0].permute(0, 2, 3, 1).numpy()
    num_columns = min(NUM_COLUMNS, len(samples))
    num_lines = -(-len(samples) // num_columns)
    cell_width, cell_height = SIDE + GAP, SIDE + TEXT_LINES * LINE + GAP + 4
    # At least as wide as the line on top.
    width = max(2 * MARGIN + num_columns * cell_width - GAP, 640)
    sheet = Image.new("RGB", (width, HEAD + MARGIN + num_lines * cell_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_head(draw, uri, index, len(samples), seed, width)
    for place, sample in enumerate(np.argsort(rows, kind="stable")):
        line, column = divmod(place, num_columns)
        left, top = MARGIN + column * cell_width, HEAD + line * cell_height
        sheet.paste(Image.fromarray(pixels[sample]), (left, top))
        _draw_labels(draw, (left, top + SIDE + 4), batch, int(sample))
    data = io.BytesIO()
    sheet.save(data, "PNG")
    return data.getvalue()


def choose_samples(shard_rows: np.ndarray, *, num_images: int, seed: int) -> np.ndarray:
    """Choose sample numbers (n,), ascending: of 8 shards at most (more only where those hold too few), evenly."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    order = rng.permutation(len(shard_rows))
    enough = int(np.searchsorted(np.cumsum(shard_rows[order]), num_images)) + 1
    shards = order[: max(MAX_SHARDS, enough)]
    starts = np.concatenate([[0], np.cumsum(shard_rows)])
    # Round robin: the first of every shard, then the second of every shard ...
    drawn = [starts[shard] + rng.permutation(shard_rows[shard])[:num_images] for shard in shards]
    turn = np.concatenate([np.arange(len(part)) for part in drawn])
    return np.sort(np.concatenate(drawn)[np.argsort(turn, kind="stable")][:num_images])


def _draw_head(draw: ImageDraw.ImageDraw, uri: str, index: Index, count: int, seed: int, width: int) -> None:
    name = index_dir(uri)
    font = ImageFont.load_default(size=18)
    while len(name) > 20 and draw.textlength(name, font) > width - 2 * MARGIN:
        name = f"...{name[4:]}"
    draw.text((MARGIN, 10), name, INK, font)
    about = f"{index.view}, {index.split}: {count} of {index.rows:,} rows (seed {seed}); {MISSING}: not labelled"
    draw.text((MARGIN, 32), about, FAINT, ImageFont.load_default(size=13))


def _draw_labels(draw: ImageDraw.ImageDraw, place: tuple[int, int], batch: Batch, sample: int) -> None:
    """Valence and arousal; expression and, at the right, the row number; the action units that are on."""
    labels, font = batch.labels, ImageFont.load_default(size=14)
    valence, arousal = (round(value, 2) + 0.0 for value in labels.va[sample, 0].tolist())  # no -0.00
    has_va, has_expr = bool(labels.va_mask[sample, 0]), bool(labels.expr_mask[sample, 0])
    known = labels.au_mask[sample, 0].numpy()
    au_lines = _wrap(draw, _au_words(labels.au[sample, 0].numpy() > 0, known), font)
    lines = [
        (f"V {valence:+.2f}   A {arousal:+.2f}" if has_va else f"V {MISSING}   A {MISSING}", has_va),
        (EXPRESSIONS[int(labels.expr[sample, 0])] if has_expr else f"expression {MISSING}", has_expr),
        *((line, bool(known.any())) for line in au_lines),
    ]
    left, top = place
    for number, (text, is_labelled) in enumerate(lines):
        draw.text((left, top + number * LINE), text, INK if is_labelled else FAINT, font)
    row, small = f"row {int(batch.rows[sample, 0])}", ImageFont.load_default(size=11)
    draw.text((left + SIDE - draw.textlength(row, small), top + LINE + 2), row, FAINT, small)


def _au_words(is_on: np.ndarray, known: np.ndarray) -> list[str]:
    if not known.any():
        return ["AU", MISSING]
    on = [str(number) for number, is_active in zip(AUS, is_on & known) if is_active] or ["none"]
    missing = int((~known).sum())
    return ["AU", *on, *([f"({missing} {MISSING})"] if missing else [])]


def _wrap(draw: ImageDraw.ImageDraw, words: list[str], font: ImageFont.FreeTypeFont) -> list[str]:
    """Join words to lines no wider than an image."""
    lines = [words[0]]
    for word in words[1:]:
        longer = f"{lines[-1]}  {word}"
        if draw.textlength(longer, font) <= SIDE:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
