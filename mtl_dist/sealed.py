"""JSON that decides something carries its own sha256: a flipped bit is found when it is read.

The checksum is of the content as parsed, so that other spaces, or another order of keys, are no damage. A checksum
proves that nothing broke, not who wrote it: what is read is still checked for what it says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from mtl_dist.errors import Damaged
from mtl_dist.parsing import parse_object

SEAL = "sha256"  # the key


def seal(content: dict[str, Any]) -> bytes:
    """Serialise with a checksum of the content."""
    assert SEAL not in content
    digest = _digest(json.loads(json.dumps(content, allow_nan=False)))
    return json.dumps({**content, SEAL: digest}, indent=1).encode() + b"\n"


def unseal(data: bytes, *, unsealed: Iterable[str] = ()) -> dict[str, Any]:
    """Return the content. Raises `Damaged` with the reason where it is damaged, or no object of JSON.

    `unsealed` are the keys that files of before they were sealed may have. One with another key is damaged: that key
    may be what is left of the checksum's.
    """
    content = parse_object(data)
    claimed = content.pop(SEAL, None)
    if claimed is None and content.keys() <= set(unsealed):
        return content
    if claimed != _digest(content):
        raise Damaged("its checksum does not match its content")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
