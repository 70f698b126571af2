"""Scenes of clutter, 1280 x 720, with photographs of faces pasted into them, and what is true of each; by a seed.

A photograph is one of a set in the s-Aff-Wild2 layout, a face with context. It is pasted at a random place, size and
turn, as bright as may be, through a soft mask in the form of a rounded square, so that hair, neck and a rim of its
background come with it; then the scene is a JPEG, and read again. Clutter is gradients, noise as nature has it, shapes,
textures, strokes like text, and stretched parts of photographs that hold no face: hair, shirts, backgrounds.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 1280, 720
MOST_FACES = 4
_TRIES = 60  # to find room for a face


class Ranges(NamedTuple):
    """How a scene is drawn."""

    size: tuple[float, float] = (40, 400)  # pixels of the longer side of a face's box; uniform in its logarithm
    turn: float = 25.0  # degrees, at most, either way
    brightness: tuple[float, float] = (0.45, 1.5)  # of a face, and of the clutter: pixels are multiplied by it
    quality: tuple[int, int] = (30, 95)


ALL = Ranges()


class Photograph(NamedTuple):
    """A face with context, and where in it the face is."""

    name: str
    pixels: np.ndarray  # (h, w, 3) uint8 RGB
    box: np.ndarray  # (4,) left, top, right, bottom
    points: np.ndarray  # (5, 2)


class Pasted(NamedTuple):
    """What is true of a face in a scene."""

    photograph: Photograph
    matrix: np.ndarray  # (2, 3): from the photograph to the scene
    size: float  # of the longer side of the face's box, in pixels of the scene
    turn: float  # degrees
    brightness: float


class Scene(NamedTuple):
    pixels: np.ndarray  # (HEIGHT, WIDTH, 3) uint8 RGB
    faces: list[Pasted]
    quality: int  # of its JPEG


def make_scene(
    photographs: Sequence[Photograph],
    *,
    seed: int,
    number: int,
    num_faces: int | None = None,
    only: Photograph | None = None,
    ranges: Ranges = ALL,
) -> Scene:
    """Compose one scene: with one to four faces by chance, or as many as are asked for and find room.

    They are those of the photographs, or of `only` one; the clutter has parts of all.
    """
    rng = np.random.default_rng([seed, number])
    canvas = np.clip(clutter(photographs, rng) * rng.uniform(*ranges.brightness), 0, 255).astype(np.uint8)
    wanted = int(rng.integers(1, MOST_FACES + 1)) if num_faces is None else num_faces
    faces: list[Pasted] = []
    discs: list[tuple[float, float, float]] = []
    for _ in range(_TRIES * wanted):
        if len(faces) == wanted:
            break
        face = _plan(only or photographs[rng.integers(len(photographs))], rng, ranges)
        disc = _disc(face)
        if _is_inside(face) and all(np.hypot(disc[0] - x, disc[1] - y) > disc[2] + r for x, y, r in discs):
            _paste(canvas, face)
            faces.append(face)
            discs.append(disc)
    quality = int(rng.integers(*ranges.quality, endpoint=True))
    return Scene(_as_jpeg(canvas, quality), faces, quality)


def moved(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return (n, 2) points after a (2, 3) matrix."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def box_in(face: Pasted) -> np.ndarray:
    """Return the upright box in the scene of a face's box that was turned about its middle."""
    left, top, right, bottom = face.photograph.box
    middle = moved(face.matrix, np.array([[(left + right) / 2, (top + bottom) / 2]]))[0]
    scale = np.hypot(*face.matrix[:, 0])
    half = scale * np.array([right - left, bottom - top]) / 2
    return np.concatenate([middle - half, middle + half])


# The clutter.


def clutter(photographs: Sequence[Photograph], rng: np.random.Generator) -> np.ndarray:
    """Draw a background: (HEIGHT, WIDTH, 3) float, 0 to 255."""
    image = Image.fromarray(_ground(rng).astype(np.uint8))
    for _ in range(int(rng.integers(10, 40))):
        kind = rng.choice(["shape", "texture", "strokes", "part", "noise"], p=[0.4, 0.15, 0.15, 0.2, 0.1])
        if kind == "shape":
            _draw_shape(image, rng)
        elif kind == "strokes":
            _draw_strokes(image, rng)
        else:
            width, height = (int(side) for side in np.exp(rng.uniform(np.log(30), np.log(500), 2)))
            patch = {"texture": _texture, "noise": _noise, "part": _part}[kind]
            pixels = patch(photographs, width, height, rng) if kind == "part" else patch(width, height, rng)
            piece = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
            turned = float(rng.uniform(-40, 40))
            mask = Image.new("L", piece.size, int(rng.integers(120, 256))).rotate(turned, expand=True)
            place = (int(rng.integers(-width // 2, WIDTH)), int(rng.integers(-height // 2, HEIGHT)))
            image.paste(piece.rotate(turned, expand=True, resample=Image.Resampling.BILINEAR), place, mask)
    return np.asarray(image).astype(np.float32)


def _colour(rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.3:  # as skin may be
        return np.array([225, 172, 138]) * rng.uniform(0.25, 1.1) + rng.normal(0, 12, 3)
    return rng.uniform(0, 255, 3)


def _ground(rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.5:
        return np.clip(_noise(WIDTH, HEIGHT, rng), 0, 255)
    along = rng.uniform(-1, 1, 2)
    ramp = np.linspace(0, along[0], WIDTH)[None, :] + np.linspace(0, along[1], HEIGHT)[:, None]
    ramp = ((ramp - ramp.min()) / max(float(np.ptp(ramp)), 1e-6))[..., None]
    return np.clip(_colour(rng) * ramp + _colour(rng) * (1 - ramp), 0, 255)


def _noise(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Return noise with a spectrum as pictures of nature have, 1/f, in two colours."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :] * rng.uniform(0.3, 3))
    frequency[0, 0] = np.inf
    spectrum = np.exp(2j * np.pi * rng.random(frequency.shape)) / frequency ** rng.uniform(0.8, 1.6)
    plane = np.fft.irfft2(spectrum, s=(height, width))
    level = np.clip(0.5 + plane / max(4 * float(plane.std()), 1e-9), 0, 1)[..., None]
    return _colour(rng) * level + _colour(rng) * (1 - level)


def _texture(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    angle, period = rng.uniform(0, np.pi), rng.uniform(3, 40)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    kind = rng.integers(4)
    level = [
        lambda: (along // period) % 2,  # stripes
        lambda: (along // period + across // period) % 2,  # squares
        lambda: np.hypot(along % period - period / 2, across % period - period / 2) < period * 0.3,  # dots
        lambda: ((across // period) % 2 * period + along) % (2 * period) > 2,  # bricks
    ][kind]().astype(np.float32)[..., None]
    return _colour(rng) * level + _colour(rng) * (1 - level) + rng.normal(0, rng.uniform(0, 20), (height, width, 1))


def _part(photographs: Sequence[Photograph], width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Return a stretched part of a photograph from beside its face."""
    photograph = photographs[rng.integers(len(photographs))]
    high, wide = photograph.pixels.shape[:2]
    left, top, right, bottom = (int(edge) for edge in photograph.box)
    strips = [(0, 0, wide, top), (0, bottom, wide, high), (0, 0, left, high), (right, 0, wide, high)]
    strips = [s for s in strips if s[2] - s[0] >= 8 and s[3] - s[1] >= 8] or [(0, 0, 8, 8)]
    x, y, x_end, y_end = strips[rng.integers(len(strips))]
    across, down = (int(rng.integers(8, most, endpoint=True)) for most in (x_end - x, y_end - y))
    x, y = int(rng.integers(x, x_end - across, endpoint=True)), int(rng.integers(y, y_end - down, endpoint=True))
    piece = Image.fromarray(photograph.pixels[y : y + down, x : x + across])
    if rng.random() < 0.5:
        piece = piece.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return np.asarray(piece.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)


def _draw_shape(image: Image.Image, rng: np.random.Generator) -> None:
    draw = ImageDraw.Draw(image, "RGBA")
    fill = (*(int(value) for value in np.clip(_colour(rng), 0, 255)), int(rng.integers(100, 256)))
    x, y = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT)
    w, h = np.exp(rng.uniform(np.log(8), np.log(300), 2))
    kind = rng.integers(3)
    if kind == 0:
        draw.ellipse([x, y, x + w, y + h], fill=fill)
    elif kind == 1:
        draw.rectangle([x, y, x + w, y + h], fill=fill)
    else:
        corners = rng.uniform(-1, 1, (int(rng.integers(3, 8)), 2)) * (w, h) + (x, y)
        draw.polygon([tuple(corner) for corner in corners.tolist()], fill=fill)


def _draw_strokes(image: Image.Image, rng: np.random.Generator) -> None:
    """Draw lines of strokes, as writing looks from afar."""
    draw = ImageDraw.Draw(image)
    fill = tuple(int(value) for value in np.clip(_colour(rng), 0, 255))
    size, left, y = float(rng.uniform(5, 40)), rng.uniform(-50, WIDTH), rng.uniform(0, HEIGHT)
    for _ in range(int(rng.integers(1, 6))):
        x = left
        for _ in range(int(rng.integers(4, 30))):
            corners = (rng.random((int(rng.integers(2, 5)), 2)) * (size * 0.6, size) + (x, y)).tolist()
            draw.line([tuple(corner) for corner in corners], fill=fill, width=max(1, int(size / 8)))
            x += size * (0.8 if rng.random() < 0.85 else 1.6)
        y += size * 1.5


# The faces.


def _plan(photograph: Photograph, rng: np.random.Generator, ranges: Ranges) -> Pasted:
    left, top, right, bottom = photograph.box
    size = float(np.exp(rng.uniform(*np.log(ranges.size))))
    scale, turn = size / max(right - left, bottom - top), float(rng.uniform(-ranges.turn, ranges.turn))
    angle = np.deg2rad(turn)
    rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    place = rng.uniform([size / 2, size / 2], [WIDTH - size / 2, HEIGHT - size / 2])
    shift = place - rotation @ np.array([(left + right) / 2, (top + bottom) / 2])
    return Pasted(photograph, np.column_stack([rotation, shift]), size, turn, float(rng.uniform(*ranges.brightness)))


def _disc(face: Pasted) -> tuple[float, float, float]:
    high, wide = face.photograph.pixels.shape[:2]
    x, y = moved(face.matrix, np.array([[wide / 2, high / 2]]))[0]
    return float(x), float(y), float(np.hypot(*face.matrix[:, 0]) * max(wide, high) * 0.55)


def _is_inside(face: Pasted) -> bool:
    left, top, right, bottom = box_in(face)
    return left >= 0 and top >= 0 and right < WIDTH and bottom < HEIGHT


def _paste(canvas: np.ndarray, face: Pasted) -> None:
    pixels = np.clip(face.photograph.pixels * np.float32(face.brightness), 0, 255).astype(np.uint8)
    high, wide = pixels.shape[:2]
    # The mask: 1 inside of |x|^4 + |y|^4 = 1 of the photograph, soft over its outer tenth.
    x, y = np.linspace(-1, 1, wide), np.linspace(-1, 1, high)
    radius = (x[None, :] ** 4 + y[:, None] ** 4) ** 0.25
    mask = np.clip((1 - radius) / 0.1, 0, 1)
    matrix = np.vstack([face.matrix, [0, 0, 1]])
    rgba = Image.fromarray(np.dstack([pixels, (mask * 255).astype(np.uint8)]))
    scale = float(np.hypot(*face.matrix[:, 0]))
    if scale < 1:  # first shrunk by all of its pixels
        small = max(1, round(wide * scale)), max(1, round(high * scale))
        rgba = rgba.resize(small, Image.Resampling.BICUBIC)
        x_by, y_by = wide / small[0], high / small[1]
        matrix = matrix @ np.array([[x_by, 0, (x_by - 1) / 2], [0, y_by, (y_by - 1) / 2], [0, 0, 1]])
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # Pillow's coordinates begin at edges of pixels
    back = np.linalg.inv(half @ matrix @ np.linalg.inv(half))
    there = rgba.transform(
        (WIDTH, HEIGHT), Image.Transform.AFFINE, back[:2].ravel().tolist(), resample=Image.Resampling.BICUBIC
    )
    laid = Image.fromarray(canvas)
    laid.paste(there, (0, 0), there.getchannel("A"))
    canvas[:] = np.asarray(laid)


def _as_jpeg(canvas: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(canvas).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return np.array(image)
