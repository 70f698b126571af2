"""The final job: ensemble runs of either view on the validation split and write the challenge score.

The score is the plain mean's of all members. What calibration adds is shown step by step beside it: temperatures,
weights of members for each task and dimension, thresholds of action units, smoothing of valence and arousal in time.
Videos are dealt into --folds; the parameters for a fold are fitted on the others, so that nothing is scored with
parameters that were fitted on it. A test list is predicted with parameters fitted on all validation rows.

Under `ray job submit`, or with RAY_ADDRESS, members are predicted in parallel on the cluster. What is predicted is kept
in --out/members: the same command continues.

Examples:
    python -m mtl_dist.ensemble --runs runs/cropped runs/cropped_aligned --out runs/ensemble
    ray job submit -- python -m mtl_dist.ensemble --runs s3://bucket/runs/cropped s3://bucket/runs/cropped_aligned
        --out s3://bucket/runs/ensemble --gpus-per-member 1
    python -m mtl_dist.ensemble --runs runs/cropped-1 runs/cropped-2 runs/aligned --out runs/submission
        --test-list DATA/test_set.txt --test-root DATA --half-windows 0 5 10 15

Writes to --out: predictions.parquet (the plain mean), calibrated.parquet (out of fold), table.txt, score.json; with a
test list also test_predictions.parquet and submission.txt, the challenge's file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tyro

from mtl_dist import storage
from mtl_dist.data.decode import Exif
from mtl_dist.errors import OPTION_BOUNDS, InputError, check_numbers, plain_refusals, run_command
from mtl_dist.sealed import seal

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from mtl_dist.objective.calibration import Calibration
    from mtl_dist.objective.crossfit import CrossFit
    from mtl_dist.objective.metrics import Predictions
    from mtl_dist.predicting.evaluate import Predicted
    from mtl_dist.predicting.members import Member
    from mtl_dist.predicting.predictions import PredictionTable

Step = Literal["temperature", "weights", "thresholds", "smoothing"]
RECORDED = (
    "val",
    "steps",
    "folds",
    "half_windows",
    "seed",
    "test_list",
    "test_root",
    "skip_bad_images",
    "exif",
)  # options that decide the result
RESERVED = ("constant predictor", "ensemble")  # rows of the scores that are no member's
# All but score.json that an ensemble may write, which one with other options leaves out.
WRITTEN = (
    "predictions.parquet", "calibrated.parquet", "table.txt", "test_predictions.parquet", "submission.txt"
)  # fmt: skip
BOUNDS = OPTION_BOUNDS | {
    "folds": (2, 10_000), "retries": (0, 1000), "cpus_per_member": (0, 4096), "gpus_per_member": (0, 64)
}  # fmt: skip

PROG = "python -m mtl_dist.ensemble"


@dataclass(frozen=True)
class EnsembleCommand:
    runs: tuple[str, ...]
    """Runs to ensemble, of either view, several of one too: <storage>/<name> of each, as training printed it."""
    out: str
    """Directory or s3:// prefix to write to; what an earlier ensemble wrote there is replaced."""
    val: tuple[str, ...] = ()
    """Validation sets in the order of --runs, where they have moved since training."""
    steps: tuple[Step, ...] = ("temperature", "weights", "thresholds", "smoothing")
    """Calibration on top of the plain mean, always in this order; `--steps` with nothing behind it: none."""
    folds: int = 5
    """Folds of videos to fit and score the steps on."""
    half_windows: tuple[int, ...] = (0, 5, 10, 15, 25, 50)
    """Frame numbers either way that smoothing chooses from."""
    seed: int = 0
    """Deals videos into folds."""
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


class Fitted(NamedTuple):
    """What calibration found."""

    crossfit: CrossFit
    folds: np.ndarray  # (n,) of every row
    final: Calibration  # fitted on all rows


def main(args: list[str] | None = None) -> None:
    with plain_refusals(PROG):
        command = tyro.cli(EnsembleCommand, args=args, prog=PROG, description=__doc__)
    _check_command(command)
    from mtl_dist.objective.metrics import constant_scores, metric_sums, scores
    from mtl_dist.predicting.ensembling import TEST, VAL, Prediction, predict_members
    from mtl_dist.predicting.members import check_apart, open_member, unique_names
    from mtl_dist.predicting.submission import find_images, read_test_list
    from mtl_dist.training.tracking import print_scores

    test_names = read_test_list(command.test_list) if command.test_list else None
    opened = [open_member(run, *command.val[place : place + 1]) for place, run in enumerate(command.runs)]
    members = dict(zip(unique_names([member.run_uri for member in opened], taken=RESERVED), opened))
    check_members(opened)
    check_apart(command.out, command.runs)
    views = sorted({member.val.view for member in opened})
    test = None
    if test_names:
        skip = command.skip_bad_images
        test = {view: find_images(command.test_root, view, test_names, skip_missing=skip) for view in views}
    storage.check_writable(command.out, flag="--out")
    how = Prediction(
        command.batch, command.workers, command.device, command.cache_dir, command.cpus_per_member,
        command.gpus_per_member, command.retries, command.local, command.autoscaling, command.skip_bad_images,
        command.exif)  # fmt: skip
    tables = predict_members(members, command.out, how=how, test_names=test_names, test=test)
    found = [tables[name][VAL] for name in members]
    _check_names(list(members), found)
    ensemble = combine([table.predicted for table in found])

    results = {"constant predictor": constant_scores(opened[0].val.labels)}
    for name, table in zip(members, found):
        results[name] = scores(metric_sums(table.predicted.predictions, table.predicted.targets))
    results["ensemble"] = scores(metric_sums(ensemble.predictions, ensemble.targets))
    fitted = _calibrate(found, command)
    steps = {name: scores(sums) for name, sums in fitted.crossfit.sums.items()} if fitted else {}

    report = {
        "p": results["ensemble"]["p"],
        "p_calibrated": list(steps.values())[-1]["p"] if steps else None,
        "covers": results["ensemble"]["covers"],
        "scores": results,
        "steps": steps,
        "calibration": _about_calibration(fitted, command, list(members), found[0]) if fitted else None,
        "members": [_about(name, member) for name, member in members.items()],
        "rows": opened[0].val.rows,
        "test": {"list": command.test_list, "rows": len(test_names)} if test_names else None,
        "options": {name: getattr(command, name) for name in RECORDED},
    }
    notes: list[str] = []
    files = _render_tables(ensemble, found[0], fitted, results, _step_rows(steps))
    if test_names:
        predicted = [tables[name][TEST].predicted for name in members]
        test_files, notes = _render_test(test_names, predicted, fitted.final if fitted else None)
        files |= test_files
    _write(command.out, files | {"score.json": seal(report)})
    print_scores(results, title=f"{report['rows']} validation rows")
    if steps:
        num_folds = len(fitted.crossfit.calibrations)
        print_scores(_step_rows(steps), title=f"what each step adds, fitted on other videos ({num_folds} folds)")
        if test_names and report["p_calibrated"] < report["p"]:
            print(
                "note: submission.txt is calibrated, which lowered P on other videos; name the --steps to keep, or none"
            )
    for note in notes:
        print(f"note: {note}")
    print(f"challenge score P {report['p']:.4f} of {len(report['covers'])} task(s): {', '.join(report['covers'])}")
    print("wrote " + ", ".join(storage.join(command.out, name) for name in (*files, "score.json")))


def _check_command(command: EnsembleCommand) -> None:
    if not command.runs:
        raise InputError("--runs names no run; expected one or more, as training printed them")
    if command.val and len(command.val) != len(command.runs):
        raise InputError(f"--val names {len(command.val)} sets for {len(command.runs)} runs; expected one each")
    if (command.test_list is None) != (command.test_root is None):
        raise InputError("--test-list and --test-root belong together: which frames to submit, and their images")
    for flag, is_set in (("--skip-bad-images", command.skip_bad_images), ("--exif", command.exif != "apply")):
        if is_set and not command.test_list:
            raise InputError(f"{flag} is for the images of --test-list, and none is given; leave it out")
    check_numbers(BOUNDS, **vars(command))
    if not command.half_windows or not 0 <= min(command.half_windows) <= max(command.half_windows) < 10**6:
        raise InputError(f"--half-windows is {list(command.half_windows)}; expected numbers from 0, such as 0 5 10")
    for name in ("runs", "steps", "half_windows"):
        values = getattr(command, name)
        if twice := [value for place, value in enumerate(values) if value in values[:place]]:
            raise InputError(f"--{name.replace('_', '-')} has '{twice[0]}' twice; expected each once")


def check_members(members: list[Member]) -> None:
    """Raise `InputError` naming two members that are one, or whose rows are of different data."""
    first = members[0]
    for place, member in enumerate(members):
        if same := [m for m in members[:place] if m.checkpoint.files == member.checkpoint.files]:
            raise InputError(
                f"{same[0].run_uri} and {member.run_uri} are one and the same: both have the checkpoint "
                f"{member.checkpoint.uri}; a member counts once"
            )
        if member.val.source_sha256 != first.val.source_sha256:
            pairs = ((first, "is scored on"), (member, "on"))
            sets = " and ".join(
                f"{m.run_uri} {verb} {m.val_uri} (index {m.val.sha256[:12]}, of source {m.val.source_sha256[:12]})"
                for m, verb in pairs
            )
            raise InputError(
                f"{sets}: validation sets from different sources, or from other choices of rows; make all from one "
                "source with the same options, or ensemble them apart"
            )


def _check_names(names: list[str], tables: list[PredictionTable]) -> None:
    for name, table in zip(names, tables):
        if table.images != tables[0].images:
            place = next((i for i, pair in enumerate(zip(table.images, tables[0].images)) if len(set(pair)) > 1), 0)
            raise InputError(
                f"the validation sets of {names[0]} and {name} have other images for one row, such as "
                f"{tables[0].images[place]} and {table.images[place]}; make both from one source"
            )


def combine(members: list[Predicted]) -> Predicted:
    """Average probabilities and VA of members, row by row. Raises `InputError` where rows or labels do not pair."""
    import numpy as np

    first = members[0]
    for other in members[1:]:
        if not np.array_equal(first.rows, other.rows):
            odd = np.setxor1d(first.rows, other.rows)[:5].tolist()
            raise InputError(
                f"the members' validation sets do not hold the same rows (such as {odd}); make them from one source"
            )
        for name, mine, theirs in zip(first.targets._fields, first.targets, other.targets):
            if not np.array_equal(mine, theirs):
                raise InputError(f"the members' labels differ ({name}) for one row; make their sets from one source")
    columns = zip(*(member.predictions for member in members))
    return first._replace(predictions=type(first.predictions)(*(np.mean(column, axis=0) for column in columns)))


# --------------------------------------------------------------------------------------------------------- calibration


def _calibrate(found: list[PredictionTable], command: EnsembleCommand) -> Fitted | None:
    """Fit the steps for every fold and on all rows; None where none is asked for, or all rows are of one video."""
    import pyarrow as pa

    from mtl_dist.objective.calibration import fit, stack_members
    from mtl_dist.objective.crossfit import cross_fit, make_folds
    from mtl_dist.objective.smoothing import make_timeline
    from mtl_dist.progress import progress_bar
    from mtl_dist.shards.splits import group_rows

    if not command.steps:
        return None
    (_, _, targets), images, videos = found[0]
    folds = make_folds(group_rows(pa.array(videos), None), command.folds, seed=command.seed)
    if not folds.any():
        print(f"all {len(images)} rows are of one video: nothing can be fitted on other videos, so nothing is fitted")
        return None
    members, timeline = stack_members([table.predicted.predictions for table in found]), make_timeline(images, videos)
    options = {"steps": command.steps, "half_windows": command.half_windows}
    if videos == images:
        print(
            "note: no image names a video that it shares with another, so single images are dealt into folds: where "
            "several show one person, what is fitted on some is scored on that person too; a set made from a table "
            "with a column person keeps people apart"
        )
    with progress_bar("fitting", int(folds.max()) + 2) as advance:
        crossfit = cross_fit(members, targets, timeline, folds=folds, progress=advance, **options)
        final = fit(members, targets, timeline, **options)
        advance(1)
    return Fitted(crossfit, folds, final)


def _step_rows(steps: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name every step with what it adds to P over the one before it."""
    rows, before = {}, None
    for name, scored in steps.items():
        rows[name if before is None else f"{name} ({scored['p'] - before:+.4f} P)"] = scored
        before = scored["p"]
    return rows


def _about_calibration(
    fitted: Fitted, command: EnsembleCommand, names: list[str], first: PredictionTable
) -> dict[str, Any]:
    """Say which rows every parameter was fitted on, and where it was applied. The fold of each row is in the table."""
    from mtl_dist.objective.calibration import describe

    has_videos = first.videos != first.images
    folds = []
    for number, calibration in enumerate(fitted.crossfit.calibrations):
        held_out = [name for name, fold in zip(first.videos, fitted.folds) if fold == number]
        about = {"scored_rows": len(held_out), "fitted_rows": len(first.images) - len(held_out)}
        if has_videos:
            about["scored_videos"] = sorted(set(held_out))
        folds.append(about | {"parameters": describe(calibration, names, steps=command.steps)})
    return {
        "steps": list(fitted.crossfit.sums)[1:],
        "half_windows": list(command.half_windows),
        "seed": command.seed,
        "split_by": "video" if has_videos else "image",
        "folds": folds,  # each was scored with parameters fitted on all the others
        "parameters": describe(fitted.final, names, steps=command.steps),  # fitted on all rows; for new data
    }


# ------------------------------------------------------------------------------------------------------------- outputs


def _render_tables(
    ensemble: Predicted, first: PredictionTable, fitted: Fitted | None, results: dict, steps: dict
) -> dict[str, pa.Table | bytes]:
    import pyarrow as pa

    from mtl_dist.predicting.predictions import prediction_table
    from mtl_dist.training.tracking import render_scores

    names = {"images": first.images, "videos": first.videos, "labels": True}
    files: dict[str, Any] = {"predictions.parquet": prediction_table(ensemble, **names)}
    text = render_scores(results)
    if fitted:
        calibrated = ensemble._replace(predictions=fitted.crossfit.predictions)
        table = _with_decisions(prediction_table(calibrated, **names), fitted.crossfit.au_on)
        files["calibrated.parquet"] = table.append_column("fold", pa.array(fitted.folds))
        text += f"\nwhat each step adds, fitted on other videos\n{render_scores(steps)}"
    return files | {"table.txt": text.encode()}


def _render_test(
    names: list[str], found: list[Predicted], final: Calibration | None
) -> tuple[dict[str, pa.Table | bytes], list[str]]:
    """Combine what members predicted of the test list, calibrated as the validation rows found it best.

    Returns the files, and what is to be said of frames without a picture.
    """
    import numpy as np

    from mtl_dist.objective.calibration import Calibration, apply, stack_members
    from mtl_dist.objective.metrics import Targets
    from mtl_dist.objective.smoothing import make_timeline
    from mtl_dist.predicting.evaluate import Predicted
    from mtl_dist.predicting.predictions import fill_missing, prediction_table
    from mtl_dist.predicting.submission import submission_text

    final = final or Calibration.plain_mean(len(found))
    rows, predictions, num_partial = _same_rows(found)
    images = [names[row] for row in rows]
    combined = apply(stack_members(predictions), final, make_timeline(images))
    au_on = combined.au > final.thresholds
    none = Targets(*(np.zeros(0) for _ in Targets._fields))
    table = prediction_table(Predicted(rows, combined, none), images, labels=False)
    filled = fill_missing(names, rows, (combined.va, combined.expr.argmax(-1), au_on))
    files = {
        "test_predictions.parquet": _with_decisions(table, au_on),
        "submission.txt": submission_text(names, *filled.values).encode(),
    }
    partial = f"{num_partial} of {len(names)} frames have a picture in one view alone, whose members decide"
    return files, [note for note in (partial if num_partial else "", filled.note) if note]


def _same_rows(found: list[Predicted]) -> tuple[np.ndarray, list[Predictions], int]:
    """Return the rows that any member has, and predictions of all: a member without a row has the others' mean.

    The last is the number of rows that not all members have.
    """
    import numpy as np

    from mtl_dist.objective.metrics import Predictions

    rows = np.unique(np.concatenate([member.rows for member in found]))
    has = np.stack([np.isin(rows, member.rows) for member in found])  # (members, rows)
    columns = []
    for values in zip(*(member.predictions for member in found)):
        column = np.zeros((len(found), len(rows), values[0].shape[1]), values[0].dtype)
        for place, own in enumerate(values):
            column[place, has[place]] = own
        mean = column.sum(0) / has.sum(0)[:, None]
        columns.append(np.where(has[..., None], column, mean.astype(column.dtype)))
    return rows, [Predictions(*member) for member in zip(*columns)], int((~has.all(0)).sum())


def _with_decisions(table: pa.Table, au_on: np.ndarray) -> pa.Table:
    """Add the action units as decided, on or off."""
    import pyarrow as pa

    from mtl_dist.objective.calibration import AU_NAMES

    for name, column in zip(AU_NAMES, au_on.T):
        table = table.append_column(name, pa.array(column))
    return table


def _write(out: str, files: dict[str, pa.Table | bytes]) -> None:
    """Write everything, each file whole or not at all, score.json last.

    What an earlier ensemble wrote there goes first: its submission beside this one's scores would be sent in.
    """
    from mtl_dist.predicting.predictions import write_parquet

    for name in ("score.json", *WRITTEN):
        storage.delete(storage.join(out, name))
    for name, content in files.items():
        if isinstance(content, bytes):
            storage.write_bytes(storage.join(out, name), content)
        else:
            write_parquet(storage.join(out, name), content)


def _about(name: str, member: Member) -> dict[str, Any]:
    from mtl_dist.predicting.ensembling import VAL, table_name

    return {
        "name": name,
        "run": member.run_uri,
        "view": member.val.view,
        "checkpoint": member.checkpoint.uri,
        "step": member.checkpoint.step,
        "p_in_training": member.checkpoint.score,
        "validation_set": {"uri": member.val_uri, "sha256": member.val.sha256},
        "predictions": table_name(name, VAL),
    }


if __name__ == "__main__":
    run_command(main, interrupted="what members were predicted is kept, and the same command continues")
