"""Headers of tar members, as `tarfile` writes them, at a twentieth of its time: a shard is made of thousands."""

from __future__ import annotations

import tarfile

BLOCK = 512  # bytes: headers are one, contents are padded to a multiple
RECORD = 20 * BLOCK  # an archive is padded to a multiple, and ends with at least two empty blocks
_SIZE, _CHECKSUM = slice(124, 135), slice(148, 156)


def _make_template() -> bytearray:
    member = tarfile.TarInfo()  # mtime, uid and gid stay 0: equal input gives equal bytes
    member.mode = 0o444
    return bytearray(member.tobuf(tarfile.USTAR_FORMAT))


_TEMPLATE = _make_template()
_TEMPLATE_SUM = int(_TEMPLATE[_CHECKSUM.start : _CHECKSUM.start + 6], 8) - sum(_TEMPLATE[_SIZE])


def make_header(name: bytes, size: int) -> bytearray:
    """Return the header (512,) of a regular file of `size` bytes; `name` has at most 100 bytes."""
    header = _TEMPLATE.copy()
    digits = b"%011o" % size
    header[: len(name)] = name
    header[_SIZE] = digits
    header[_CHECKSUM] = b"%06o\0 " % (_TEMPLATE_SUM + sum(name) + sum(digits))
    return header


def padding(size: int, multiple: int = BLOCK) -> bytes:
    """Return the zeros that follow `size` bytes up to the next multiple."""
    return bytes(-size % multiple)
