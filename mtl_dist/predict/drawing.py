"""Faces drawn into their pictures: boxes, persons, expressions, and where valence and arousal are; and film of that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mtl_dist.errors import InputError

# One a person; told apart by colour-blind eyes too (Okabe and Ito), lightened for dark ground.
COLOURS = ((86, 180, 233), (255, 176, 46), (60, 200, 150), (240, 130, 190), (250, 235, 90), (255, 120, 70),
           (120, 160, 255), (220, 220, 220))  # fmt: skip
PAPER, INK, FAINT = (16, 18, 24, 205), (255, 255, 255), (150, 155, 165)
SMOOTH = 4  # what has round edges is drawn so many times larger
TEXT_SHARE, LEAST_TEXT = 1 / 38, 11  # of a letter's height, by the picture's shorter side

TIME_BASE, UNTOLD_RATE = Fraction(1, 90_000), Fraction(25)
CODECS = ("libx264", "h264", "libopenh264", "mpeg4")  # the first that there is
QUALITY = {"crf": "20", "preset": "veryfast"}


class DrawnFace(NamedTuple):
    """What is drawn of a face."""

    box: Sequence[float]  # left, top, right, bottom
    person: int
    expression: str
    probability: float  # of the expression
    valence: float
    arousal: float


class _Box(NamedTuple):
    left: int
    top: int
    right: int
    bottom: int

    def overlap(self, other: _Box) -> int:
        """Return the pixels that both have."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0, wide) * max(0, high)


def draw_faces(picture: np.ndarray, faces: Sequence[DrawnFace]) -> np.ndarray:
    """Return a (h, w, 3) uint8 picture with its faces marked."""
    image = Image.fromarray(picture)
    size = max(LEAST_TEXT, round(min(image.size) * TEXT_SHARE))
    pen = ImageDraw.Draw(image)
    boxes = [_Box(*(round(edge) for edge in face.box)) for face in faces]
    for face, box in zip(faces, boxes):
        _draw_box(pen, face, box, line=max(3, size // 8 | 1))
    taken: list[_Box] = list(boxes)
    for face, box in zip(faces, boxes):
        labels = [_draw_label(face, size)]
        places = [_find_place(box, labels[0].size, image.size, taken)]
        if places[0].covers:
            labels.append(_draw_label(face, max(LEAST_TEXT, round(0.8 * size)), brief=True))
            places.append(_find_place(box, labels[1].size, image.size, taken))
        label, (_, where) = min(zip(labels, places), key=lambda pair: pair[1].covers)
        taken.append(where)
        image.paste(label, (where.left, where.top), label)
    return np.asarray(image)


def write_film(path: Path, frames: Iterable[tuple[float, np.ndarray]]) -> None:
    """Write (seconds, (h, w, 3) uint8) frames as an MP4, H.264 where that can be encoded, each shown at its time.

    All are as large as the first. Where times are not told, there are 25 frames a second.
    """
    import av

    frames = iter(frames)
    first = list(islice(frames, 2))  # what players are told of the rate
    apart = first[-1][0] - first[0][0]
    rate = Fraction(1 / apart).limit_denominator(1001) if apart > 1e-3 else UNTOLD_RATE
    with av.open(str(path.absolute()), "w", format="mp4") as container:
        height, width = _even(first[0][1]).shape[:2]
        stream = container.add_stream(_codec(), rate=rate, options=QUALITY)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = width, height, "yuv420p", TIME_BASE
        stream.codec_context.time_base = TIME_BASE
        last = -1
        for seconds, pixels in chain(first, frames):
            pixels = _even(pixels)
            if pixels.shape[:2] != (height, width):
                pixels = np.asarray(Image.fromarray(pixels).resize((width, height)))
            if math.isfinite(seconds):
                last = max(last + 1, round(seconds / TIME_BASE))
            else:
                last = 0 if last < 0 else last + round(1 / (UNTOLD_RATE * TIME_BASE))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = last, TIME_BASE
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _even(pixels: np.ndarray) -> np.ndarray:
    """Repeat the last row and column where their number is odd: colours are stored for two by two pixels."""
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


@cache
def _codec() -> str:
    from av.codec import Codec

    for name in CODECS:
        try:
            Codec(name, "w")
            return name
        except ValueError:  # av's UnknownCodecError
            continue
    raise InputError(f"--draw: PyAV here can encode none of {', '.join(CODECS)}; install PyAV from its wheels")


def _draw_box(pen: ImageDraw.ImageDraw, face: DrawnFace, box: _Box, *, line: int) -> None:
    """Mark a face's corners, on a dark line that shows on light ground."""
    left, top, right, bottom = box
    reach = max(2 * line, round(0.22 * min(right - left, bottom - top)))
    for colour, width in (((0, 0, 0), line + 2), (_colour(face.person), line)):
        for x, towards in ((left, 1), (right, -1)):
            for y, down in ((top, 1), (bottom, -1)):
                pen.line(
                    [(x + towards * reach, y), (x, y), (x, y + down * reach)], fill=colour, width=width, joint="curve"
                )


def _draw_label(face: DrawnFace, size: int, *, brief: bool = False) -> Image.Image:
    """Return a label: the person's number, the expression, and below it valence and arousal in words and as a point."""
    pad, gap = round(0.45 * size), round(0.4 * size)
    bold, plain = _font(size), _font(max(LEAST_TEXT - 1, round(0.82 * size)))
    number, first = str(face.person), face.expression
    sure, second = f"{face.probability:.0%}", f"V {_signed(face.valence)}   A {_signed(face.arousal)}"
    badge = max(round(bold.getlength(number)) + round(0.7 * size), round(1.35 * size))
    disc = 0 if brief else round(2.3 * size)
    words = bold.getlength(first) + (0 if brief else 0.35 * size + plain.getlength(sure))
    text = round(max(words, 0 if brief else plain.getlength(second)))
    width = pad + badge + gap + text + (gap + disc if disc else 0) + pad
    height = round(1.9 * size) if brief else round(3.1 * size)

    large = Image.new("RGBA", (width * SMOOTH, height * SMOOTH), (0, 0, 0, 0))
    pen, colour = ImageDraw.Draw(large), _colour(face.person)
    pen.rounded_rectangle((0, 0, large.width - 1, large.height - 1), radius=0.35 * size * SMOOTH, fill=PAPER)
    row = height / 2 if brief else 1.05 * size
    _rounded(pen, pad, row - 0.66 * size, pad + badge, row + 0.66 * size, radius=0.3 * size, fill=colour)
    if disc:
        _draw_plane(pen, width - pad - disc / 2, height / 2, disc / 2, face, colour)
    label = large.reduce(SMOOTH)
    pen = ImageDraw.Draw(label)
    pen.text((pad + badge / 2, row), number, font=bold, fill=(16, 18, 24), anchor="mm")
    x = pad + badge + gap
    pen.text((x, row), first, font=bold, fill=INK, anchor="lm")
    if not brief:
        pen.text((x + bold.getlength(first) + 0.35 * size, row), sure, font=plain, fill=FAINT, anchor="lm")
        pen.text((x, 2.25 * size), second, font=plain, fill=INK, anchor="lm")
    return label


def _draw_plane(
    pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, face: DrawnFace, colour: tuple[int, int, int]
) -> None:
    """Draw the circle of valence (to the right) and arousal (up), with its axes and the face's point."""
    line = round(0.06 * radius * SMOOTH)
    box = [(x - radius) * SMOOTH, (y - radius) * SMOOTH, (x + radius) * SMOOTH, (y + radius) * SMOOTH]
    pen.ellipse(box, outline=FAINT, width=line)
    pen.line([(box[0], y * SMOOTH), (box[2], y * SMOOTH)], fill=(90, 95, 105), width=line)
    pen.line([(x * SMOOTH, box[1]), (x * SMOOTH, box[3])], fill=(90, 95, 105), width=line)
    reach = max(1.0, math.hypot(face.valence, face.arousal))  # corners of the square are not in the circle
    at_x, at_y = (x + radius * face.valence / reach) * SMOOTH, (y - radius * face.arousal / reach) * SMOOTH
    dot = 0.2 * radius * SMOOTH
    pen.ellipse([at_x - dot, at_y - dot, at_x + dot, at_y + dot], fill=colour)


class _Place(NamedTuple):
    covers: int  # pixels of faces and other labels
    where: _Box


def _find_place(box: _Box, size: tuple[int, int], within: tuple[int, int], taken: Sequence[_Box]) -> _Place:
    """Find where a label covers least: above a face, else below, else beside it; in the picture."""
    width, height = size
    gap = max(3, height // 8)
    middle = (box.left + box.right - width) // 2
    corners = ((middle, box.top - gap - height), (middle, box.bottom + gap), (box.right + gap, box.top),
               (box.left - gap - width, box.top))  # fmt: skip
    places = []
    for x, y in corners:
        x, y = (min(max(0, at), max(0, most - own)) for at, most, own in zip((x, y), within, size))
        where = _Box(x, y, x + width, y + height)
        places.append(_Place(sum(where.overlap(other) for other in taken), where))
    return min(places, key=lambda place: place.covers)  # of equals the first


def _rounded(
    pen: ImageDraw.ImageDraw, left: float, top: float, right: float, bottom: float, *, radius: float, fill
) -> None:
    pen.rounded_rectangle([edge * SMOOTH for edge in (left, top, right, bottom)], radius=radius * SMOOTH, fill=fill)


def _colour(person: int) -> tuple[int, int, int]:
    return COLOURS[(person - 1) % len(COLOURS)]


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    from matplotlib import font_manager  # whose font has the minus sign, and comes with it

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)
