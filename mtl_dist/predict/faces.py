"""Find the faces of photographs and videos, and predict them: a row a face and frame, an empty one where none is.

Frames pass by and are not kept; what stays is their rows. Who is who in a video is known at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtl_dist.data.frames import BadImage, Seen, read_in_order, read_picture
from mtl_dist.faces.detector import open_detector
from mtl_dist.faces.face import Detector
from mtl_dist.faces.finding import AHEAD, FoundFace, FoundFrame, find_in_photograph, find_in_video, read_ahead
from mtl_dist.faces.tracking import Tracker
from mtl_dist.predict.options import PredictCommand
from mtl_dist.predicting.averaging import Cut, Mean, no_predictions
from mtl_dist.predicting.faces import cut_face, stack_cuts
from mtl_dist.predicting.inputs import ImageFiles, VideoFile, VideoFiles
from mtl_dist.predicting.predictions import check_finite, predicted_columns

EDGES = ("left", "top", "right", "bottom")
FRAMES_A_CHUNK = 1024  # without a face, before their rows are put away

Progress = Callable[[int], None]
WholePictures = ImageFiles | VideoFile | VideoFiles


class FaceRows(NamedTuple):
    """What was found and predicted."""

    table: pa.Table  # a row a face and frame, in the order of frames and persons
    num_brief: int  # faces that were seen too shortly to be a person's
    seen: Seen
    num_persons: int | None  # of videos

    def lines(self) -> list[str]:
        """Return what is to be said of the frames, in words."""
        brief = f"note: {self.num_brief} face(s) that were seen for a moment are no person's and have no row"
        return [*self.seen.lines(), *([brief] if self.num_brief else [])]

    def summary(self) -> str:
        """Say how many there are, in words."""
        rows, person = self.table["row"], self.table["person"]
        persons = "" if self.num_persons is None else f" of {self.num_persons} person(s)"
        frames = len(pc.unique(rows))
        return (
            f"{len(person) - person.null_count} faces{persons} in {frames} frames, {person.null_count} without a face"
        )


def predict_faces(command: PredictCommand, frames: WholePictures, mean: Mean, progress: Progress) -> FaceRows:
    """Predict the faces of all frames. `progress` is told of frames. Raises `InputError`."""
    seen, source = Seen(), " or ".join(command.runs)
    threads = max(1, command.workers)
    open_with = partial(open_detector, command.detector, min_confidence=command.min_confidence)
    if isinstance(frames, ImageFiles):
        rows = _Rows(mean, command.batch, source)
        for place, found in _find_in_files(frames, open_with(), threads, seen):
            if found is not None:
                rows.add(place, frames.listed[place], found)
            progress(1)
        return FaceRows(rows.finished(None), 0, seen, None)
    detector, tables, num_before, num_brief, num_persons = open_with(threads=threads), [], 0, 0, 0
    for video in frames.videos if isinstance(frames, VideoFiles) else [frames]:
        rows, tracker = _Rows(mean, command.batch, source, has_time=True), Tracker()
        found_frames = find_in_video(
            video.path, detector, tracker, every=video.every, announced=video.announced, seen=seen
        )
        # Of several videos a row is a frame's place among all, as without faces.
        for place, found in enumerate(read_ahead(found_frames, AHEAD), start=num_before):
            row = place if isinstance(frames, VideoFiles) else found.number
            rows.add(row, video.names(np.array([found.number]))[0], found)
            progress(1)
            num_before = place + 1
        persons = tracker.persons()
        tables.append(rows.finished(persons))
        num_persons += len(set(persons.values()))
        num_brief += rows.num_brief
    return FaceRows(pa.concat_tables(tables), num_brief, seen, num_persons)


def _find_in_files(
    frames: ImageFiles, detector: Detector, threads: int, seen: Seen
) -> Iterator[tuple[int, FoundFrame | None]]:
    """Yield the place of every photograph with what is found in it; None where it is bad, and that may be."""

    def find(uri: str) -> tuple[FoundFrame, int] | None:
        try:
            picture = read_picture(uri, exif=frames.exif)
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

    def __init__(self, mean: Mean, batch: int, source: str, *, has_time: bool = False):
        self._mean, self._batch, self._source, self._has_time = mean, batch, source, has_time
        self._waiting: list[_Row] = []
        self._num_faces = 0  # that wait
        self._tables: list[pa.Table] = []
        self.num_brief = 0

    def add(self, row: int, image: str, found: FoundFrame) -> None:
        """Add the faces of a frame, or that there is none."""
        for face in found.faces:
            cuts = cut_face(found.picture, face, self._mean.cuts)
            self._waiting.append(_Row(row, image, found.seconds, face, cuts))
            self._num_faces += 1
            if self._num_faces == self._batch:
                self._predict()
        if not found.faces:
            self._waiting.append(_Row(row, image, found.seconds, None, None))
        if len(self._waiting) >= FRAMES_A_CHUNK:
            self._predict()

    def finished(self, persons: dict[int, int] | None) -> pa.Table:
        """Return all rows, of tracks with a person, by its number; None: tracks are persons."""
        if self._waiting or not self._tables:
            self._predict()
        table = pa.concat_tables(self._tables)
        return table if persons is None else self._named(table, persons)

    def _predict(self) -> None:
        waiting, self._waiting, self._num_faces = self._waiting, [], 0
        faces = [(row, row.face, row.cuts) for row in waiting if row.face and row.cuts]
        columns = {"row": pa.array([row.row for row in waiting], pa.int64()),
                   "image": pa.array([row.image for row in waiting], pa.string())}  # fmt: skip
        if self._has_time:
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
        self._tables.append(_beside(pa.table(columns), pa.table(told), places, [row.face is None for row in waiting]))

    def _named(self, table: pa.Table, persons: dict[int, int]) -> pa.Table:
        """Replace tracks by their persons. One of a moment has none: its row goes, or says that no face is there."""
        tracks = table["person"].fill_null(0).to_numpy()
        person_of = np.zeros(int(tracks.max(initial=0)) + 1, np.int32)
        for track, person in persons.items():
            person_of[track] = person
        person, rows = person_of[tracks], table["row"].to_numpy()
        self.num_brief = int(((tracks > 0) & (person == 0)).sum())
        is_first = np.concatenate([[True], rows[1:] != rows[:-1]])[: len(rows)]
        has_person = np.isin(rows, rows[person > 0])
        kept = np.flatnonzero((person > 0) | (is_first & ~has_person))
        kept = kept[np.lexsort((person[kept], rows[kept]))]
        first = table.column_names.index("person")
        told = table.select(table.column_names[first:]).set_column(0, "person", pa.array(person))
        return _beside(table.select(table.column_names[:first]).take(kept), told, kept, person[kept] == 0)


def _beside(frames: pa.Table, told: pa.Table, places: np.ndarray, is_none: Sequence[bool] | np.ndarray) -> pa.Table:
    """Put what is told of faces, by its place, beside their frames: null where there is none."""
    found = told.take(pa.array(places, pa.int64(), mask=np.asarray(is_none, bool)))
    return pa.table({name: table[name] for table in (frames, found) for name in table.column_names})
