"""Pictures that are in no shard set, as batches without labels: image files, and the frames of a video."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from mtl_dist import storage
from mtl_dist.data.decode import KINDS, MAX_IMAGE_BYTES, MAX_SIDE, DecodeError, ForeignPicture, decode_picture, resize
from mtl_dist.errors import InputError
from mtl_dist.tasks import NUM_AUS, Batch, Labels

if TYPE_CHECKING:
    from av import VideoFrame

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
STATED_DURATION = ("matroska", "mov")  # formats whose duration is the header's: that of others may be estimated
MAX_MISSING, MAX_MISSING_S = 0.1, 1.0  # at the end of a whole video, of its duration and in seconds
MAX_MISSING_FRAMES = 2  # or MAX_MISSING of them: packets that decoders give no picture for
_GET_WHOLE = "get the whole file, or write what is left to a new one: ffmpeg -fflags +discardcorrupt -i OLD -c copy NEW"


class BadImage(InputError):
    """A picture that is not there or cannot be decoded; not one that a store refuses, or this user may not read."""


def image_batches(
    paths: Sequence[Path | str],
    *,
    batch: int,
    size: int,
    workers: int = 1,
    part: int = 0,
    num_parts: int = 1,
    skip_bad: bool = False,
) -> Iterator[Batch]:
    """Yield image files (local or s3://) as unlabelled batches of `size` pixels a side, in their order.

    Rows are places in `paths`. Of several parts, part p has batches p, p + num_parts, ...: the same batches, whatever
    the number of parts. `workers` threads decode; 0 decodes in this one. Raises `InputError` naming the file; with
    `skip_bad` the row of a `BadImage` is in no batch.
    """
    rows = [row for row in range(len(paths)) if row // batch % num_parts == part]
    read = _read_if_good if skip_bad else read_image
    pictures = _ahead(read, (paths[row] for row in rows), size, workers=workers, ahead=2 * batch)
    yield from _batched(((row, pixels) for row, pixels in zip(rows, pictures) if pixels is not None), batch=batch)


def video_batches(
    path: Path, *, batch: int, size: int, every: int = 1, announced: int = 0, part: int = 0, num_parts: int = 1
) -> Iterator[Batch]:
    """Yield every so many frames of a local video's first picture stream as unlabelled batches, in their order.

    A frame is turned as the file says, its middle square cut out and resized to `size`. Rows are frame numbers from 0.
    Every part decodes the whole video, since seeking does not find frames by number, and converts its batches only (as
    `image_batches` parts them). Raises `InputError` naming a file that is no video, or is damaged, and where, or of
    whose `announced` frames (`count_frames`) too many are not there.
    """
    numbers = count(0, every)
    wanted = (
        (number, frame)
        for place, (number, frame) in enumerate(zip(numbers, islice(_frames(path, announced), 0, None, every)))
        if place // batch % num_parts == part
    )
    yield from _batched(((number, _square(frame, size)) for number, frame in wanted), batch=batch)


def count_frames(path: Path) -> int:
    """Count the frames of a video by its packets, without decoding it.

    Not as the header says: an MP4's tells also of frames that its edit list hides. Raises `InputError`, also where
    packets end long before the duration that the header states, or in the middle of one: an MP4 or Matroska file that
    was cut short plays like a whole one.
    """
    num_frames, end_s = 0, 0.0
    with _open_video(path) as (container, stream):
        for packet in container.demux():  # every stream: sound may well last longer than pictures
            if packet.stream_index == stream.index:
                if packet.is_corrupt:
                    of = f" of {stream.frames}" if stream.frames else ""
                    raise InputError(f"video {path} is cut short or damaged after frame {num_frames}{of}; {_GET_WHOLE}")
                num_frames += packet.size > 0 and not packet.is_discard
            if packet.size and packet.pts is not None:
                end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        is_stated = container.format.name.startswith(STATED_DURATION) and container.duration
        stated_s = container.duration / 1e6 if is_stated else 0.0
    # Times, not counts: the frame rate of a video can vary.
    if stated_s - end_s > max(MAX_MISSING_S, MAX_MISSING * stated_s):
        raise InputError(
            f"video {path} is cut short: its header says {stated_s:.1f} s, and it ends after {end_s:.1f} s; "
            f"{_GET_WHOLE}"
        )
    return num_frames


def read_image(path: Path | str, size: int | None = None) -> np.ndarray:
    """Read a picture file, local or s3://, as (H, W, 3) uint8 RGB, resized where a size is given.

    Pixels are taken as they are stored, as those of shards are: EXIF orientation is not applied. Raises `BadImage`
    naming a file that is not there or cannot be decoded, `InputError` naming one that may not be read.
    """
    try:
        data = storage.read_bytes(str(path), max_bytes=MAX_IMAGE_BYTES)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise BadImage(f"image {path} does not exist; correct its path, or take it out of the list") from None
    try:
        return decode_picture(data, size, exif="ignore").pixels
    except ForeignPicture as error:  # not left out as bad: it may well be whole
        raise InputError(f"image {path} is not read: {error}; expected a {KINDS}") from None
    except DecodeError as error:
        raise BadImage(f"image {path} cannot be decoded: {error}; mend it, or leave it out") from None


@contextlib.contextmanager
def _open_video(path: Path):
    """Give (container, stream); what goes wrong in the block is an `InputError` that names the file."""
    try:
        import av
    except ImportError:
        raise InputError("reading videos needs PyAV, which is not installed: pip install 'mtl_dist[video]'") from None
    try:
        # Of a relative path FFmpeg takes what is before a colon for a protocol.
        with av.open(str(path.absolute()), metadata_errors="replace") as container:
            if not container.streams.video:
                raise InputError(f"{path} holds no pictures, only {len(container.streams)} other stream(s)")
            yield container, container.streams.video[0]
    except av.error.FFmpegError as error:
        raise InputError(
            f"video {path} cannot be read: {error.strerror}; mend it, or convert it to H.264 MP4"
        ) from None


def _frames(path: Path, announced: int) -> Iterator[VideoFrame]:
    number = 0
    with _open_video(path) as (container, stream):
        from av.error import FFmpegError

        stream.thread_type = "AUTO"
        try:
            for frame in container.decode(stream):
                if max(frame.width, frame.height) > MAX_SIDE:
                    size = f"{frame.width} x {frame.height}"
                    raise InputError(f"video {path} has {size} pixels; at most {MAX_SIDE} a side are decoded")
                if frame.is_corrupt:
                    raise InputError(f"video {path} is damaged at frame {number + 1}; mend it, or cut it before")
                yield frame
                number += 1
        except FFmpegError as error:
            where = f"after frame {number} ({error.strerror})"
            raise InputError(f"video {path} is damaged {where}; mend it, or cut it there") from None
    if number == 0:
        raise InputError(f"video {path} holds no frame; is it a whole file?")
    if announced - number > max(MAX_MISSING_FRAMES, MAX_MISSING * announced):
        raise InputError(
            f"video {path} has {announced} frames, and {number} could be decoded; get the whole file, or convert it to "
            "H.264 MP4: ffmpeg -i OLD NEW.mp4"
        )


def _square(frame: VideoFrame, size: int) -> np.ndarray:
    """Return a frame's middle square as (size, size, 3) RGB, turned as its display matrix says."""
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    square = np.ascontiguousarray(pixels[top : top + side, left : left + side])
    return square if side == size else resize(square, size)


def _read_if_good(path: Path | str, size: int) -> np.ndarray | None:
    try:
        return read_image(path, size)
    except BadImage:
        return None


def _ahead(
    read: Callable[[Path | str, int], np.ndarray | None],
    paths: Iterable[Path | str],
    size: int,
    *,
    workers: int,
    ahead: int,
) -> Iterator[np.ndarray | None]:
    """Read in order, at most `ahead` images before they are taken."""
    if workers == 0:
        yield from (read(path, size) for path in paths)
        return
    pending: deque[Future[np.ndarray | None]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="images") as pool:
        try:
            for path in paths:
                pending.append(pool.submit(read, path, size))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _batched(pictures: Iterable[tuple[int, np.ndarray]], *, batch: int) -> Iterator[Batch]:
    """Stack (row, (S, S, 3) pixels) into batches without labels; the last is smaller."""
    pictures = iter(pictures)
    while taken := list(islice(pictures, batch)):
        yield unlabelled(np.stack([pixels for _, pixels in taken]), [row for row, _ in taken])


def unlabelled(pixels: np.ndarray, rows: Sequence[int]) -> Batch:
    """Return (n, H, W, 3) uint8 pixels as a batch without labels."""
    n = len(pixels)
    labels = Labels(
        va=torch.zeros(n, 1, 2),
        expr=torch.zeros(n, 1, dtype=torch.int64),
        au=torch.zeros(n, 1, NUM_AUS),
        va_mask=torch.zeros(n, 1, dtype=torch.bool),
        expr_mask=torch.zeros(n, 1, dtype=torch.bool),
        au_mask=torch.zeros(n, 1, NUM_AUS, dtype=torch.bool),
    )
    inputs = torch.from_numpy(pixels.transpose(0, 3, 1, 2)[:, None])
    return Batch(inputs, torch.ones(n, dtype=torch.int64), labels, torch.tensor(rows, dtype=torch.int64)[:, None])
