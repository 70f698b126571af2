"""Draw what was predicted into photographs and videos. They are read a second time: then it is known who is who."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg

from mtl_dist import storage
from mtl_dist.data.decode import MAX_SCENE_SIDE
from mtl_dist.data.frames import read_picture
from mtl_dist.data.videos import VIDEO_SUFFIXES, whole_frames
from mtl_dist.errors import InputError
from mtl_dist.faces.finding import AHEAD, read_ahead
from mtl_dist.predict.drawing import DrawnFace, draw_faces, write_film
from mtl_dist.predict.faces import EDGES, WholePictures
from mtl_dist.predicting.inputs import ImageFiles, VideoFile, VideoFiles

FILM = ".mp4"
JPEG_QUALITY = 90

Progress = Callable[[int], None]


def check_drawing(draw: str, frames: WholePictures) -> None:
    """Raise `InputError` where an input cannot be drawn to this place."""
    is_file = draw.lower().endswith(VIDEO_SUFFIXES)
    if is_file and not (isinstance(frames, VideoFile) and draw.lower().endswith(FILM)):
        raise InputError(f"--draw is {draw}; expected a directory, or for one video a name that ends with {FILM}")
    _check_replaces_nothing(draw, frames)
    storage.check_writable(draw.rpartition("/")[0] or "." if is_file else draw, flag="--draw")


def draw_all(draw: str, frames: WholePictures, table: pa.Table, progress: Progress) -> None:
    """Draw the faces of a table: pictures as JPEG, videos as MP4. `progress` is told of frames. Raises `InputError`."""
    rows = table["row"].to_numpy()
    told, targets = _by_frame(table, rows), _targets(draw, frames)
    if isinstance(frames, ImageFiles):
        sources = frames.uris()
        for row, faces in zip(dict.fromkeys(rows.tolist()), told):
            picture = draw_faces(read_picture(sources[row], exif=frames.exif, max_side=MAX_SCENE_SIDE).pixels, faces)
            jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=JPEG_QUALITY, colorspace="RGB")
            storage.write_bytes(targets[row], jpeg)
            progress(1)
        return
    for video, film in zip(_videos(frames), targets, strict=True):
        with storage.staged(film) as path:
            write_film(path, _drawn(video, told, progress))


def _targets(draw: str, frames: WholePictures) -> list[str]:
    """Return the file that each picture, or each video, is drawn to."""
    if isinstance(frames, ImageFiles):
        return [storage.join(draw, _file_name(listed)) for listed in frames.listed]
    if draw.lower().endswith(FILM):
        return [draw]
    return [storage.join(draw, _below(video.title) + FILM) for video in _videos(frames)]


def _videos(frames: VideoFile | VideoFiles) -> Sequence[VideoFile]:
    return frames.videos if isinstance(frames, VideoFiles) else [frames]


def _check_replaces_nothing(draw: str, frames: WholePictures) -> None:
    """Raise where a drawing would take the place of what is drawn, or of another drawing."""
    sources = frames.uris() if isinstance(frames, ImageFiles) else [video.uri for video in _videos(frames)]
    originals = {_place(source) for source in sources}
    drawn: dict[str, str] = {}
    for source, target in zip(sources, _targets(draw, frames), strict=True):
        place = _place(target)
        if place in originals:
            raise InputError(
                f"--draw is {draw}, where {target}, a file of --input, would be replaced; give another name"
            )
        if _place(drawn.setdefault(place, source)) != _place(source):
            raise InputError(
                f"--draw is {draw}, where {drawn[place]} and {source} would both be drawn to {target}; rename one, or "
                "draw them apart"
            )


def _place(uri: str) -> str:
    """Return one text for a file, whatever links and `..` lead to it."""
    return uri if storage.is_s3(uri) else os.path.realpath(storage.local_path(uri))


def _drawn(video: VideoFile, told: Iterator[list[DrawnFace]], progress: Progress) -> Iterator[tuple[float, np.ndarray]]:
    for frame in read_ahead(whole_frames(video.path, every=video.every, announced=video.announced), AHEAD):
        yield frame.seconds, draw_faces(frame.pixels, next(told))
        progress(1)


def _by_frame(table: pa.Table, rows: np.ndarray) -> Iterator[list[DrawnFace]]:
    """Yield the faces of frame after frame."""
    starts = np.flatnonzero(np.diff(rows, prepend=rows[0] - 1)) if len(rows) else rows
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(rows)]):
        told = table.slice(start, end - start).to_pylist()
        yield [_as_drawn(face) for face in told if face["person"] is not None]


def _as_drawn(face: dict[str, Any]) -> DrawnFace:
    expression = face["expression"]
    box = [face[edge] for edge in EDGES]
    return DrawnFace(box, face["person"], expression, face[f"p_{expression}"], face["valence"], face["arousal"])


def _file_name(listed: str) -> str:
    name = _below(listed)
    return name if name.lower().endswith((".jpg", ".jpeg")) else f"{name}.jpg"


def _below(name: str) -> str:
    """Return a name that does not lead out of a directory: that of a list may be any path."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))
