"""Predict an input with one model or the mean of several, and write it down."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pyarrow import csv

from mtl_dist import storage
from mtl_dist.data.frames import Seen
from mtl_dist.device import named_device
from mtl_dist.errors import InputError
from mtl_dist.objective.affect import PredictedRows
from mtl_dist.objective.metrics import AU_THRESHOLD, metric_sums
from mtl_dist.objective.scores import constant_scores, scores, single_scores
from mtl_dist.predict.annotate import check_drawing, draw_all
from mtl_dist.predict.faces import WholePictures, predict_faces
from mtl_dist.predict.options import CUT_FIRST, PredictCommand
from mtl_dist.predict.sequences import check_models, count_passes, find_extractors, predict_videos
from mtl_dist.predicting.averaging import Mean, find_views
from mtl_dist.predicting.faces import check_cuts
from mtl_dist.predicting.inputs import Frames, ImageFiles, ShardSet, VideoFile, VideoFiles, open_frames, parent_uri
from mtl_dist.predicting.predictions import check_finite, fill_missing, prediction_table, write_parquet
from mtl_dist.predicting.spread import Task, predict_frames
from mtl_dist.predicting.submission import submission_text
from mtl_dist.predicting.views import Views, open_views
from mtl_dist.progress import progress_bar
from mtl_dist.runs.weights import Weights, open_weights
from mtl_dist.tasks import TASKS
from mtl_dist.training.tracking import print_scores

MAX_REASONS = 100  # images that are read again, to say what is wrong with them


def predict_input(command: PredictCommand) -> None:
    """Predict --input and write --out, whole or not at all. Raises `InputError`."""
    models = tuple(open_weights(run) for run in command.runs)
    is_sequence = check_models(command.runs, models, command.extractors)
    if command.faces:
        if is_sequence:
            raise InputError(f"--runs has {command.runs[0]}, which reads features, and --faces is given; {CUT_FIRST}")
        _predict_faces(command, models)
        return
    views = find_views(command.runs, models)
    if is_sequence and len(views) > 1:
        raise InputError(f"--runs read features of {' and of '.join(views)}; predict with each view's apart")
    nets = find_extractors(command.runs, models, command.extractors) if is_sequence else []
    device = named_device(command.device).type
    with storage.scratch_directory("predict") as scratch:
        frames = _open_input(command, models, views, scratch)
        if isinstance(frames, (ImageFiles, Views)):  # names of shards are read at the end
            _check_names(command.out, frames.listed)
        elif not isinstance(frames, ShardSet):
            videos = frames.videos if isinstance(frames, VideoFiles) else [frames]
            _check_names(command.out, [video.title for video in videos])
        storage.check_writable(parent_uri(command.out))
        task = Task(models, frames, device, command.batch, command.workers)
        processes = _num_processes(command, device, num_batches=-(-frames.num_frames // command.batch))
        passes = count_passes(nets) if is_sequence else task.num_passes
        with progress_bar("predicting", frames.num_frames * passes) as advance:
            if is_sequence:
                predicted, seen = predict_videos(
                    models, nets, frames, device=named_device(command.device), batch=command.batch,
                    workers=command.workers, progress=advance)  # fmt: skip
            else:
                predicted, seen = predict_frames(task, processes=processes, progress=advance)
            if command.skip_bad_images:
                advance((frames.num_frames - len(predicted.rows)) * passes)
        names = frames.names(predicted.rows)
    skipped = _skipped(command, frames, predicted.rows) if command.skip_bad_images else []
    check_finite(predicted.predictions, names, source=" or ".join(command.runs))
    seconds = _seconds(seen, predicted.rows) if isinstance(frames, (VideoFile, VideoFiles)) else None
    if isinstance(frames, VideoFiles):
        predicted = predicted._replace(rows=np.arange(len(names)))
    filled = _write(command.out, predicted, names, seconds, frames.listed if skipped else None)
    for line in seen.lines():
        print(line)
    if left_out := getattr(frames, "left_out", ()):
        print(f"note: of {command.input} other files were left out: {', '.join(left_out)}")
    _report(command, predicted, skipped, num_expected=frames.num_frames)
    for note in filter(None, (filled, _note_unscored(models))):
        print(f"note: {note}")


def _predict_faces(command: PredictCommand, models: Sequence[Weights]) -> None:
    """Find and predict the faces of whole pictures, write them, and draw them where that is asked for."""
    find_views(command.runs, models)
    mean = Mean(models, named_device(command.device))
    check_cuts(command.runs, mean.cuts)
    seen = Seen()
    with storage.scratch_directory("predict") as scratch:
        frames = open_frames(
            command.input, images=command.images, every=command.every_frames, skip_bad=command.skip_bad_images,
            skip_videos=command.skip_bad_images, exif=command.exif, scratch=scratch)  # fmt: skip
        if not isinstance(frames, WholePictures):
            raise InputError(f"--input is {command.input}, a shard set: its pictures are faces; leave out --faces")
        if command.draw:
            check_drawing(command.draw, frames)
        storage.check_writable(parent_uri(command.out))
        with progress_bar("predicting", frames.num_frames) as advance:
            found, frames = predict_faces(command, frames, mean, seen=seen, progress=advance)
        rows = np.unique(found.table["row"].to_numpy())
        skipped = _skipped(command, frames, rows) if command.skip_bad_images else []
        _write_table(command.out, found.table)
        if command.draw:
            with progress_bar("drawing", len(rows)) as advance:
                draw_all(command.draw, frames, found.table, advance)
    for line in (*seen.lines(), *found.lines(), *(f"left out: {line}" for line in skipped)):
        print(line)
    if left_out := getattr(frames, "left_out", ()):
        print(f"note: of {command.input} other files were left out: {', '.join(left_out)}")
    drawn = f"; drew {command.draw}" if command.draw else ""
    print(f"wrote {command.out}: {found.summary()}, mean of {len(command.runs)} model(s){drawn}")
    if note := _note_unscored(models):
        print(f"note: {note}")


def _note_unscored(models: Sequence[Weights]) -> str:
    """Say which tasks no model has a score of, where some have scores: a network says something of each."""
    scored = [model.checkpoint.scores for model in models if model.checkpoint.scores]
    known = {score.task for score in single_scores() for scores_of in scored if score.key in scores_of}
    unknown = [task for task in TASKS if task not in known]
    if not scored or not unknown:
        return ""
    return (
        f"no model was scored on {', '.join(unknown)}, for want of labels: what is said of them was not checked, and "
        "means nothing where it was not trained"
    )


def _seconds(seen: Seen, rows: np.ndarray) -> np.ndarray:
    return np.array([seen.seconds[row] for row in rows.tolist()], np.float64)


def _skipped(command: PredictCommand, frames: ImageFiles | Views | VideoFiles, rows: np.ndarray) -> list[str]:
    """Return a line for every file that was left out, with reasons for the first; raises where that is every one."""
    if isinstance(frames, VideoFiles):
        return list(frames.bad)
    bad = frames.skipped(rows)
    if len(bad) == frames.num_frames:
        raise InputError(
            f"none of the {len(bad)} images of {command.input} can be read; the first: {frames.why_bad(0)}"
        )
    lines = [frames.why_bad(row) for row in bad[:MAX_REASONS]]
    return lines + [f"image {frames.listed[row]}" for row in bad[MAX_REASONS:]]


def _open_input(
    command: PredictCommand, models: Sequence[Weights], views: Sequence[str], scratch: Path
) -> Frames | Views:
    how = {"images": command.images, "skip_bad": command.skip_bad_images, "exif": command.exif, "scratch": scratch}
    if len(views) > 1:
        if command.every_frames != 1:
            raise InputError("--every-frames is for videos, of which --faces cuts every view; give it too, or neither")
        first = {view: next(run for run, m in zip(command.runs, models) if m.view == view) for view in views}
        return open_views(command.input, first, **how)
    frames = open_frames(command.input, every=command.every_frames, cache_dir=command.cache_dir, **how)
    if isinstance(frames, ShardSet) and frames.view not in (views or (frames.view,)):
        raise InputError(
            f"--input is {command.input}, of view '{frames.view}'; expected '{views[0]}', that of --runs; give the "
            "shard set of that view, or runs of this one"
        )
    return frames


def _num_processes(command: PredictCommand, device: str, *, num_batches: int) -> int:
    gpus = torch.cuda.device_count() if device == "cuda" else 1
    return max(1, min(command.processes or gpus, num_batches))


def _check_names(out: str, names: Sequence[str]) -> None:
    """Raise where the challenge's format has no way to write a name."""
    if _is_submission(out) and (odd := [name for name in names if "," in name or "\n" in name]):
        raise InputError(f"image {odd[0]!r} has a comma or newline in its name, which {out} cannot hold; write a .csv")


def _write(
    out: str, predicted: PredictedRows, names: list[str], seconds: np.ndarray | None, listed: Sequence[str] | None
) -> str:
    """Write --out; of the challenge's file say which of the `listed` names had no picture, and what they have."""
    if _is_submission(out):
        _check_names(out, names)
        va, expr, au = predicted.predictions
        # Rows are places in a list of images alone: those of a video or a shard set have gaps of their own.
        rows = np.arange(len(names)) if listed is None else predicted.rows
        filled = fill_missing(listed or names, rows, (va, expr.argmax(-1), au > AU_THRESHOLD))
        storage.write_bytes(out, submission_text(listed or names, *filled.values).encode())
        return filled.note
    table = prediction_table(predicted, names, labels=_has_labels(predicted), seconds=seconds)
    _write_table(out, table)
    return ""


def _write_table(out: str, table: pa.Table) -> None:
    if not out.lower().endswith(".csv"):
        write_parquet(out, table)
        return
    sink = pa.BufferOutputStream()
    csv.write_csv(table, sink)
    storage.write_bytes(out, sink.getvalue().to_pybytes())


def _is_submission(out: str) -> bool:
    return out.lower().endswith(".txt")


def _report(command: PredictCommand, predicted: PredictedRows, skipped: list[str], *, num_expected: int) -> None:
    if _has_labels(predicted):
        sums = metric_sums(predicted.predictions, predicted.targets)
        rows = {"constant predictor": constant_scores(sums), "prediction": scores(sums)}
        print_scores(rows, title=f"{len(predicted.rows)} rows")
    for line in skipped:
        print(f"left out: {line}")
    if len(predicted.rows) + len(skipped) != num_expected:
        print(f"note: {command.input} says it has {num_expected} such frames; {len(predicted.rows)} could be decoded")
    without = f", {len(skipped)} left out" if skipped else ""
    print(f"wrote {command.out}: {len(predicted.rows)} frames{without}, mean of {len(command.runs)} model(s)")


def _has_labels(predicted: PredictedRows) -> bool:
    targets = predicted.targets
    return bool(targets.va_mask.any() or targets.expr_mask.any() or targets.au_mask.any())
