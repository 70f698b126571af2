"""Frames that lie in several views, as s-Aff-Wild2 has them: `<root>/<view>/<name>`, one name in all views."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mtl_dist import storage
from mtl_dist.data.decode import Exif
from mtl_dist.data.index import INDEX_NAME
from mtl_dist.errors import InputError
from mtl_dist.predicting.inputs import ImageFiles, open_frames, parent_uri

NUM_NAMED = 5  # frames in one message


@dataclass(frozen=True)
class Views:
    """The same frames in each view, rows alike; each is read on its own."""

    of: dict[str, ImageFiles]  # by view, all with the same names

    @property
    def num_frames(self) -> int:
        return len(self.listed)

    @property
    def listed(self) -> tuple[str, ...]:
        return self._first.listed

    @property
    def left_out(self) -> tuple[str, ...]:
        return self._first.left_out

    def names(self, rows: np.ndarray) -> list[str]:
        return self._first.names(rows)

    def skipped(self, rows: np.ndarray) -> list[int]:
        """Return the rows that are not among those that were read in any view."""
        return self._first.skipped(rows)

    def why_bad(self, row: int) -> str:
        """Read an image of the first view once more, and return what is wrong with it."""
        return self._first.why_bad(row)

    @property
    def _first(self) -> ImageFiles:
        return next(iter(self.of.values()))


def open_views(
    uri: str, runs: Mapping[str, str], *, images: str | None = None, skip_bad: bool, exif: Exif, scratch: Path
) -> Views:
    """Find the images of a directory with a directory for each view, or of a list (.txt). Raises `InputError`.

    Args:
        uri: the directory, or the list, whose names are the same for all views.
        runs: a run of each view, to be named in messages.
        images: where the directories of a list's views are; None: beside the list.
        skip_bad: go on with frames that are not in every view, or cannot be decoded in one: the others have them.
        exif: as `open_frames` takes it.
        scratch: as `open_frames` takes it.
    """
    if not storage.is_s3(uri) and not storage.local_path(uri).exists():
        raise InputError(f"--input {uri} does not exist; correct the path")
    is_list = uri.lower().endswith(".txt")
    root = (images if images is not None else parent_uri(uri)) if is_list else uri
    found: dict[str, ImageFiles] = {}
    stored: dict[str, set[str]] = {}
    for view in runs:
        own = storage.join(root, view)
        stored[view] = {file.name for file in storage.list_objects(own, follow_links=True)}
        if not stored[view] or INDEX_NAME in stored[view]:
            raise InputError(_no_directories(uri, root, runs))
        frames = open_frames(
            uri if is_list else own, images=own if is_list else images, skip_bad=True, exif=exif, scratch=scratch
        )
        if not isinstance(frames, ImageFiles):
            raise InputError(_no_directories(uri, root, runs))
        found[view] = frames
    listed = tuple(sorted({name for files in found.values() for name in files.listed}))
    if is_list:
        listed = next(iter(found.values())).listed
    partial = [name for name in dict.fromkeys(listed) if not all(name in names for names in stored.values())]
    if partial and not (skip_bad and len(partial) < len(set(listed))):
        named = ", ".join(partial[:NUM_NAMED]) + (", ..." if len(partial) > NUM_NAMED else "")
        raise InputError(
            f"{len(partial)} of {len(set(listed))} pictures are not in each of {_quoted(runs)} below {root}: {named}; "
            "give a frame one name in all views, or go without some of its views with --skip-bad-images: the models "
            "of the others decide"
        )
    return Views({view: replace(files, listed=listed, skip_bad=skip_bad) for view, files in found.items()})


def _no_directories(uri: str, root: str, runs: Mapping[str, str]) -> str:
    named = " and ".join(
        f"{run}, of view '{view}'" + ("," if view != list(runs)[-1] else "") for view, run in runs.items()
    )
    return (
        f"--runs names {named}; expected of --input {uri} the same pictures in {_quoted(runs)} below {root}, or whole "
        "pictures or videos with --faces; or predict with each view's runs apart (python -m mtl_dist.ensemble combines "
        "views of shard sets)"
    )


def _quoted(views: Iterable[str]) -> str:
    return " and ".join(f"{view}/" for view in views)
