"""Write a labelled data set of drawn faces in the layout of s-Aff-Wild2, for the demo and the tests.

    write_synthetic(Path("demo_data"), num_train=1500, num_val=500)

    DEST/cropped/<video>/<frame>.jpg          the face with its surroundings, square, 112 to 160 pixels
    DEST/cropped_aligned/<video>/<frame>.jpg  112 x 112, the eyes on a fixed template
    DEST/training_set_annotations.txt, DEST/validation_set_annotations.txt

What is in them is decided by `plan.py`, or by `dynamics.py` for videos that have time in them. Every random number is
keyed by (seed, split, video[, frame]), so the files do not depend on the number of processes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from mtl_dist.errors import Damaged, InputError
from mtl_dist.parsing import parse_object
from mtl_dist.processes import process_pool
from mtl_dist.shards.annotations import FILES
from mtl_dist.synthetic.dynamics import DYNAMICS_VERSION, plan_dynamic_video
from mtl_dist.synthetic.dynamics import FRAMES_PER_VIDEO as DYNAMIC_FRAMES_PER_VIDEO
from mtl_dist.synthetic.faces import encode_jpeg, render_views
from mtl_dist.synthetic.plan import Video, annotation_text, count_labels, keyed_rng, plan_splits, plan_static_video
from mtl_dist.tasks import VIEWS

PARAMETERS_FILE = "synthetic.json"
FRAMES_PER_VIDEO = 24
RENDERER_VERSION = 3  # raise it when the pictures change, so that an old directory is not taken for a new one


def write_synthetic(
    dest: Path,
    *,
    num_train: int,
    num_val: int,
    seed: int = 0,
    frames_per_video: int | None = None,
    dynamics: bool = False,
    jobs: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict:
    """Write `num_train` + `num_val` frames (two images each) and their annotations below `dest`; return counts.

    With `dynamics`, videos have time in them; they are then of about 96 frames where `frames_per_video` does not say,
    else of 24.
    `progress` is called with the number of images finished since its last call. A finished directory is left as it is,
    an interrupted one is completed. Raises `InputError` where `dest` holds something else.
    """
    if frames_per_video is None:
        frames_per_video = DYNAMIC_FRAMES_PER_VIDEO if dynamics else FRAMES_PER_VIDEO
    for name, value in (
        ("num_train", num_train),
        ("num_val", num_val),
        ("frames_per_video", frames_per_video),
        ("jobs", jobs),
    ):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    dest = Path(dest)
    parameters = {
        "renderer": RENDERER_VERSION,
        "seed": seed,
        "num_train": num_train,
        "num_val": num_val,
        "frames_per_video": frames_per_video,
    }
    if dynamics:  # else as it always was, so that a set made before is known again
        parameters["dynamics"] = DYNAMICS_VERSION
    is_complete = check_destination(dest, parameters)
    splits = plan_splits(
        num_train=num_train,
        num_val=num_val,
        seed=seed,
        frames_per_video=frames_per_video,
        plan_video=plan_dynamic_video if dynamics else plan_static_video,
    )
    num_written = 0
    if not is_complete:
        dest.mkdir(parents=True, exist_ok=True)
        _write_atomically(dest / PARAMETERS_FILE, (json.dumps(parameters, indent=1) + "\n").encode())
        num_written = _render_all(
            dest, [video for videos in splits.values() for video in videos], jobs=jobs, progress=progress
        )
        # Last, so that a directory with annotations is a complete one.
        for split, videos in splits.items():
            _write_atomically(dest / FILES[split], annotation_text(videos).encode())
    return {"num_images_written": num_written} | {split: count_labels(videos) for split, videos in splits.items()}


def check_destination(dest: Path, parameters: dict) -> bool:
    """True where `dest` is already complete. Raises `InputError` where it holds other data (the real set, for one)."""
    parameters_path = dest / PARAMETERS_FILE
    if not parameters_path.exists():
        present = [name for name in (*VIEWS, *FILES.values()) if (dest / name).exists()]
        if present:
            raise InputError(
                f"{dest} holds {', '.join(present)} but no {PARAMETERS_FILE}: not a synthetic set, choose another place"
            )
        return False
    try:
        found = parse_object(parameters_path.read_bytes())
    except Damaged as error:
        raise InputError(f"{parameters_path} is damaged ({error}); delete {dest} or choose another directory") from None
    if found != parameters:
        raise InputError(
            f"{dest} holds a synthetic set of {found}, not of {parameters}: delete it or choose another directory"
        )
    return all((dest / name).exists() for name in FILES.values())


def _render_all(dest: Path, videos: list[Video], *, jobs: int, progress: Callable[[int], None] | None) -> int:
    """Render what is not there yet; return the number of images written."""
    render = partial(_render_video, dest)
    with ExitStack() as stack:
        if jobs == 1:
            finished = map(render, videos)
        else:
            finished = stack.enter_context(process_pool(jobs)).map(render, videos)
        num_written = 0
        for num_images in finished:
            num_written += num_images
            if progress is not None:
                progress(num_images)
    return num_written


def _render_video(dest: Path, video: Video) -> int:
    directories = [dest / view / video.name for view in VIEWS]
    for directory in directories:
        directory.mkdir(parents=True, exist_ok=True)
    num_written = 0
    for position, frame in enumerate(video.frames):
        paths = [directory / f"{frame.number:05d}.jpg" for directory in directories]
        if all(path.exists() for path in paths):
            continue  # a rerun after an interruption: files appear whole or not at all
        images = render_views(video.identity, frame.look, keyed_rng(*video.key, 3, position))
        for path, image in zip(paths, images, strict=True):
            _write_atomically(path, encode_jpeg(image, quality=frame.jpeg_quality))
            num_written += 1
    return num_written


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
