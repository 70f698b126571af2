"""Cut the faces out of one video, or of some photographs.

Pictures are written to a directory of their own, with a row each. At the end, when it is known who of a video is a
person, they are moved to where they belong; then the part's file is written, and with it the part is done.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from mtl_dist import storage
from mtl_dist.data.decode import MAX_SCENE_SIDE
from mtl_dist.data.frames import BadImage, Seen, read_picture
from mtl_dist.data.videos import count_frames
from mtl_dist.errors import InputError
from mtl_dist.faces.align import sharpness, yaw
from mtl_dist.faces.detector import open_detector
from mtl_dist.faces.face import Detector
from mtl_dist.faces.finding import FoundFace, FoundFrame, find_in_photograph, find_in_video
from mtl_dist.faces.tracking import Tracker
from mtl_dist.faces.views import cut_view, longer_side
from mtl_dist.prepare import rows
from mtl_dist.prepare.options import PrepareCommand
from mtl_dist.prepare.rows import RowWriter, read_about, read_rows
from mtl_dist.prepare.sources import FURTHER, Part
from mtl_dist.tasks import VIEWS

PARTS, UNFINISHED, PLAN = "parts", "unfinished", "prepare.json"
Progress = Callable[[int], None]


class Task(NamedTuple):
    """What a process needs to do a part. Plain data."""

    part: Part
    command: PrepareCommand
    dest: str  # absolute
    plan: str  # the text of `PLAN`


def make_part(task: Task, progress: Progress) -> dict[str, Any]:
    """Do a part, and return what its file says of it. `progress` is told of frames.

    Raises `InputError` naming a file that is damaged, unless bad ones are left out.
    """
    dest = Path(task.dest)
    _check_dest(dest, task.plan)
    place = dest / UNFINISHED / f"{socket.gethostname()}-{os.getpid()}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    detector = _open(task.command)
    try:
        with storage.scratch_directory("prepare") as scratch:
            about = _Cutter(task, place, detector, progress).cut(scratch)
        about |= _finish(task, dest, place, about)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return about


def how_of(plan: str) -> dict[str, Any]:
    """Return the part of a plan that decides what pictures are like: all but where the source lies."""
    return {key: value for key, value in json.loads(plan).items() if key != "source"}


def _check_dest(dest: Path, plan: str) -> None:
    try:
        found = (dest / PLAN).read_text()
    except OSError:
        found = ""
    if found != plan:
        raise InputError(
            f"{socket.gethostname()} does not see what was begun at {dest}; give a DEST on a disk that all nodes of "
            "the cluster share, or work on this machine with --local"
        )


@lru_cache(maxsize=1)
def _open(command: PrepareCommand) -> Detector:
    return open_detector(command.detector, min_confidence=command.min_confidence, max_side=command.max_side)


class _Cutter:
    """Cuts faces out, and writes pictures and rows to a place of its own."""

    def __init__(self, task: Task, place: Path, detector: Detector, progress: Progress):
        self.task, self.part, self.command = task, task.part, task.command
        self.place, self.detector, self.progress = place, detector, progress
        self.seen, self.bad = Seen(), []
        self.persons: dict[int, int] = {}
        self.first = self.last = None  # a frame's number and seconds
        self.made: set[Path] = set()

    def cut(self, scratch: Path) -> dict[str, Any]:
        """Write pictures and rows; return what is to be said of the part."""
        with RowWriter(self.place / "rows") as out:
            try:
                self._cut_video(out, scratch) if self.part.is_video else self._cut_photographs(out)
            except InputError as error:
                if not (self.part.is_video and self.command.skip_bad_images):
                    raise
                self.bad = [[self.part.sources[0], str(error)]]
        frames, seconds = (last - first for first, last in zip(self.first or (0, 0.0), self.last or (0, 0.0)))
        return {
            "identity": self.part.identity,
            "how": how_of(self.task.plan),
            "bad": self.bad,
            "frame_s": seconds / frames if frames and seconds > 0 else None,  # from frame to frame
            "seen": {
                "counts": self.seen.counts,
                "first": self.seen.first,
                "videos": {kind: sorted(names) for kind, names in self.seen.videos.items()},
            },
            "persons": self.persons,
        }

    def _cut_video(self, out: RowWriter, scratch: Path) -> None:
        uri, (name,) = storage.join(self.part.root, self.part.sources[0]), self.part.sources
        path = storage.local_path(uri) if not storage.is_s3(uri) else scratch / name.rpartition("/")[2]
        try:
            if storage.is_s3(uri):
                storage.download(uri, path)
            announced = count_frames(path)
        except FileNotFoundError:
            raise InputError(f"video {uri} does not exist; correct its path") from None
        tracker = Tracker()
        every = self.command.every_frames
        for found in find_in_video(path, self.detector, tracker, every=every, announced=announced, seen=self.seen):
            self.last = (found.number, found.seconds)
            self.first = self.first or self.last
            told = {"source": name, "frame": found.number + 1}
            self._cut_frame(out, found, f"{found.number + 1:05d}", told | {"seconds": _told(found.seconds)})
            self.progress(1)
        self.persons = tracker.persons(min_frames=self.command.min_frames)
        if self.command.one_person:
            self.persons = dict.fromkeys(self.persons, 1)

    def _cut_photographs(self, out: RowWriter) -> None:
        for name, image in zip(self.part.sources, self.part.images, strict=True):
            told = {"source": name}
            try:
                uri = storage.join(self.part.root, name)
                picture = read_picture(uri, exif=self.command.exif, max_side=MAX_SCENE_SIDE)
            except BadImage as error:
                if not self.command.skip_bad_images:
                    raise
                self.bad.append([name, str(error)])
                out.add(told | {"video": self.part.video, "why": rows.BAD})
            else:
                if picture.orientation != 1:
                    self.seen.note("turned" if self.command.exif == "apply" else "lying", name)
                self._cut_frame(out, find_in_photograph(picture.pixels, self.detector), image, told)
            self.progress(1)

    def _cut_frame(self, out: RowWriter, found: FoundFrame, image: str, told: dict[str, Any]) -> None:
        told = {"video": self.part.video, **told}
        if not found.faces:
            out.add(told | {"why": rows.NO_FACE})
        largest = max(found.faces, key=_area, default=None)
        place = 0
        for one in found.faces:
            row = told | _describe(one)
            why = self._why_left_out(one, row)
            if why is None and self.command.one_person and one is not largest:
                why = rows.NOT_LARGEST
            if self.part.is_video:
                row["track"] = one.track
            elif why is None:
                place += 1
                row["person"] = place
            if why is None:
                where = row["track" if self.part.is_video else "person"]
                row["image"] = f"{where}/{image}.jpg"
                for view in VIEWS:
                    self._write(view, row["image"], cut_view(found.picture, one, view, most_side=self.command.size))
            out.add(row | {"why": why})

    def _why_left_out(self, one: FoundFace, row: dict[str, Any]) -> str | None:
        if longer_side(one) < self.command.min_face:
            return rows.TOO_SMALL
        return rows.BLURRED if row["sharpness"] < self.command.min_sharpness else None

    def _write(self, view: str, name: str, pixels: np.ndarray) -> None:
        path = self.place / view / name
        if path.parent not in self.made:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.made.add(path.parent)
        pixels = np.ascontiguousarray(pixels)
        quality = self.command.quality
        path.write_bytes(simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="444"))


def _describe(one: FoundFace) -> dict[str, Any]:
    return {
        "box": one.face.box.tolist(),
        "points": one.face.points.ravel().tolist(),
        "confidence": one.face.confidence,
        "sharpness": sharpness(one.aligned),
        "yaw": yaw(one.face.points),
    }


def _area(one: FoundFace) -> float:
    left, top, right, bottom = one.face.box
    return float((right - left) * (bottom - top))


def _told(seconds: float) -> float | None:
    return None if np.isnan(seconds) else round(seconds, 6)


def _finish(task: Task, dest: Path, place: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Move pictures to where they belong, and write the part's file. Returns what there is of it."""
    is_video = task.part.is_video
    is_damaged = is_video and bool(about["bad"])  # and so left out as a whole
    left_out: Counter[str] = Counter()
    faces: Counter[int] = Counter()  # by person
    num_rows = 0
    made: set[Path] = set()
    with RowWriter(place / "part") as out:
        for row in [] if is_damaged else read_rows(place / "rows"):
            num_rows += 1
            if is_video and row["track"] is not None and row["why"] != rows.NOT_LARGEST:
                row["person"] = about["persons"].get(row["track"])
            if row["image"] is not None and row["person"] is None:
                row |= {"image": None, "why": rows.TOO_SHORT}
            elif row["image"] is not None:
                staged, name = row["image"], row["image"].rpartition("/")[2]
                row["image"] = f"{directory_of(task.part.video, row['person'])}/{name}"
                faces[row["person"]] += 1
                for view in VIEWS:
                    path = dest / view / row["image"]
                    if path.parent not in made:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        made.add(path.parent)
                    (place / view / staged).replace(path)
            if row["why"] is not None:
                left_out[row["why"]] += 1
            out.add(row)
        told = {"left_out": dict(left_out), "faces": {str(person): count for person, count in sorted(faces.items())}}
        about = {key: value for key, value in about.items() if key != "persons"} | told | {"rows": num_rows}
        out.tell(about)
    if faces:
        os.sync()  # its file vouches for thousands of pictures, which no power cut may lose
    storage.upload(place / "part", str(dest / PARTS / task.part.name))
    return about


def directory_of(video: str, person: int) -> str:
    """Return the directory of a person's pictures in each view."""
    return video if person == 1 else f"{video}_{person}"


def remove_pictures(dest: Path, name: str, part: Part | None, *, one_person: bool) -> None:
    """Remove the pictures of a part's file, then the file; and what a command that was killed left of the `part`."""
    path = dest / PARTS / name
    for view in VIEWS:
        for image in images_of(path):
            (dest / view / image).unlink(missing_ok=True)
        for directory in _directories(dest / view / part.video, one_person) if part else ():
            files = directory.iterdir() if part.is_video else (directory / f"{image}.jpg" for image in part.images)
            for file in files:
                if file.is_file():
                    file.unlink()
    path.unlink(missing_ok=True)


def _directories(first: Path, one_person: bool) -> list[Path]:
    """Return the directories of all persons of a video."""
    if one_person or not first.parent.is_dir():
        return [first] if first.is_dir() else []
    names = re.compile(f"{re.escape(first.name)}({FURTHER})?")
    return [path for path in first.parent.iterdir() if path.is_dir() and names.fullmatch(path.name)]


def images_of(path: Path) -> Iterator[str]:
    """Yield the names of the pictures of a part's file; of none where it is no whole one."""
    if read_about(path) is not None:
        yield from (row["image"] for row in read_rows(path) if row["image"] is not None)


def has_pictures(dest: Path, name: str, list_names: Callable[[Path], frozenset[str]]) -> bool:
    """Whether the pictures of a part's file are there; `list_names` gives the names in a directory."""
    for image in images_of(dest / PARTS / name):
        directory, _, file = image.rpartition("/")
        if not all(file in list_names(dest / view / directory) for view in VIEWS):
            return False
    return True
