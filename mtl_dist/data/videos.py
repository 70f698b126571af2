"""Videos as batches without labels, and as whole frames: which stream is the moving picture, and how to show it.

A frame is shown as a player shows it: cropped, stretched by its sample aspect ratio, mirrored and turned, and on black
where it is transparent. Its colours follow the matrix and range that it names; without a name BT.601, limited, as in
FFmpeg. Three things are not done, and a note says so: fields of interlaced video are not separated, HDR is not mapped
to the tones of a screen, and the alpha of VP8 and VP9 is not read.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mtl_dist.data.decode import MAX_SIDE, flatten, resize, turn
from mtl_dist.data.frames import LARGEST, Seen
from mtl_dist.errors import InputError
from mtl_dist.tasks import Batch

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

VIDEO_SUFFIXES = (
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm",
    ".wmv",
)  # fmt: skip
STATED_DURATION = ("matroska", "mov")  # formats whose duration is the header's: that of others may be estimated
MAX_MISSING, MAX_MISSING_S = 0.1, 1.0  # at the end of a whole video, of its duration and in seconds
MAX_MISSING_FRAMES = 2  # or MAX_MISSING of them: packets that decoders give no picture for
MAX_SHEAR = 0.0175  # of a display matrix beside its nearest quarter turn: one degree
HDR = {16: "PQ", 18: "HLG"}  # by transfer characteristic
# Two pictures in one frame, by AVStereo3DType. Frames in turns (3) are decoded as one eye's.
STEREO = {1: "side by side", 2: "one above the other", 4: "a checkerboard", 5: "side by side", 6: "lines", 7: "columns"}
_GET_WHOLE = "get the whole file, or write what is left to a new one: ffmpeg -fflags +discardcorrupt -i OLD -c copy NEW"


class Crop(NamedTuple):
    """Pixels to take off, as a container says beside what the codec does."""

    left: int  # in the order in which FFmpeg prints them
    right: int
    top: int
    bottom: int


class ShownFrame(NamedTuple):
    """A whole frame as a player shows it."""

    number: int  # from 0: its place among all frames
    seconds: float  # from where the container starts; NaN: not told
    pixels: np.ndarray  # (H, W, 3) uint8 RGB


class _Opened(NamedTuple):
    container: InputContainer
    stream: VideoStream
    crop: Crop


def video_batches(
    path: Path,
    *,
    batch: int,
    size: int,
    every: int = 1,
    announced: int = 0,
    part: int = 0,
    num_parts: int = 1,
    first_row: int = 0,
    seen: Seen | None = None,
) -> Iterator[Batch]:
    """Yield every so many frames of a local video's moving picture as unlabelled batches, in their order.

    Of a frame as a player shows it the middle square is cut out and resized to `size`. Rows are frame numbers from
    `first_row`. Every part decodes the whole video, since seeking does not find frames by number, and converts its
    batches only (as `image_batches` parts them). Raises `InputError` naming a file that is no video, or is damaged, and
    where, or of whose `announced` frames (`count_frames`) too many are not there.
    """
    from mtl_dist.data.unlabelled import batched  # torch and all, which who only wants frames does not wait for

    seen = Seen() if seen is None else seen
    numbers = count(first_row, every)
    wanted = (
        (number, shown)
        for place, (number, shown) in enumerate(zip(numbers, islice(_frames(path, announced, seen), 0, None, every)))
        if place // batch % num_parts == part
    )

    def pictures() -> Iterator[tuple[int, np.ndarray]]:
        for number, (frame, shape, seconds) in wanted:
            seen.seconds[number] = seconds
            pixels, middle = show(frame, size, crop=shape.crop, aspect=shape.aspect, path=path)
            if min(frame.width, frame.height) > LARGEST * size:
                seen.note("large", f"{path.name}, {frame.width} x {frame.height}")
            if middle:
                seen.note("middle", f"{path.name}, {middle}")
            yield number, pixels

    yield from batched(pictures(), batch=batch)


def whole_frames(path: Path, *, every: int = 1, announced: int = 0, seen: Seen | None = None) -> Iterator[ShownFrame]:
    """Yield every so many frames of a local video as a player shows them, one after the other.

    Raises `InputError` as `video_batches` does; the frames before a damage were yielded by then.
    """
    seen = Seen() if seen is None else seen
    for number, (frame, shape, seconds) in enumerate(_frames(path, announced, seen)):
        if number % every == 0:
            yield ShownFrame(number, seconds, show_whole(frame, crop=shape.crop, aspect=shape.aspect, path=path))


def count_frames(path: Path) -> int:
    """Count the frames of a video by its packets, without decoding it.

    Not as the header says: an MP4's tells also of frames that its edit list hides. Raises `InputError`, also where
    packets end long before the duration that the header states, or in the middle of one: an MP4 or Matroska file that
    was cut short plays like a whole one.
    """
    num_frames, end_s = 0, 0.0
    with _open_video(path) as (container, stream, _):
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


def show(frame: VideoFrame, size: int, *, crop: Crop, aspect: float, path: Path) -> tuple[np.ndarray, str]:
    """Return the middle square of a frame as a player shows it, (size, size, 3) RGB; and in words what was cut away.

    `aspect` is the width of a stored pixel by its height.
    """
    turned = _turn_of(frame, path)
    pixels = _cropped(frame, crop)
    height, width = pixels.shape[:2]
    wide, high = _on_screen(width, height, aspect)
    side = min(wide, high)
    sides = max(1, round(height * side / high)), max(1, round(width * side / wide))
    top, left = (height - sides[0]) // 2, (width - sides[1]) // 2
    square = np.ascontiguousarray(turn(pixels[top : top + sides[0], left : left + sides[1]], *turned))
    if turned[0]:
        wide, high = high, wide
    middle = f"{wide:.0f} x {high:.0f}" if sides != (height, width) else ""
    return (square if square.shape[:2] == (size, size) else resize(square, size)), middle


def show_whole(frame: VideoFrame, *, crop: Crop, aspect: float, path: Path) -> np.ndarray:
    """Return a frame as a player shows it, (H, W, 3) RGB, at most `MAX_SIDE` a side; `aspect` is that of `show`."""
    turned = _turn_of(frame, path)
    pixels = _cropped(frame, crop)
    wide, high = _on_screen(pixels.shape[1], pixels.shape[0], aspect)
    less = min(1.0, MAX_SIDE / max(wide, high))
    sides = max(1, round(high * less)), max(1, round(wide * less))
    return np.ascontiguousarray(turn(pixels if pixels.shape[:2] == sides else resize(pixels, sides), *turned))


def _cropped(frame: VideoFrame, crop: Crop) -> np.ndarray:
    """Return the stored pixels of a frame, (H, W, 3) RGB, without what the container takes off."""
    if any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8":
        pixels = flatten(frame.to_ndarray(format="rgba"))
    else:
        pixels = frame.to_ndarray(format="rgb24")
    if crop.top + crop.bottom < frame.height and crop.left + crop.right < frame.width:
        pixels = pixels[crop.top : frame.height - crop.bottom, crop.left : frame.width - crop.right]
    return pixels


def _on_screen(width: int, height: int, aspect: float) -> tuple[float, float]:
    """Return how wide and high stored pixels are shown: stretched, never shrunk."""
    return (width * aspect, height) if aspect >= 1 else (width, height / aspect)


class _Shape(NamedTuple):
    crop: Crop
    aspect: float


@contextlib.contextmanager
def _open_video(path: Path) -> Iterator[_Opened]:
    """Open a video; what goes wrong in the block is an `InputError` that names the file."""
    try:
        import av
    except ImportError:
        raise InputError("reading videos needs PyAV, which is not installed: pip install 'mtl_dist[video]'") from None
    try:
        # Of a relative path FFmpeg takes what is before a colon for a protocol.
        with av.open(str(path.absolute()), metadata_errors="replace") as container:
            stream = _moving_picture(container, path)
            yield _Opened(container, stream, _stated_crop(container, stream.index))
    except av.error.FFmpegError as error:
        raise InputError(
            f"video {path} cannot be read: {error.strerror}; mend it, or convert it to H.264 MP4"
        ) from None


def _moving_picture(container: InputContainer, path: Path) -> VideoStream:
    """Choose a stream: no cover art, thumbnails or stills; the default, else the largest, else the first."""
    from av.stream import Disposition as Kind

    streams = container.streams.video
    if not streams:
        raise InputError(f"{path} holds no pictures, only {len(container.streams)} other stream(s)")
    still = Kind.attached_pic | Kind.timed_thumbnails | Kind.still_image | Kind.dependent
    moving = [stream for stream in streams if not stream.disposition & still]
    if not moving:
        raise InputError(f"{path} holds no moving picture, only {len(streams)} still one(s), such as cover art")
    return max(moving, key=lambda stream: (bool(stream.disposition & Kind.default), stream.width * stream.height))


def _stated_crop(container: InputContainer, index: int) -> Crop:
    """Return what Matroska's PixelCrop or MP4's clean aperture takes off: PyAV has it in FFmpeg's words only."""
    from av import logging

    level = logging.get_level()
    logging.set_level(logging.INFO)
    try:
        told = container.dumps_format()
    finally:
        logging.set_level(level)
    streams = dict(zip(*[iter(re.split(r"^  Stream #0:(\d+)", told, flags=re.MULTILINE)[1:])] * 2))
    found = re.search(r"^      Frame Cropping: (\d+)/(\d+)/(\d+)/(\d+)$", streams.get(str(index), ""), re.MULTILINE)
    return Crop(*map(int, found.groups())) if found else Crop(0, 0, 0, 0)


def _frames(path: Path, announced: int, seen: Seen) -> Iterator[tuple[VideoFrame, _Shape, float]]:
    """Yield every frame with its crop and aspect, and its seconds from where the container starts (NaN: not told)."""
    number = 0
    with _open_video(path) as (container, stream, crop):
        from av.error import FFmpegError

        stream.thread_type = "AUTO"
        start_s = (container.start_time or 0) / 1e6
        aspect = float(stream.sample_aspect_ratio or 1) or 1.0
        _note_stream(container, stream, path, seen)
        try:
            for frame in container.decode(stream):
                if max(frame.width, frame.height) > MAX_SIDE:
                    size = f"{frame.width} x {frame.height}"
                    raise InputError(f"video {path} has {size} pixels; at most {MAX_SIDE} a side are decoded")
                if frame.is_corrupt:
                    raise InputError(f"video {path} is damaged at frame {number + 1}; mend it, or cut it before")
                if number == 0:
                    _note_first(frame, stream, path, seen)
                if frame.interlaced_frame:
                    seen.note_video("interlaced", path.name)
                yield frame, _Shape(crop, aspect), float("nan") if frame.pts is None else frame.time - start_s
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


def _note_stream(container: InputContainer, stream: VideoStream, path: Path, seen: Seen) -> None:
    if (streams := len(container.streams.video)) > 1:
        about = f"{path.name}: number {stream.index} of {streams}, {stream.width} x {stream.height}"
        seen.note_video("streams", about)
    if stream.metadata.get("alpha_mode", stream.metadata.get("ALPHA_MODE")) == "1":
        seen.note_video("alpha", path.name)


def _note_first(frame: VideoFrame, stream: VideoStream, path: Path, seen: Seen) -> None:
    if stream.color_trc in HDR:
        seen.note_video("hdr", f"{path.name}, {HDR[stream.color_trc]}")
    data = _side_data(frame, "STEREO3D")
    packing = struct.unpack_from("=i", data)[0] if data else 0
    if packing in STEREO:
        raise InputError(
            f"video {path} holds two pictures in each frame, {STEREO[packing]} (stereo 3D), and one is expected; cut "
            "one out: ffmpeg -i OLD -vf stereo3d=sbsl:ml NEW (sbsl: side by side, abl: one above the other)"
        )


def _turn_of(frame: VideoFrame, path: Path) -> tuple[bool, bool, bool]:
    """Return how the display matrix says to show a frame: axes swapped, mirrored left and right, and up and down."""
    data = _side_data(frame, "DISPLAYMATRIX")
    if not data:
        return False, False, False
    a, b, _, c, d, *_ = struct.unpack("=9i", data)  # a pixel at (x, y) is shown at (a x + c y, b x + d y)
    swap = abs(a) + abs(d) < abs(b) + abs(c)
    main, other = ((b, c), (a, d)) if swap else ((a, d), (b, c))
    if not any((a, b, c, d)):
        return False, False, False  # players take no notice of it
    if max(map(abs, other)) > MAX_SHEAR * min(map(abs, main)):
        raise InputError(
            f"video {path} says that it is turned or sheared by no quarter turn (display matrix {[a, b, c, d]}); "
            "convert it first: ffmpeg -i OLD NEW.mp4"
        )
    return (True, c < 0, b < 0) if swap else (False, a < 0, d < 0)


def _side_data(frame: VideoFrame, kind: str) -> bytes:
    return next((bytes(data) for data in frame.side_data if data.type.name == kind), b"")
