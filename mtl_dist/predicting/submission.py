"""The challenge's test set: its list of frames without labels, their images, and the file to submit for it.

The list is a header line and one `video/frame.jpg` a line; an image can be listed twice. The submission has the header
`image,valence,arousal,expression,aus` and a line for every line of the list, in its order.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtl_dist import storage
from mtl_dist.data.names import is_image_name
from mtl_dist.errors import InputError, StorageError
from mtl_dist.shards.annotations import HEADER

MAX_LIST_BYTES = 256 << 20
MAX_LISTED = 5  # images in one message


class TestImages(NamedTuple):
    """The images of a test list in one view."""

    __test__ = False  # pytest takes the name for a class of tests

    paths: list[str]  # (n) of every line
    sha256: str  # of paths, sizes and times or ETags: whether predictions of them still hold


def read_test_list(uri: str) -> list[str]:
    """Read the image names of a test list, local or on s3://. Raises `InputError` naming file, line and value."""
    try:
        text = storage.read_bytes(uri, max_bytes=MAX_LIST_BYTES).decode("utf-8-sig")
    except StorageError:  # an OSError too, but the same command may succeed later
        raise
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"test list {uri} cannot be read: {reason}; expected a text file, one video/frame.jpg a line"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"test list {uri} is not UTF-8 text; expected one video/frame.jpg a line") from None
    header, *lines = text.rstrip().splitlines() or [""]
    if is_image_name(header.strip(), num_parts=2):
        raise InputError(
            f"{uri}:1: '{header.strip()}' is where the challenge's lists have a header, so this frame would be lost; "
            f"put a line '{HEADER}' before it"
        )
    if not lines:
        raise InputError(f"test list {uri} names no image; expected a header and one video/frame.jpg a line")
    names = [line.strip() for line in lines]
    for number, name in enumerate(names, start=2):
        if "," in name or not is_image_name(name, num_parts=2):
            raise InputError(f"{uri}:{number}: {name[:100]!r} is no image name; expected 'video/frame.jpg' alone")
    return names


def find_images(root: str, view: str, names: list[str], *, skip_missing: bool = False) -> TestImages:
    """Find `root`/<view>/<name> of every name, on a disk or s3://. Raises `InputError` naming what is not there.

    With `skip_missing` that is an error where it is more than half only: the directory is probably the wrong one.
    """
    directory = storage.join(root, view)
    if storage.is_s3(root):
        stored = storage.list_versions(directory)
        about = [stored.get(name) for name in names]
    else:
        directory = str(storage.local_path(directory).absolute())
        about = [_stat(Path(directory, name)) for name in names]
    missing = list(dict.fromkeys(name for name, found in zip(names, about) if found is None))
    if missing and not (skip_missing and 2 * len(missing) <= len(set(names))):
        listed = ", ".join(missing[:MAX_LISTED])
        more = f" and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
        raise InputError(
            f"{len(missing)} of {len(set(names))} listed images are not in {directory}: {listed}{more}; correct "
            "--test-root, or restore them"
            + ("" if skip_missing else ", or go without pictures of a few frames with --skip-bad-images")
        )
    paths = [storage.join(directory, name) for name in names]
    return TestImages(paths, hashlib.sha256(json.dumps([paths, about]).encode()).hexdigest())


def submission_text(names: list[str], va: np.ndarray, expr: np.ndarray, au_on: np.ndarray) -> str:
    """Return the submission file: names (n), va (n, 2), expressions (n,) by number, AUs (n, 12) on or off."""
    va = va.clip(-1, 1).round(4) + 0.0  # no -0.0000
    lines = [HEADER]
    for name, (valence, arousal), expression, aus in zip(names, va, expr, au_on.astype(int)):
        lines.append(f"{name},{valence:.4f},{arousal:.4f},{expression},{','.join(map(str, aus))}")
    return "\n".join(lines) + "\n"


def _stat(path: Path) -> tuple[int, int] | None:
    try:
        about = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError:
        raise InputError(
            f"image {path} may not be looked up by this user; change the permissions of the directories it is in"
        ) from None
    return (about.st_size, about.st_mtime_ns) if stat.S_ISREG(about.st_mode) else None
