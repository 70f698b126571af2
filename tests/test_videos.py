"""How a container says to show its frames, and which of its streams is the moving picture."""

from __future__ import annotations

import shutil
import struct
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from mtl_dist.data.decode import resize
from mtl_dist.data.frames import Seen
from mtl_dist.data.videos import count_frames, video_batches, whole_frames
from mtl_dist.errors import InputError

ONE = 1 << 16  # of a display matrix
SIZE = 64
# a, b, c, d of a display matrix, and what it does to a picture.
TURNS = {
    "upright": ((1, 0, 0, 1), lambda p: p),
    "mirrored left and right": ((-1, 0, 0, 1), np.fliplr),
    "mirrored up and down": ((1, 0, 0, -1), np.flipud),
    "half a turn": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "a quarter right": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "a quarter left": ((0, -1, 1, 0), np.rot90),
    "transposed": ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    "transposed the other way": ((0, -1, -1, 0), lambda p: np.rot90(p, 2).swapaxes(0, 1)),
}
# Colour matrix and range as FFmpeg numbers them.
COLOURS = {
    "BT.601": (6, 1),
    "BT.709": (1, 1),
    "BT.709, full range": (1, 2),
    "BT.601, full range": (6, 2),
    "none": (None, 1),
}


def picture(width: int, height: int) -> np.ndarray:
    """No two corners alike, and in blocks that halving of chroma leaves as they are."""
    pixels = np.full((height, width, 3), (90, 120, 150), np.uint8)
    pixels[: height // 2, : width // 2] = (230, 40, 40)
    pixels[: height // 2, width // 2 :] = (40, 210, 60)
    pixels[height // 2 :, : width // 2] = (50, 60, 220)
    pixels[height // 4 : height // 3], pixels[:, width // 4 : width // 3] = 240, 240  # tell how wide and high it is
    return pixels


def write(
    path: Path,
    *pictures: np.ndarray,
    codec: str = "ffv1",
    fmt: str = "yuv444p",
    matrix: tuple[float, ...] | None = None,
    sar: Fraction | None = None,
    colours: tuple[int | None, int] = (6, 1),
    trc: int | None = None,
    times: list[int] | None = None,
    metadata: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write pictures of one size as a video; `times` in 1/25 s."""
    pictures = pictures or (picture(96, 80),)
    about = {"matrix": matrix, "sar": sar, "colours": colours, "trc": trc, "metadata": metadata, "options": options}
    with av.open(str(path), "w") as container:
        stream = add(container, pictures[0], codec, fmt, **about)
        encode(container, stream, pictures, colours, times)
    return path


def add(container, pixels, codec, fmt, *, matrix=None, sar=None, colours=(6, 1), trc=None, metadata=None,
        options=None, disposition=None):  # fmt: skip
    stream = container.add_stream(codec, rate=25, options=options or {})
    stream.height, stream.width = pixels.shape[:2]
    stream.pix_fmt = fmt
    stream.time_base = Fraction(1, 25)
    context = stream.codec_context
    if matrix:
        a, b, c, d = (round(ONE * value) for value in matrix)
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
    if sar:
        context.sample_aspect_ratio = sar
    if colours[0] is not None:
        context.colorspace = colours[0]
    context.color_range = colours[1]
    if trc is not None:
        context.color_trc = trc
    if disposition is not None:
        stream.disposition = disposition
    for key, value in (metadata or {}).items():
        stream.metadata[key] = value
    return stream


def encode(container, stream, pictures, colours=(6, 1), times=None) -> None:
    for number, pixels in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24" if pixels.shape[2] == 3 else "rgba")
        frame = frame.reformat(
            format=stream.pix_fmt, dst_colorspace={1: 1, 6: 5, None: 5}[colours[0]], dst_color_range=colours[1]
        )
        frame.pts, frame.time_base = times[number] if times else number, Fraction(1, 25)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def read(path: Path, *, size: int = SIZE, seen: Seen | None = None) -> np.ndarray:
    """All frames, (n, size, size, 3)."""
    batches = video_batches(path, batch=4, size=size, seen=seen)
    return np.concatenate([batch.inputs[:, 0].permute(0, 2, 3, 1).numpy() for batch in batches])


def square(pixels: np.ndarray) -> np.ndarray:
    """The middle square of what a player shows."""
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    return resize(np.ascontiguousarray(pixels[top : top + side, left : left + side]), SIZE)


def assert_same(found: np.ndarray, wanted: np.ndarray, *, mean: float = 3.0) -> None:
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted.astype(int)).mean() < mean


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
@pytest.mark.parametrize("name", TURNS)
def test_a_frame_is_turned_and_mirrored_as_its_display_matrix_says(tmp_path, name, suffix):
    matrix, turned = TURNS[name]
    codec = {"mkv": "ffv1", "mp4": "mpeg4"}[suffix]
    fmt = {"mkv": "yuv444p", "mp4": "yuv420p"}[suffix]
    path = write(tmp_path / f"a.{suffix}", codec=codec, fmt=fmt, matrix=matrix, options={"qscale": "1"})
    assert count_frames(path) == 1
    assert_same(read(path)[0], square(turned(picture(96, 80))), mean=4)


@pytest.mark.parametrize("sar", [Fraction(1), Fraction(2), Fraction(1, 2)])
@pytest.mark.parametrize("name", TURNS)
def test_a_whole_frame_is_shown_as_its_middle_square_is(tmp_path, name, sar):
    matrix, turned = TURNS[name]
    stored = picture(96, 80)
    wide = np.repeat(np.repeat(stored, sar.numerator, axis=1), sar.denominator, axis=0)
    path = write(
        tmp_path / "a.mp4", *[stored] * 5, codec="mpeg4", fmt="yuv420p", matrix=matrix, sar=sar,
        options={"qscale": "1"}, times=[0, 1, 3, 7, 20])  # fmt: skip
    whole = list(whole_frames(path, every=2))
    assert [(frame.number, round(frame.seconds * 25)) for frame in whole] == [(0, 0), (2, 3), (4, 20)]
    for frame in whole:
        assert_same(frame.pixels, turned(wide), mean=6)
        assert frame.pixels.flags.c_contiguous


def test_a_damaged_video_yields_its_whole_frames_up_to_the_damage(tmp_path):
    path = write(tmp_path / "a.mkv", *[picture(96, 80)] * 9)
    data = path.read_bytes()
    path.write_bytes(data[: 3 * len(data) // 4])
    announced, seen = 9, []
    with pytest.raises(InputError, match=r"a\.mkv"):
        seen.extend(frame.number for frame in whole_frames(path, announced=announced))
    assert seen == list(range(len(seen)))
    assert len(seen) > 3


def test_a_display_matrix_that_is_no_quarter_turn_is_refused(tmp_path):
    for matrix in ((0.7071, 0.7071, -0.7071, 0.7071), (1, 0.1, 0, 1), (0, 1, 1, 0.5), (1, 1, 0, 0)):
        with pytest.raises(InputError, match=r"a\.mp4 says that it is turned or sheared by no quarter turn .*ffmpeg"):
            read(write(tmp_path / "a.mp4", codec="mpeg4", fmt="yuv420p", matrix=matrix))
    for matrix in ((0.99996, 0.0087, -0.0087, 0.99996), (0, 0, 0, 0)):  # half a degree; nothing, as players take it
        assert_same(read(write(tmp_path / "a.mkv", matrix=matrix))[0], square(picture(96, 80)))


@pytest.mark.parametrize("sar", [Fraction(2), Fraction(1, 2), Fraction(4, 3), Fraction(16, 15)])
@pytest.mark.parametrize("name", ["upright", "a quarter right"])
def test_pixels_that_are_not_square_are_stretched(tmp_path, sar, name):
    matrix, turned = TURNS[name]
    stored = picture(96, 80)
    wide = np.repeat(np.repeat(stored, sar.numerator, axis=1), sar.denominator, axis=0)
    path = write(
        tmp_path / "a.mp4", stored, codec="mpeg4", fmt="yuv420p", sar=sar, matrix=matrix, options={"qscale": "1"}
    )
    assert_same(read(path)[0], square(turned(wide)), mean=5)


def test_what_a_container_crops_is_not_seen(tmp_path):
    stored = picture(96, 80)
    seen = stored[8:64, 4:84]  # 8 off the top, 16 off the bottom, 4 and 12 off left and right
    elements = [(0x54CC, 4), (0x54DD, 12), (0x54BB, 8), (0x54AA, 16)]  # PixelCropLeft, -Right, -Top, -Bottom
    whole = write(tmp_path / "whole.mkv", stored).read_bytes()
    data = b"".join(struct.pack(">H", kind) + b"\x81" + bytes([pixels]) for kind, pixels in elements)
    (tmp_path / "crop.mkv").write_bytes(with_element(whole, [0x18538067, 0x1654AE6B, 0xAE, 0xE0], data))
    assert_same(read(tmp_path / "crop.mkv")[0], square(seen))
    whole = write(tmp_path / "whole.mp4", stored, codec="mpeg4", fmt="yuv420p", options={"qscale": "1"}).read_bytes()
    # The clean aperture: 80 x 56, its middle 4 to the left of and above that of the picture.
    clap = struct.pack(">I4s8i", 40, b"clap", 80, 1, 56, 1, -4, 1, -4, 1)
    box = [b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"mp4v"]
    (tmp_path / "crop.mp4").write_bytes(with_box(whole, box, clap))
    assert_same(read(tmp_path / "crop.mp4")[0], square(seen), mean=5)


def with_box(data: bytes, path: list[bytes], box: bytes) -> bytes:
    """Put a box at the end of the one at `path` of an MP4 whose moov comes last."""
    changed, at, end = bytearray(data), 0, len(data)
    for name in path:
        while data[at + 4 : at + 8] != name:
            at += int.from_bytes(data[at : at + 4], "big")
        size = int.from_bytes(data[at : at + 4], "big")
        changed[at : at + 4] = (size + len(box)).to_bytes(4, "big")
        at, end = at + {b"stsd": 16, b"mp4v": 86}.get(name, 8), at + size
    return bytes(changed[:end] + box + changed[end:])


def with_element(data: bytes, path: list[int], element: bytes) -> bytes:
    """Put an element at the end of the one at `path` of a Matroska file."""
    changed, at, end = bytearray(data), 0, len(data)
    for name in path:
        while True:
            id_bytes = 9 - data[at].bit_length()
            place = at + id_bytes
            size_bytes = 9 - data[place].bit_length()
            mask = (1 << 7 * size_bytes) - 1
            size = int.from_bytes(data[place : place + size_bytes], "big") & mask
            if int.from_bytes(data[at:place], "big") == name:
                break
            at = place + size_bytes + size
        larger = size + len(element) | mask + 1
        changed[place : place + size_bytes] = larger.to_bytes(size_bytes, "big")
        at, end = place + size_bytes, place + size_bytes + size
    return bytes(changed[:end] + element + changed[end:])


def test_the_moving_picture_is_read_and_no_cover(tmp_path):
    cover, film = np.full((80, 96, 3), 255, np.uint8), [picture(96, 80)] * 3
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        still = add(container, cover, "mjpeg", "yuvj444p", disposition=Disposition.attached_pic)
        moving = add(container, film[0], "mpeg4", "yuv420p", options={"qscale": "1"})
        encode(container, still, [cover])
        encode(container, moving, film)
    path.write_bytes(with_cover_first(path.read_bytes()))
    with av.open(str(path)) as container:
        assert container.streams.video[0].disposition & Disposition.attached_pic
    assert count_frames(path) == 3
    assert_same(read(path)[2], square(film[0]), mean=4)
    with av.open(str(path), "w") as container:
        encode(container, add(container, cover, "mjpeg", "yuvj444p", disposition=Disposition.attached_pic), [cover])
    with pytest.raises(InputError, match=r"a\.mp4 holds no moving picture, only 1 still one\(s\), such as cover art"):
        count_frames(path)


def with_cover_first(data: bytes) -> bytes:
    """Put what an MP4's moov says of its cover before what it says of its tracks."""
    moov = data.index(b"moov") - 4
    size, at, boxes = int.from_bytes(data[moov : moov + 4], "big"), moov + 8, []
    while at < moov + size:
        length = int.from_bytes(data[at : at + 4], "big")
        boxes.append(data[at : at + length])
        at += length
    boxes.sort(key=lambda box: box[4:8] != b"udta")
    return data[: moov + 8] + b"".join(boxes) + data[moov + size :]


def test_of_several_moving_pictures_the_default_one_is_read_and_it_is_said(tmp_path):
    other, film = np.full((160, 192, 3), 255, np.uint8), picture(96, 80)
    for is_default in (True, False):
        path, seen = tmp_path / "a.mkv", Seen()
        with av.open(str(path), "w") as container:
            kind = Disposition.default if is_default else Disposition.comment
            streams = [
                add(container, other, "ffv1", "yuv444p", disposition=Disposition.comment),
                add(container, film, "ffv1", "yuv444p", disposition=kind),
            ]
            for stream, pixels in zip(streams, (other, film), strict=True):
                encode(container, stream, [pixels])
        assert_same(read(path, seen=seen)[0], square(film if is_default else other))  # else the larger
        assert "1 video(s), such as a.mkv: number" in "\n".join(seen.lines())


@pytest.mark.parametrize("name", COLOURS)
def test_colours_are_those_of_the_matrix_and_range_that_a_video_names(tmp_path, name):
    stored = picture(80, 80)
    path = write(tmp_path / "a.mkv", stored, colours=COLOURS[name])
    kr, kb = (0.2126, 0.0722) if "709" in name else (0.299, 0.114)
    with av.open(str(path)) as container:
        y, u, v = next(container.decode(video=0)).to_ndarray(format="yuv444p").astype(float)[:, 70, 70]
    if COLOURS[name][1] == 1:
        y, u, v = (y - 16) * 255 / 219, (u - 128) * 255 / 224, (v - 128) * 255 / 224
    else:
        u, v = u - 128, v - 128
    red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    by_hand = [red, (y - kr * red - kb * blue) / (1 - kr - kb), blue]
    found = read(path)[0, -3, -3]
    np.testing.assert_allclose(found, by_hand, atol=3)
    np.testing.assert_allclose(found, stored[70, 70], atol=3)


def test_what_a_video_hides_below_alpha_is_not_seen(tmp_path):
    pixels = np.zeros((80, 80, 4), np.uint8)
    pixels[..., :3], pixels[40:, :, 3] = (200, 100, 50), 255
    found = read(write(tmp_path / "a.mkv", pixels, fmt="bgra", colours=(None, 2)))[0]
    assert (found[:30] == 0).all()
    np.testing.assert_allclose(found[-3, -3], (200, 100, 50), atol=1)


def test_two_pictures_in_a_frame_are_refused(tmp_path):
    path = write(tmp_path / "a.mkv", metadata={"stereo_mode": "left_right"})
    with pytest.raises(InputError, match=r"a\.mkv holds two pictures in each frame, side by side \(stereo 3D\)"):
        read(path)


def test_what_cannot_be_shown_as_it_was_meant_is_said(tmp_path):
    seen = Seen()
    read(write(tmp_path / "hdr.mkv", *[picture(96, 80)] * 3, trc=16), seen=seen)
    read(write(tmp_path / "alpha.mkv", metadata={"alpha_mode": "1"}), seen=seen)
    lines = "\n".join(seen.lines())
    assert "1 video(s), such as hdr.mkv, PQ, are HDR" in lines
    assert "1 video(s), such as alpha.mkv, are transparent" in lines
    assert "of 4 frame(s), such as hdr.mkv, 96 x 80, the middle square was taken" in lines
    read(tmp_path / "hdr.mkv", size=7, seen=seen)  # 80 pixels are much more than it reads
    assert "3 picture(s) or frame(s), such as hdr.mkv, 96 x 80, are much larger" in "\n".join(seen.lines())
    both = Seen()
    both.add(seen)
    both.add(seen)  # of a video that two parts read
    assert "1 video(s), such as hdr.mkv" in "\n".join(both.lines())


@pytest.mark.parametrize("codec", ["mpeg2video"])
def test_interlaced_video_is_said(tmp_path, codec):
    seen = Seen()
    write(tmp_path / "a.mkv", *[picture(96, 80)] * 2, codec=codec, fmt="yuv420p", options={"flags": "+ildct+ilme"})
    read(tmp_path / "a.mkv", seen=seen)
    assert "1 video(s), such as a.mkv, are interlaced" in "\n".join(seen.lines())


def test_seconds_are_those_of_the_container_from_where_it_starts(tmp_path):
    times = [5, 6, 20, 100]
    for suffix, codec, fmt in (
        ("mkv", "ffv1", "yuv444p"),
        ("mp4", "mpeg4", "yuv420p"),
        ("ts", "mpeg2video", "yuv420p"),
    ):
        seen = Seen()
        path = write(tmp_path / f"a.{suffix}", *[picture(96, 80)] * 4, codec=codec, fmt=fmt, times=times)
        read(path, seen=seen)
        with av.open(str(path)) as container:
            start_s = container.start_time / 1e6
        wanted = np.array(times) / 25 - (0.2 if start_s > 0 else 0)
        np.testing.assert_allclose([seen.seconds[row] for row in range(4)], wanted, atol=2e-3)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg here")
@pytest.mark.parametrize("name", TURNS)
def test_a_player_of_its_own_shows_the_same(tmp_path, name):
    path = write(
        tmp_path / "a.mp4", codec="mpeg4", fmt="yuv420p", matrix=TURNS[name][0], sar=Fraction(4, 3),
        options={"qscale": "1"}, colours=(1, 1))  # fmt: skip
    shown = (
        "scale=w='iw*sar':h=ih:flags=area+accurate_rnd+full_chroma_int,setsar=1,crop='min(iw,ih)':'min(iw,ih)',"
        f"scale={SIZE}:{SIZE}:flags=area+accurate_rnd+full_chroma_int"
    )
    command = ["ffmpeg", "-v", "error", "-i", path, "-vf", shown, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert_same(read(path)[0], np.frombuffer(done.stdout, np.uint8).reshape(SIZE, SIZE, 3), mean=4)
