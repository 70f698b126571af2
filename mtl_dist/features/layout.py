"""How a shard of features lies in its tar: a safetensors file and a JSON for every video, none of it by surprise.

Sizes are known before the first feature is, so a shard is laid out first and filled then, in any order. A video's file
has the bytes that safetensors itself would write.
"""

from __future__ import annotations

import json
from typing import BinaryIO, NamedTuple

import numpy as np

from mtl_dist.data.index import FEATURE_BYTES
from mtl_dist.errors import InputError
from mtl_dist.shards import ustar

ALIGNED = 8  # bytes: where arrays of a safetensors file begin
MAX_MEMBER_BYTES = 8**11 - 1  # what eleven octal digits of a tar's header tell


class Video(NamedTuple):
    """A video as two members of a tar."""

    number: int  # in the set
    name: str
    rows: int
    width: int

    @property
    def header(self) -> bytes:
        """What its safetensors file begins with; `frame`, `row` and `feature` follow."""
        integers, end = 8 * self.rows, (16 + FEATURE_BYTES * self.width) * self.rows
        about = {
            "frame": {"dtype": "I64", "shape": [self.rows], "data_offsets": [0, integers]},
            "row": {"dtype": "I64", "shape": [self.rows], "data_offsets": [integers, 2 * integers]},
            "feature": {"dtype": "F16", "shape": [self.rows, self.width], "data_offsets": [2 * integers, end]},
        }
        text = json.dumps(about, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNED)
        return len(text).to_bytes(8, "little") + text

    @property
    def feature_bytes(self) -> int:
        """Bytes of its features."""
        return FEATURE_BYTES * self.width * self.rows

    @property
    def arrays_name(self) -> str:
        """The name of its safetensors file."""
        return f"{self.number:09d}.safetensors"

    @property
    def text_name(self) -> str:
        """The name of its JSON."""
        return f"{self.number:09d}.json"

    @property
    def text(self) -> bytes:
        """Its JSON."""
        return json.dumps({"video": self.name, "rows": self.rows}).encode()

    @property
    def member_bytes(self) -> int:
        """Bytes of its safetensors file. Raises `InputError` for more than a tar's header tells."""
        size = len(self.header) + 16 * self.rows + self.feature_bytes
        if size > MAX_MEMBER_BYTES:
            raise InputError(
                f"video {self.name} has {self.rows} rows: {size} bytes of features, more than the {MAX_MEMBER_BYTES} "
                "that a tar holds of one file; cut the video into several"
            )
        return size

    @property
    def tar_bytes(self) -> int:
        """Bytes of its members in a tar."""
        return sum(ustar.BLOCK + size + -size % ustar.BLOCK for size in (self.member_bytes, len(self.text)))


def lay_out(tar: BinaryIO, videos: list[Video], *, row: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Write a tar of videos with zeros for features; return where each video's features begin, (v,) int64.

    `row` and `frame` (n,) int64, of all videos one behind the other.
    """
    begins, done = [], 0
    for video in videos:
        tar.write(ustar.make_header(video.arrays_name.encode(), video.member_bytes) + video.header)
        of_video = slice(done, done + video.rows)
        for numbers in (frame, row):
            tar.write(numbers[of_video].astype("<i8").tobytes())
        begins.append(tar.tell())
        tar.seek(video.feature_bytes, 1)
        tar.write(ustar.padding(video.member_bytes))
        tar.write(ustar.make_header(video.text_name.encode(), len(video.text)) + video.text)
        tar.write(ustar.padding(len(video.text)))
        done += video.rows
    end = tar.tell() + 2 * ustar.BLOCK
    tar.truncate(end + -end % ustar.RECORD)
    return np.array(begins, np.int64)


def cut(videos: list[Video], *, shard_bytes: int) -> list[tuple[int, int]]:
    """Return the [begin, end) of every shard over videos: about so many bytes, or one video."""
    cuts, begin, size = [], 0, 0
    for place, video in enumerate(videos):
        if place > begin and size + video.tar_bytes > shard_bytes:
            cuts.append((begin, place))
            begin, size = place, 0
        size += video.tar_bytes
    return [*cuts, (begin, len(videos))]
