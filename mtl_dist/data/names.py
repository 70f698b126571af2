"""Names of images: relative paths that stay below their directory, printable and short."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MAX_NAME_BYTES = 255
# A part of a name that needs no second look (RE2): printable ASCII without slashes, and no dot in front.
PLAIN_PART = r"[!-\-0-\[\]-~][ -.0-\[\]-~]*"


def is_image_name(name: str, *, num_parts: int | None = None) -> bool:
    """Whether a name is a relative path, '/' between its parts, that stays below its directory, printable and short."""
    parts = name.split("/")
    return (
        not {"", ".", ".."} & set(parts)
        and "\\" not in name
        and name.isprintable()
        and len(name.encode()) <= MAX_NAME_BYTES
        and num_parts in (None, len(parts))
    )


def plain_names(names: pa.Array) -> pa.Array:
    """Return names without './' in front: what `find` and others write."""
    return pc.replace_substring_regex(names, pattern=r"^(\./)+", replacement="")


def why_no_name(name: str) -> str:
    """Say the likely cause of a name that `is_image_name` refuses; empty where there is none to guess."""
    if "://" in name:
        return "a URL is not fetched: download the pictures, and name their paths"
    if "\\" in name:
        return "parts are separated by '/'"
    if name.startswith("/"):
        return "an absolute path: name it from the directory of images"
    return ""


def other_form(name: str, exists: Callable[[str], bool]) -> str:
    """Say that a missing file is there under a name that looks the same, of other Unicode; empty where it is not."""
    for form in ("NFC", "NFD"):
        if (other := unicodedata.normalize(form, name)) != name and exists(other):
            return f"; '{name}' is there in another Unicode form ({form}): write list and file names in the same one"
    return ""


def find_bad_name(names: pa.Array, *, num_parts: int | None = None) -> int | None:
    """Return the place of the first name that `is_image_name` refuses; None where all are good."""
    repeat = "*" if num_parts is None else f"{{{num_parts - 1}}}"
    is_plain = pc.match_substring_regex(names, f"^({PLAIN_PART}/){repeat}{PLAIN_PART}$")
    is_plain = pc.and_(is_plain, pc.less_equal(pc.binary_length(names), MAX_NAME_BYTES))
    for place in np.flatnonzero(~is_plain.to_numpy(zero_copy_only=False)):
        if not is_image_name(names[place].as_py(), num_parts=num_parts):
            return int(place)
    return None
