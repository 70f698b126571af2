"""What faces are to be cut out of, how, and where to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from mtl_dist import storage
from mtl_dist.data.decode import JPEG_QUALITY, Exif
from mtl_dist.errors import OPTION_BOUNDS, InputError, check_numbers
from mtl_dist.faces.detector import DEFAULT, MAX_SIDE
from mtl_dist.faces.tracking import MIN_FRAMES
from mtl_dist.faces.views import LEAST_FACE, MOST_SIDE

BOUNDS = OPTION_BOUNDS | {
    "every_frames": (1, 10**9), "size": (16, 4096), "quality": (1, 100), "min_face": (0, 10**5),
    "min_confidence": (0, 1), "min_sharpness": (0, 10**9), "min_frames": (1, 10**9), "within": (0, 10**9),
    "retries": (0, 1000), "cpus_per_video": (0.01, 4096), "max_side": (64, 4096)
}  # fmt: skip


@dataclass(frozen=True)
class PrepareCommand:
    """Options of `python -m mtl_dist.prepare`."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="VIDEOS_OR_PHOTOS")]
    """A video, a photograph, or a directory of these at any depth; local or s3://."""
    dest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")]
    """Directory to write to, on a disk; `shards create` goes on from there to s3://."""
    annotations: str | None = None
    """A .csv or .parquet table of labels by frame or second, which are joined to the faces."""
    within: float | None = None
    """Seconds that a frame and the label nearest to it may be apart. None: half a frame's duration of the video."""
    one_person: bool = False
    """Every video and photograph shows one person: of each frame the largest face is taken, the others are left
    out."""
    every_frames: int = 1
    """Of a video take the first of every so many frames."""
    size: int = MOST_SIDE
    """Most pixels a side of a picture of `cropped`; no face is enlarged."""
    quality: int = JPEG_QUALITY
    """Of the JPEG files, 1 to 100."""
    min_face: int = LEAST_FACE
    """Leave out faces whose box is smaller, in pixels of its longer side."""
    min_confidence: float | None = None
    """Faces that the detector is less sure of, 0 to 1, are none. None: as the detector has it."""
    min_sharpness: float = 0.0
    """Leave out faces that are more blurred: the column `sharpness` of frames.parquet, 5 or so is very blurred."""
    min_frames: int = MIN_FRAMES
    """Leave out persons that a video shows in fewer frames."""
    detector: str = DEFAULT
    """`yunet`, which comes with mtl_dist[faces], or the path of an ONNX file: YuNet, SCRFD or RetinaFace."""
    max_side: int = MAX_SIDE
    """Frames and photographs with a longer side are searched at that size, so faces under a hundredth of it are not
    found; they are cut out of the whole picture."""
    exif: Exif = "apply"
    """Turn photographs as their EXIF says, or `ignore` it."""
    skip_bad_images: bool = False
    """Leave out photographs that cannot be decoded and videos that are damaged, and name them; else the first ends the
    command."""
    jobs: int | None = None
    """Processes on this machine, each with one video or some photographs at a time. None: as many as CPUs."""
    local: bool = False
    """Work on this machine, even where there is a cluster."""
    cpus_per_video: float = 1.0
    """CPUs of the cluster that a video is searched with."""
    retries: int = 2
    """How often a video is tried again on the cluster after a failure."""
    autoscaling: bool = False
    """The cluster adds nodes when videos wait for them: do not refuse what it has no room for yet."""

    def kept(self) -> dict[str, object]:
        """Return the options that decide what is written, beside the detector."""
        names = ("one_person", "every_frames", "size", "quality", "min_face", "min_confidence", "min_sharpness",
                 "min_frames", "max_side", "exif")  # fmt: skip
        return {name: getattr(self, name) for name in names}


def check_command(command: PrepareCommand) -> None:
    """Raise `InputError` for what is wrong whatever the source holds."""
    check_numbers(BOUNDS, **vars(command))
    if storage.is_s3(command.dest):
        raise InputError(
            f"DEST is {command.dest}; pictures are written to a disk: give a local directory, and then "
            "`python -m mtl_dist.shards create` writes shards of them to s3://"
        )
    storage.check_writable(command.dest, flag="DEST")
    if command.within is not None and command.annotations is None:
        raise InputError("--within is about --annotations, and none are given; leave it out")
    if command.annotations and storage.is_s3(command.annotations):
        raise InputError(
            f"--annotations is {command.annotations}; the table is read from a disk: download it, and give its path"
        )
    if command.annotations and not command.annotations.lower().endswith((".csv", ".parquet")):
        raise InputError(f"--annotations is {command.annotations}; expected a .csv or .parquet table")
    source, dest = (storage.absolute(uri).rstrip("/") for uri in (command.source, command.dest))
    if dest == source or dest.startswith(f"{source}/"):
        raise InputError(
            f"DEST is {command.dest}, inside {command.source}, so that its pictures would be searched the next time; "
            "give another directory"
        )
