"""Find the faces of photographs and videos, and predict them: a row a face and frame, an empty one where none is.

Frames pass by and are not kept; what stays is their rows. Who is who in a video is known at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtl_dist.data.decode import MAX_SCENE_SIDE
from mtl_dist.data.frames import BadImage, Seen, read_in_order, read_picture
from mtl_dist.errors import InputError
from mtl_dist.faces.detector import open_detector
from mtl_dist.faces.face import Detector
from mtl_dist.faces.finding import AHEAD, FoundFace, FoundFrame, find_in_photograph, find_in_video, read_ahead
from mtl_dist.faces.tracking import MIN_FRAMES, Tracker
from mtl_dist.faces.views import LEAST_FACE
from mtl_dist.predict.options import PredictCommand
from mtl_dist.predicting.averaging import Cut, Mean, no_predictions
from mtl_dist.predicting.faces import cut_face, large_enough, stack_cuts
from mtl_dist.predicting.inputs import ImageFiles, VideoFile, VideoFiles, no_video
from mtl_dist.predicting.predictions import check_finite, predicted_columns

EDGES = ("left", "top", "right", "bottom")
RECENT = 64  # tables of rows
FRAMES_A_CHUNK = 1024  # without a face, before their rows are put away

Progress = Callable[[int], None]
WholePictures = ImageFiles | VideoFile | VideoFiles


class BadVideo(InputError):
    """A video cannot be read, or not to its end."""


class FaceRows(NamedTuple):
    """What was found and predicted."""

    table: pa.Table  # a row a face and frame, in the order of frames and persons
    num_small: int  # faces that were too small to be cut out
    num_brief: int  # and too shortly there to be a person's
    num_persons: int | None  # of videos

    def lines(self) -> list[str]:
        """Return what is to be said of faces without a row."""
        left_out = {f"smaller than {LEAST_FACE} pixels": self.num_small, "there for a moment only": self.num_brief}
        return [f"note: {count} face(s), {what}, have no row" for what, count in left_out.items() if count]

    def summary(self) -> str:
        """Say how many there are, in words."""
        person = self.table["person"]
        frames, faces = len(pc.unique(self.table["row"])), len(person) - person.null_count
        persons = "" if self.num_persons is None else f" of {self.num_persons} person(s)"
        return f"{faces} faces{persons} in {frames} frames, {person.null_count} without a face"


def predict_faces(
    command: PredictCommand, frames: WholePictures, mean: Mean, *, seen: Seen, progress: Progress
) -> tuple[FaceRows, WholePictures]:
    """Predict the faces of all frames. `progress` is told of them, `seen` of what was noticed. Raises `InputError`.

    Also returns the frames, without videos that turned out to be damaged.
    """
    threads = max(1, command.workers)
    is_files = isinstance(frames, ImageFiles)  # a thread each; a video's frames are searched one after the other
    detector = open_detector(
        command.detector, min_confidence=command.min_confidence, max_side=command.max_side,
        threads=1 if is_files else threads)  # fmt: skip
    source = " or ".join(command.runs)
    if is_files:
        rows = _Rows(mean, command.batch, source)
        for place, found in _find_in_files(frames, detector, threads, seen):
            if found is not None:
                rows.add(place, frames.listed[place], found)
            progress(1)
        return FaceRows(rows.all(), rows.num_small, 0, None), frames
    videos = frames.videos if isinstance(frames, VideoFiles) else [frames]
    parts, whole, bad = [], [], []
    for video in videos:
        rows = _Rows(mean, command.batch, source, is_video=True)
        try:
            parts.append(_predict_video(video, detector, rows, seen, progress))
            whole.append(video)
        except BadVideo as error:
            if not (isinstance(frames, VideoFiles) and frames.skip_bad):
                raise
            bad.append(str(error))
    if isinstance(frames, VideoFiles):
        frames = replace(frames, videos=tuple(whole), bad=(*frames.bad, *bad))
        if not whole:
            raise no_video(command.input, frames.bad)
        parts = _numbered_on(parts)
    tables, *counts = zip(*parts)
    return FaceRows(pa.concat_tables(tables), *map(sum, counts)), frames


def _predict_video(video: VideoFile, detector: Detector, rows: _Rows, seen: Seen, progress: Progress) -> FaceRows:
    tracker, num_frames = Tracker(), 0
    found_frames = find_in_video(video.path, detector, tracker, every=video.every, announced=video.announced, seen=seen)
    for found in _readable(read_ahead(found_frames, AHEAD)):
        rows.add(found.number, video.names(np.array([found.number]))[0], found)
        num_frames += 1
        progress(1)
    persons = tracker.persons(min_frames=min(MIN_FRAMES, num_frames))
    table, num_brief = _with_persons(rows.all(), persons)
    return FaceRows(table, rows.num_small, num_brief, len(set(persons.values())))


def _readable(frames: Iterator[FoundFrame]) -> Iterator[FoundFrame]:
    """Tell what is wrong with a video from what is wrong with the models that predict its frames."""
    try:
        yield from frames
    except InputError as error:
        raise BadVideo(str(error)) from error


def _numbered_on(parts: Sequence[FaceRows]) -> list[FaceRows]:
    """Number the frames of several videos through, as those without --faces are."""
    numbered, begin = [], 0
    for part in parts:
        frames, rows = np.unique(part.table["row"].to_numpy(), return_inverse=True)
        numbered.append(part._replace(table=part.table.set_column(0, "row", pa.array(rows + begin, pa.int64()))))
        begin += len(frames)
    return numbered


def _find_in_files(
    frames: ImageFiles, detector: Detector, threads: int, seen: Seen
) -> Iterator[tuple[int, FoundFrame | None]]:
    """Yield the place of every photograph with what is found in it; None where it is bad, and that may be."""

    def find(uri: str) -> tuple[FoundFrame, int] | None:
        try:
            picture = read_picture(uri, exif=frames.exif, max_side=MAX_SCENE_SIDE)
        except BadImage:
            if frames.skip_bad:
                return None
            raise
        return find_in_photograph(picture.pixels, detector), picture.orientation

    for place, found in enumerate(read_in_order(find, frames.uris(), workers=threads, ahead=2 * threads)):
        if found is not None and found[1] != 1:
            seen.note("turned" if frames.exif == "apply" else "lying", frames.listed[place])
        yield place, found and found[0]


class _Row(NamedTuple):
    row: int
    image: str
    seconds: float
    face: FoundFace | None
    cuts: dict[Cut, np.ndarray] | None  # None: there is no face


class _Rows:
    """Rows of a table, predicted some faces at a time."""

    def __init__(self, mean: Mean, batch: int, source: str, *, is_video: bool = False):
        self._mean, self._batch, self._source, self._is_video = mean, batch, source, is_video
        self._waiting: list[_Row] = []
        self._num_faces = 0  # that wait
        self._tables: list[pa.Table] = []
        self._recent: list[pa.Table] = []
        self.num_small = 0

    def add(self, row: int, image: str, found: FoundFrame) -> None:
        """Add the faces of a frame, or that there is none."""
        faces = large_enough(found)
        self.num_small += len(found.faces) - len(faces)
        if not self._is_video:  # a photograph's persons are those that have a row
            faces = [face._replace(track=place) for place, face in enumerate(faces, start=1)]
        for face in faces:
            cuts = cut_face(found.picture, face, self._mean.cuts)
            self._waiting.append(_Row(row, image, found.seconds, face, cuts))
            self._num_faces += 1
            if self._num_faces == self._batch:
                self._predict()
        if not faces:
            self._waiting.append(_Row(row, image, found.seconds, None, None))
        if len(self._waiting) >= FRAMES_A_CHUNK:
            self._predict()

    def all(self) -> pa.Table:
        """Return all rows."""
        if self._waiting or not (self._tables or self._recent):
            self._predict()
        self._put_away()
        return pa.concat_tables(self._tables)

    def _put_away(self) -> None:
        """Make one table of many: a small one has ten times the bytes of its rows, and a film thousands of them."""
        if self._recent:
            self._tables.append(pa.concat_tables(self._recent).combine_chunks())
        self._recent = []

    def _predict(self) -> None:
        waiting, self._waiting, self._num_faces = self._waiting, [], 0
        faces = [(row, row.face, row.cuts) for row in waiting if row.face and row.cuts]
        columns = {"row": pa.array([row.row for row in waiting], pa.int64()),
                   "image": pa.array([row.image for row in waiting], pa.string())}  # fmt: skip
        if self._is_video:
            seconds = np.array([row.seconds for row in waiting], np.float64)
            columns["seconds"] = pa.array(seconds, mask=np.isnan(seconds))
        box = np.array([found.face.box for _, found, _ in faces], np.float32).reshape(-1, 4)
        told = {"person": pa.array([found.track for _, found, _ in faces], pa.int32())}
        told |= {name: pa.array(edge) for name, edge in zip(EDGES, box.T)}
        told["confidence"] = pa.array([found.face.confidence for _, found, _ in faces], pa.float32())
        predictions = self._mean(stack_cuts([cuts for *_, cuts in faces])) if faces else no_predictions()
        check_finite(predictions, [row.image for row, *_ in faces], source=self._source)
        told |= predicted_columns(predictions)
        places = np.cumsum([row.face is not None for row in waiting]) - 1
        self._recent.append(_beside(pa.table(columns), pa.table(told), places, [row.face is None for row in waiting]))
        if len(self._recent) == RECENT:
            self._put_away()


def _with_persons(table: pa.Table, persons: dict[int, int]) -> tuple[pa.Table, int]:
    """Replace tracks by their persons. One of a moment has none: its row goes, or says that no face is there.

    Also returns the number of such faces.
    """
    tracks, rows = table["person"].fill_null(0).to_numpy(), table["row"].to_numpy()
    person_of = np.zeros(int(tracks.max(initial=0)) + 1, np.int32)
    for track, person in persons.items():
        person_of[track] = person
    person = person_of[tracks]
    is_first = np.diff(rows, prepend=-1) > 0
    kept = np.flatnonzero((person > 0) | (is_first & ~np.isin(rows, rows[person > 0])))
    kept = kept[np.lexsort((person[kept], rows[kept]))]
    first = table.column_names.index("person")
    told = table.select(table.column_names[first:]).set_column(0, "person", pa.array(person))
    named = _beside(table.select(table.column_names[:first]).take(kept), told, kept, person[kept] == 0)
    return named, int(((tracks > 0) & (person == 0)).sum())


def _beside(frames: pa.Table, told: pa.Table, places: np.ndarray, is_none: Sequence[bool] | np.ndarray) -> pa.Table:
    """Put what is told of faces, by its place, beside their frames: null where there is none."""
    found = told.take(pa.array(places, pa.int64(), mask=np.asarray(is_none, bool)))
    return pa.table({name: table[name] for table in (frames, found) for name in table.column_names})
