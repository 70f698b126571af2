"""Rendered scenes and clips with people in them, whose places are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from mtl_dist.synthetic.faces import render_views
from mtl_dist.synthetic.person import Look, make_identity
from tests.conftest import LONDON

WIDTH, HEIGHT = 320, 240
FACE_SHARE = 1 / 1.3  # of the side of a picture of the view `cropped`, about


class Place(NamedTuple):
    """Where the middle of a person's picture is, and its side, in pixels."""

    x: float
    y: float
    side: float


Walk = Callable[[int], Place | None]  # by frame; None: the person is not there


@cache
def person(number: int) -> tuple[Image.Image, ...]:
    """Render a few pictures of one person, who looks about a little."""
    rng = np.random.default_rng(number)
    identity = make_identity(rng)
    looks = [Look(aus={}, yaw=yaw, roll=roll) for yaw, roll in ((0, 0), (0.1, 0.03), (0, 0.05), (-0.1, 0))]
    return tuple(render_views(identity, look, rng)[0] for look in looks)


@cache
def londoner(number: int) -> tuple[Image.Image, ...]:
    """Read the photographs of one person of the London set."""
    directory = sorted((LONDON / "cropped").iterdir())[number]
    return tuple(Image.open(path).convert("RGB") for path in sorted(directory.glob("*.jpg")))[:1]


def background(seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """Draw boxes and lines without a face."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(rng.integers(60, 200, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(30):
        x, y, wide, high = (rng.uniform(0, 1, 4) * (*size, size[0] / 3, size[1] / 3)).tolist()
        draw.rectangle((x, y, x + wide, y + high), fill=tuple(rng.integers(0, 255, 3).tolist()))
    return image.filter(ImageFilter.GaussianBlur(2))


def paste(image: Image.Image, picture: Image.Image, place: Place) -> None:
    """Paste a person's picture with soft edges; what lies beyond the image is cut off."""
    side = round(place.side)
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).ellipse((side * 0.06, side * 0.02, side * 0.94, side * 1.1), fill=255)
    scaled = picture.resize((side, side), Image.Resampling.BICUBIC)
    image.paste(
        scaled, (round(place.x - side / 2), round(place.y - side / 2)), mask.filter(ImageFilter.GaussianBlur(2))
    )


def draw_frames(
    people: Sequence[Sequence[Image.Image]],
    paths: Sequence[Walk],
    count: int,
    *,
    seed: int = 0,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> Iterator[tuple[np.ndarray, list[Place | None]]]:
    """Yield (frame, where everybody is): who is later in the list is in front."""
    behind = background(seed, size)
    for number in range(count):
        image, places = behind.copy(), []
        for pictures, path in zip(people, paths):
            places.append(path(number))
            if places[-1] is not None:
                paste(image, pictures[number // 8 % len(pictures)], places[-1])
        yield np.asarray(image), places


def write_clip(path: Path, frames: Sequence[np.ndarray], *, codec: str = "mpeg4", times: Sequence[int] = ()) -> Path:
    """Write frames of one size; `times` in 1/25 s."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"qscale": "3"} if codec == "mpeg4" else {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, 25)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = times[number] if times else number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def going(start: tuple[float, float], step: tuple[float, float], side: float, gone: range = range(0)) -> Walk:
    """Walk straight on, and be away for some frames."""

    def place(number: int) -> Place | None:
        if number in gone:
            return None
        return Place(start[0] + step[0] * number, start[1] + step[1] * number, side)

    return place
