"""What an ensemble is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mtl_dist.data.decode import Exif
from mtl_dist.errors import OPTION_BOUNDS, InputError, check_numbers

Step = Literal["temperature", "weights", "class_smoothing", "prior", "thresholds", "smoothing", "moments"]
BOUNDS = OPTION_BOUNDS | {
    "folds": (2, 10_000), "retries": (0, 1000), "cpus_per_member": (0, 4096), "gpus_per_member": (0, 64)
}  # fmt: skip
# Options that decide the result.
RECORDED = (
    "val", "steps", "calibrate", "folds", "half_windows", "seed", "each_task", "test_list", "test_root",
    "skip_bad_images", "exif",
)  # fmt: skip


@dataclass(frozen=True)
class EnsembleCommand:
    """Options of `python -m mtl_dist.ensemble`."""

    runs: tuple[str, ...]
    """Runs to ensemble, of either view, several of one too: <storage>/<name> of each, as training printed it. Runs of
    all folds of the same sets (data.fold) are one member, which is scored out of fold. Or
    exported directories, such as those of mtl_dist.soup, with --val."""
    out: str
    """Directory or s3:// prefix to write to; what an earlier ensemble wrote there is replaced."""
    val: tuple[str, ...] = ()
    """Validation sets (of runs of folds, their training sets) in the order of --runs, where they have moved."""
    steps: tuple[Step, ...] = ("temperature", "weights", "thresholds", "smoothing")
    """Calibration on top of the plain mean, always in this order; `--steps` with nothing behind it: none. On request:
    class_smoothing, of the probabilities of expressions and units; prior, expressions by how seldom they are labelled;
    moments, valence and arousal with the labels' mean and deviation."""
    calibrate: Literal["all", "auto"] = "all"
    """With all of --steps; or auto: each task without those that do not raise its score on videos that they were not
    fitted on. What a fold leaves out is chosen on the other folds alone. Fitting takes about six times as long."""
    folds: int = 5
    """Folds of videos to fit and score the steps on."""
    half_windows: tuple[int, ...] = (0, 5, 10, 15, 25, 50)
    """Frame numbers either way that smoothing chooses from."""
    seed: int = 0
    """Deals videos into folds."""
    each_task: bool = False
    """Also predict with the checkpoints of every run that are best at one task, and score what comes of taking each
    task from whichever checkpoint is best at it on other videos: a line of its own, apart from the ensemble."""
    test_list: str | None = None
    """The challenge's list of test frames, to write submission.txt for."""
    test_root: str | None = None
    """Where their images are: <test-root>/<view>/<video>/<frame>.jpg, on a disk that every node sees, or s3://."""
    skip_bad_images: bool = False
    """Go on without test images that are not there or cannot be decoded: a frame without one has what the members of
    the other view say, else the values of the last frame before in its video, else zeros and Neutral."""
    exif: Exif = "apply"
    """Turn test images as their EXIF says, as `shards create` does, or `ignore` it."""
    batch: int = 64
    """Images per forward pass."""
    workers: int = 1
    """Loader threads."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cache_dir: Path | None = None
    """Per-node cache of shards; None: $MTL_CACHE_DIR or ~/.cache/mtl_dist/shards."""
    local: bool = False
    """Predict in this process, one member after the other, even where there is a cluster."""
    cpus_per_member: float = 1.0
    """CPUs of the cluster a member is predicted with."""
    gpus_per_member: float = 0.0
    retries: int = 2
    """How often a member is tried again after a failure."""
    autoscaling: bool = False
    """The cluster adds nodes when members wait for them: do not refuse what it has no room for yet."""


def check_command(command: EnsembleCommand) -> None:
    """Raise `InputError` for what is wrong whatever the runs hold."""
    if not command.runs:
        raise InputError("--runs names no run; expected one or more, as training printed them")
    if command.val and len(command.val) != len(command.runs):
        raise InputError(f"--val names {len(command.val)} sets for {len(command.runs)} runs; expected one each")
    if (command.test_list is None) != (command.test_root is None):
        raise InputError("--test-list and --test-root belong together: which frames to submit, and their images")
    for flag, is_set in (("--skip-bad-images", command.skip_bad_images), ("--exif", command.exif != "apply")):
        if is_set and not command.test_list:
            raise InputError(f"{flag} is for the images of --test-list, and none is given; leave it out")
    if command.calibrate == "auto" and not command.steps:
        raise InputError("--calibrate auto chooses among --steps, and these are none; name some, or leave it out")
    check_numbers(BOUNDS, **vars(command))
    if not command.half_windows or not 0 <= min(command.half_windows) <= max(command.half_windows) < 10**6:
        raise InputError(f"--half-windows is {list(command.half_windows)}; expected numbers from 0, such as 0 5 10")
    for name in ("runs", "steps", "half_windows"):
        values = getattr(command, name)
        if twice := [value for place, value in enumerate(values) if value in values[:place]]:
            raise InputError(f"--{name.replace('_', '-')} has '{twice[0]}' twice; expected each once")
