"""Make an ensemble: predict every member, average, score, calibrate, write."""

from __future__ import annotations

from typing import Any

import numpy as np

from mtl_dist import storage
from mtl_dist.ensemble.by_task import NAME as BY_TASK
from mtl_dist.ensemble.by_task import ByTask, choose_by_task, open_best_of_tasks
from mtl_dist.ensemble.calibrated import about_calibration, calibrate
from mtl_dist.ensemble.folded import group_members, join_tables
from mtl_dist.ensemble.gains import about_gains, print_gains, render_gains
from mtl_dist.ensemble.options import RECORDED, EnsembleCommand
from mtl_dist.ensemble.outputs import render_tables, render_test, write_files
from mtl_dist.errors import InputError
from mtl_dist.families import reads_videos
from mtl_dist.objective.affect import PredictedRows
from mtl_dist.objective.metrics import metric_sums
from mtl_dist.objective.scores import constant_scores, scores
from mtl_dist.predicting.ensembling import TEST, VAL, MemberOptions, predict_members, table_name
from mtl_dist.predicting.members import Member, check_apart, open_member, unique_names
from mtl_dist.predicting.predictions import PredictionTable
from mtl_dist.predicting.submission import TestImages, find_images, read_test_list
from mtl_dist.sealed import seal
from mtl_dist.training.tracking import print_scores

RESERVED = ("constant predictor", "ensemble", BY_TASK)  # rows of the scores that are no member's


def make_ensemble(command: EnsembleCommand) -> None:
    """Predict every member, write --out and say what came out. Raises `InputError`."""
    test_names = read_test_list(command.test_list) if command.test_list else None
    runs = _open_runs(command)
    members = group_members(runs, taken=RESERVED)
    if command.each_task and len(members) < len(runs):
        raise InputError(
            "--each-task chooses among the checkpoints of one run, and members of these runs of folds are several; "
            "leave it out"
        )
    test = _find_test_images(command, runs, test_names) if test_names else None
    storage.check_writable(command.out, flag="--out")
    tables = predict_members(runs, command.out, how=_how(command), test_names=test_names, test=test)
    val_tables = [
        join_tables([tables[run][VAL] for run in of_member], rows=runs[of_member[0]].val.whole.rows)
        for of_member in members.values()
    ]
    _check_names(list(members), val_tables)
    mean = combine([table.predicted for table in val_tables])
    results = _score(list(members), val_tables, mean)
    by_task = _by_task(runs, val_tables, command)
    if by_task:
        results[BY_TASK] = by_task.scores
    fitted = calibrate(val_tables, command)
    steps = {name: scores(sums) for name, sums in fitted.crossfit.sums.items()} if fitted else {}

    report = {
        "p": results["ensemble"]["p"],
        "p_calibrated": list(steps.values())[-1]["p"] if steps else None,
        "covers": results["ensemble"]["covers"],
        "scores": results,
        "steps": steps,
        "gains": about_gains(fitted, by_task, mean, val_tables[0].videos),
        "calibration": about_calibration(fitted, command, list(members), val_tables[0]) if fitted else None,
        "by_task": by_task.chosen if by_task else None,
        "members": [_about_run(run, runs[run], name) for name, of_member in members.items() for run in of_member],
        "rows": len(mean.rows),
        "test": {"list": command.test_list, "rows": len(test_names)} if test_names else None,
        "options": {name: getattr(command, name) for name in RECORDED},
    }
    notes: list[str] = []
    files = render_tables(mean, val_tables[0], fitted, results, _step_rows(steps), render_gains(report))
    if test_names:
        predicted = [combine([tables[run][TEST].predicted for run in of_member]) for of_member in members.values()]
        test_files, notes = render_test(test_names, predicted, fitted.final if fitted else None)
        files |= test_files
    write_files(command.out, files | {"score.json": seal(report)})
    _say(report, notes, num_folds=len(fitted.crossfit.calibrations) if fitted else 0)
    print("wrote " + ", ".join(storage.join(command.out, name) for name in (*files, "score.json")))


def _open_runs(command: EnsembleCommand) -> dict[str, Member]:
    """Open the runs, by names that tell them apart."""
    opened = [
        open_member(run, *command.val[place : place + 1], reads_exports=True, cache_dir=command.cache_dir)
        for place, run in enumerate(command.runs)
    ]
    members = dict(zip(unique_names([member.run_uri for member in opened], taken=RESERVED), opened))
    check_members(opened)
    check_apart(command.out, command.runs)
    return members


def check_members(members: list[Member]) -> None:
    """Raise `InputError` naming two members that are one, or whose rows are of different data."""
    first = members[0]
    for place, member in enumerate(members):
        if same := [m for m in members[:place] if m.weights.checkpoint.files == member.weights.checkpoint.files]:
            raise InputError(
                f"{same[0].run_uri} and {member.run_uri} are one and the same: both have the checkpoint "
                f"{member.weights.uri}; a member counts once"
            )
        if bool(member.fold) != bool(first.fold):
            raise InputError(
                f"{first.run_uri} is scored on {first.val}, and {member.run_uri} on {member.val}: runs of folds are "
                "scored out of fold, on other rows than those of a validation set; ensemble them apart"
            )
        if member.val.source_sha256 != first.val.source_sha256:
            pairs = ((first, "is scored on"), (member, "on"))
            sets = " and ".join(
                f"{m.run_uri} {verb} {m.val} (index {m.val.sha256[:12]}, of source {m.val.source_sha256[:12]})"
                for m, verb in pairs
            )
            raise InputError(
                f"{sets}: validation sets from different sources, or from other choices of rows; make all from one "
                "source with the same options, or ensemble them apart"
            )


def _find_test_images(command: EnsembleCommand, members: dict[str, Member], names: list[str]) -> dict[str, TestImages]:
    """Find the images of the test list in every view that a member reads. Raises `InputError`."""
    for member in members.values():
        if reads_videos(member.weights.config.model.name):
            raise InputError(
                f"--test-list names pictures, and {member.run_uri} reads whole videos; predict these with python -m "
                "mtl_dist.predict, or leave the run out"
            )
    views = sorted({member.val.view for member in members.values()})
    skip = command.skip_bad_images
    return {view: find_images(command.test_root, view, names, skip_missing=skip) for view in views}


def _by_task(members: dict[str, Member], val_tables: list[PredictionTable], command: EnsembleCommand) -> ByTask | None:
    """Predict with the checkpoints that are best at one task, and choose among all, where that is asked for."""
    if not command.each_task:
        return None
    others = open_best_of_tasks(members)
    tables = predict_members(others, command.out, how=_how(command)) if others else {}
    found = choose_by_task(dict(zip(members, val_tables)) | {name: tables[name][VAL] for name in others}, command)
    if found is None:
        print("all rows are of one video: no checkpoint can be chosen on other videos, so none is")
    return found


def _how(command: EnsembleCommand) -> MemberOptions:
    return MemberOptions(
        command.batch, command.workers, command.device, command.cache_dir, command.cpus_per_member,
        command.gpus_per_member, command.retries, command.local, command.autoscaling, command.skip_bad_images,
        command.exif)  # fmt: skip


def _check_names(names: list[str], tables: list[PredictionTable]) -> None:
    for name, table in zip(names, tables):
        if table.images != tables[0].images:
            place = next((i for i, pair in enumerate(zip(table.images, tables[0].images)) if len(set(pair)) > 1), 0)
            raise InputError(
                f"the validation sets of {names[0]} and {name} have other images for one row, such as "
                f"{tables[0].images[place]} and {table.images[place]}; make both from one source"
            )


def combine(members: list[PredictedRows]) -> PredictedRows:
    """Average probabilities and VA of members, row by row. Raises `InputError` where rows or labels do not pair."""
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


def _score(names: list[str], tables: list[PredictionTable], mean: PredictedRows) -> dict[str, dict[str, Any]]:
    """Score the constant predictor, every member and their plain mean."""
    sums = metric_sums(mean.predictions, mean.targets)
    results = {"constant predictor": constant_scores(sums)}
    for name, table in zip(names, tables):
        results[name] = scores(metric_sums(table.predicted.predictions, table.predicted.targets))
    return results | {"ensemble": scores(sums)}


def _step_rows(steps: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name every step with what it adds to P over the one before it."""
    rows, before = {}, None
    for name, scored in steps.items():
        rows[name if before is None else f"{name} ({scored['p'] - before:+.4f} P)"] = scored
        before = scored["p"]
    return rows


def _about_run(name: str, member: Member, of_member: str) -> dict[str, Any]:
    return {
        "name": name,
        **({"member": of_member, "fold": member.fold} if member.fold else {}),
        "run": member.run_uri,
        "view": member.val.view,
        "checkpoint": member.weights.uri,
        "step": member.weights.checkpoint.step,
        "p_in_training": member.weights.checkpoint.score,
        "validation_set": {"uri": str(member.val), "sha256": member.val.sha256},
        "predictions": table_name(name, VAL),
    }


def _say(report: dict[str, Any], notes: list[str], *, num_folds: int) -> None:
    """Print what score.json says."""
    what = "rows, out of fold" if "fold" in report["members"][0] else "validation rows"
    print_scores(report["scores"], title=f"{report['rows']} {what}")
    for task, chosen in (report["by_task"] or {}).items():
        counts = ", ".join(f"{name} in {count}" for name, count in chosen.items())
        print(f"{BY_TASK}, chosen on other videos: {task} from {counts} fold(s)")
    if steps := report["steps"]:
        print_scores(
            _step_rows(steps), title=f"what each step adds, fitted on other videos ({num_folds} folds)", brief=True
        )
    print_gains(report)
    if report["steps"] and report["test"] and report["p_calibrated"] < report["p"]:
        print(
            "note: submission.txt is calibrated, which lowered P on other videos; name the --steps to keep, none, or "
            "--calibrate auto, which leaves out those that do not help"
        )
    for note in notes:
        print(f"note: {note}")
    print(f"challenge score P {report['p']:.4f} of {len(report['covers'])} task(s): {', '.join(report['covers'])}")
