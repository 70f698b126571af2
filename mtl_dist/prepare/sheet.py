"""Draw a contact sheet of what was cut out: a line a person, a few of their pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mtl_dist.prepare.part import directory_of

MAX_PERSONS, MAX_SHOWN = 40, 10
SIDE, GAP, MARGIN, HEAD, LABEL = 96, 8, 20, 44, 190
INK, FAINT, PAPER = (32, 34, 38), (120, 124, 132), (255, 255, 255)


class Sheet:
    """Remembers a few pictures of each of the first persons, evenly over all that come."""

    def __init__(self) -> None:
        self._persons: dict[str, _Person] = {}
        self._of_videos: set[str] = set()
        self.sources: set[str] = set()  # that have a face, as have
        self.videos: set[str] = set()  # these
        self.num_faces = self.num_of_videos = 0  # faces

    def add(self, row: dict[str, Any]) -> None:
        """Take the row of a face; those of a part come together."""
        self.num_faces += 1
        name = directory_of(row["video"], row["person"])
        if name not in self._persons:
            self._persons[name] = _Person(is_shown=len(self._persons) < MAX_PERSONS)
        self._persons[name].add(row)
        self.sources.add(row["source"])
        self.videos.add(row["video"])
        if row["frame"] is not None:
            self.num_of_videos += 1
            self._of_videos.add(name)

    def draw(self, dest: Path, title: str) -> bytes:
        """Return a PNG of the pictures of `cropped_aligned`."""
        shown = {name: person for name, person in self._persons.items() if person.is_shown}
        width = 2 * MARGIN + LABEL + MAX_SHOWN * (SIDE + GAP) - GAP
        height = HEAD + MARGIN + max(len(shown), 1) * (SIDE + GAP)
        sheet = Image.new("RGB", (width, height), PAPER)
        draw = ImageDraw.Draw(sheet)
        more = f"; the first {len(shown)} of {len(self._persons):,} lines" if len(shown) < len(self._persons) else ""
        persons = f" of {counted(self.num_persons, 'person')}" if self.num_of_videos == self.num_faces else ""
        _text(draw, (MARGIN, 12), f"{title}: {counted(self.num_faces, 'face')}{persons}{more}", INK, 17)
        for line, (name, person) in enumerate(shown.items()):
            top = HEAD + line * (SIDE + GAP)
            _text(draw, (MARGIN, top + 20), name, INK, 14)
            _text(draw, (MARGIN, top + 40), person.told(), FAINT, 12)
            for column, image in enumerate(person.chosen()):
                with Image.open(dest / "cropped_aligned" / image) as face:
                    left = MARGIN + LABEL + column * (SIDE + GAP)
                    sheet.paste(face.resize((SIDE, SIDE), Image.Resampling.BILINEAR), (left, top))
        data = io.BytesIO()
        sheet.save(data, "PNG")
        return data.getvalue()

    @property
    def num_persons(self) -> int:
        """The number of persons of videos; of photographs nobody knows who is the same."""
        return len(self._of_videos)

    @property
    def directories(self) -> list[str]:
        """The directories that have a face, in either view."""
        return list(self._persons)


def counted(count: int, what: str) -> str:
    """Say a number of things."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


class _Person:
    def __init__(self, is_shown: bool):
        self.is_shown, self.count, self._every, self._images = is_shown, 0, 1, []
        self.first_s = self.last_s = None

    def add(self, row: dict[str, Any]) -> None:
        if self.is_shown and self.count % self._every == 0:
            self._images.append(row["image"])
            if len(self._images) > 2 * MAX_SHOWN:  # every other one, from now on too
                self._images, self._every = self._images[::2], 2 * self._every
        self.count += 1
        self.first_s = row["seconds"] if self.first_s is None else self.first_s
        self.last_s = row["seconds"]

    def chosen(self) -> list[str]:
        places = range(min(len(self._images), MAX_SHOWN))
        return [self._images[place * len(self._images) // max(len(places), 1)] for place in places]

    def told(self) -> str:
        where = (
            "" if self.first_s is None or self.last_s is None else f", {_time(self.first_s)} to {_time(self.last_s)}"
        )
        return f"{counted(self.count, 'face')}{where}"


def _time(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _text(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, ink: tuple[int, int, int], size: int) -> None:
    font = ImageFont.load_default(size=size)
    room = LABEL - 8 if size < 17 else 10_000
    while len(text) > 8 and draw.textlength(text, font) > room:
        text = f"...{text[4:]}"
    draw.text(place, text, ink, font)
