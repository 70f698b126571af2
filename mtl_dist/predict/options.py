"""What is to be predicted, with what, and where to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mtl_dist import storage
from mtl_dist.data.decode import Exif
from mtl_dist.errors import OPTION_BOUNDS, InputError, check_numbers
from mtl_dist.faces.detector import DEFAULT, LEAST_SIDE, MAX_SIDE, MOST_SIDE

SUFFIXES = (".csv", ".parquet", ".txt")
CUT_FIRST = "cut the faces out first (python -m mtl_dist.prepare INPUT DEST), and give --input DEST/cropped"
BOUNDS = OPTION_BOUNDS | {
    "every_frames": (1, 10**9),
    "processes": (1, 1024),
    "min_confidence": (0, 1),
    "max_side": (LEAST_SIDE, MOST_SIDE),
}


@dataclass(frozen=True)
class PredictCommand:
    """Options of `python -m mtl_dist.predict`."""

    runs: tuple[str, ...]
    """What predicts: runs (<storage>/<name>: the best checkpoint), checkpoints of runs (.../checkpoints/step_...), or
    directories that mtl_dist.export wrote. Of several, probabilities and VA are averaged."""
    input: str
    """Directory of images or of videos, list of images (.txt), video file, or shard set; local or s3://."""
    out: str
    """File to write, local or s3://: .csv, .parquet, or .txt for the challenge's format."""
    extractors: tuple[str, ...] = ()
    """Of models of features (preset c): what made the features that they were trained on, in that order: runs,
    checkpoints or files of weights. Every frame is described by them, in one process, and every video predicted as a
    whole: one of --input, or a directory of its pictures."""
    images: str | None = None
    """Where the paths of a list start; None: beside the list."""
    faces: bool = False
    """Find the faces of whole pictures and videos first, as mtl_dist.prepare does: a row a face and frame."""
    detector: str = DEFAULT
    """Of --faces: what finds them: yunet, or an ONNX file (YuNet, SCRFD, RetinaFace)."""
    min_confidence: float | None = None
    """Of --faces: leave out what the detector is less sure of, 0 to 1. None: as the detector has it."""
    max_side: int = MAX_SIDE
    """Of --faces: pictures with a longer side are searched at that size, so faces under a hundredth of it are not
    found; they are cut out of the whole picture."""
    draw: str | None = None
    """Of --faces: draw what was found and predicted. A file (.mp4) for a video, else a directory; local or s3://."""
    every_frames: int = 1
    """Of a video take the first of every so many frames."""
    skip_bad_images: bool = False
    """Leave out image files that are not there or cannot be decoded, and name them; else the first ends the command.
    The challenge's file has a line for them too: the values of the last frame before in the video, else zeros and
    Neutral. With --faces videos of a directory that are damaged are left out too, each as a whole."""
    exif: Exif = "apply"
    """Turn image files as their EXIF says, as `shards create` does, or `ignore` it."""
    batch: int = 64
    """Images per forward pass."""
    workers: int = 1
    """Decoding threads of a process; videos have their own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    processes: int | None = None
    """Processes, each with a GPU and a part of the input. None: one for each GPU that torch sees, or 1 on CPUs."""
    cache_dir: Path | None = None
    """Per-node cache of shards; None: $MTL_CACHE_DIR or ~/.cache/mtl_dist/shards."""


def check_command(command: PredictCommand) -> None:
    """Raise `InputError` for what is wrong whatever the models and the input hold."""
    storage.check_lasting(command.out, flag="--out")
    if not command.out.lower().endswith(SUFFIXES):
        raise InputError(f"--out is {command.out}; expected a name that ends with {', '.join(SUFFIXES)}")
    if not command.runs:
        raise InputError("--runs names no run; expected one at least")
    if storage.absolute(command.out) == storage.absolute(command.input):
        raise InputError(f"--out is {command.out}, the --input itself, which it would replace; give another name")
    if Path(command.out).is_dir():
        raise InputError(f"--out is {command.out}, a directory; give a file's name, such as {command.out}/out.csv")
    check_numbers(BOUNDS, **vars(command))
    _check_faces(command)


def _check_faces(command: PredictCommand) -> None:
    given = {"--detector": command.detector != DEFAULT, "--min-confidence": command.min_confidence is not None,
             "--max-side": command.max_side != MAX_SIDE, "--draw": command.draw is not None}  # fmt: skip
    for flag, is_set in given.items():
        if is_set and not command.faces:
            raise InputError(f"{flag} is of --faces, which is not given; give both, or neither")
    if not command.faces:
        return
    if command.out.lower().endswith(".txt"):
        raise InputError(
            f"--out is {command.out}, the challenge's file, which has one face a frame; with --faces give a .csv or "
            ".parquet"
        )
    if command.extractors:
        raise InputError(f"--extractors reads pictures of one face, and --faces whole ones; {CUT_FIRST}")
    if command.processes not in (None, 1):
        raise InputError(f"--processes is {command.processes}; with --faces one process finds and predicts them")
    if command.draw is None:
        return
    storage.check_lasting(command.draw, flag="--draw")
    draw, source = (storage.join(storage.absolute(uri), "") for uri in (command.draw, command.input))
    if draw.startswith(source) or storage.absolute(command.draw) == storage.absolute(command.out):
        raise InputError(f"--draw is {command.draw}, among the files of --input or --out; give another name")
