"""Predict the members of an ensemble, over the cluster where there is one, and keep what each predicted.

Predictions are tables in <out>/members/, one for each member and set. A table has a key: what it was made of. So an
interrupted ensemble goes on with the tables that are there, and another ensemble in the same place uses those that
still fit.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import nn

from mtl_dist import storage
from mtl_dist.data.augment import build_preparation
from mtl_dist.data.decode import Exif
from mtl_dist.data.frames import Seen, image_batches
from mtl_dist.device import named_device
from mtl_dist.errors import InputError
from mtl_dist.joining import has_cluster
from mtl_dist.objective.affect import PredictedRows
from mtl_dist.predicting.cluster import TaskFailed, map_over_cluster
from mtl_dist.predicting.evaluate import predict
from mtl_dist.predicting.members import Member, predict_member, row_names
from mtl_dist.predicting.predictions import (
    PredictionTable,
    check_finite,
    prediction_table,
    read_key,
    read_predictions,
    write_parquet,
)
from mtl_dist.predicting.submission import TestImages
from mtl_dist.progress import progress_bar
from mtl_dist.runs.checkpoint import MODEL, STATE
from mtl_dist.runs.weights import load_weights

FORMAT = "mtl_dist-member-1"
VAL, TEST = "val", "test"


class MemberOptions(NamedTuple):
    """How members are predicted."""

    batch: int
    workers: int
    device: str  # auto, cpu or cuda
    cache_dir: Path | None
    cpus: float  # of a member, on the cluster
    gpus: float
    retries: int
    local: bool  # in this process, whatever cluster there is
    autoscaling: bool
    skip_bad: bool = False  # test images that are not there or cannot be decoded have no row
    exif: Exif = "apply"  # of test images


class MemberTask(NamedTuple):
    """What of one member has to be predicted: a task may run on another machine."""

    name: str
    member: Member
    how: MemberOptions
    sets: tuple[str, ...]  # of VAL, TEST
    test_names: list[str]
    test_paths: list[str]


class Finished(NamedTuple):
    """What a task predicted of one member, and why it has nothing of the rest."""

    tables: dict[str, pa.Table]  # by VAL, TEST
    error: str = ""
    can_mend: bool = False  # the user can, and no second try: the error is an `InputError`


def table_name(name: str, part: str) -> str:
    """Return the name, below --out, of what a member predicted of the validation set or the test list."""
    # Not members/<name>.test.parquet: that is the run <name>.test, of the validation set.
    return f"members/{name}.parquet" if part == VAL else f"members/test/{name}.parquet"


def predict_members(
    members: dict[str, Member],
    out: str,
    *,
    how: MemberOptions,
    test_names: list[str] | None = None,
    test: dict[str, TestImages] | None = None,
) -> dict[str, dict[str, PredictionTable]]:
    """Return the tables of every member by its name, {VAL: ..., TEST: ...}; `test` holds images by view.

    Each checkpoint is read once. Raises `InputError` naming the member that could not be predicted after all retries.
    """
    parts = (VAL, TEST) if test else (VAL,)
    keys = {
        (name, part): _key_of(member, test[member.val.view] if part == TEST else None, how)
        for name, member in members.items()
        for part in parts
    }
    tasks = {}
    for name, member in members.items():
        missing = tuple(
            part for part in parts if read_key(storage.join(out, table_name(name, part))) != keys[name, part]
        )
        if missing:
            paths = test[member.val.view].paths if TEST in missing else []
            tasks[name] = _with_absolute_paths(MemberTask(name, member, how, missing, test_names or [], paths))
    if kept := len(members) - len(tasks):
        print(f"{kept} of {len(members)} member(s) predicted already, in {storage.join(out, 'members')}", flush=True)
    try:
        for name, part, table in _predict_parts(tasks, how):
            write_parquet(storage.join(out, table_name(name, part)), table, key=keys[name, part])
    except TaskFailed as error:
        raise InputError(
            f"member {members[error.name].run_uri} could not be predicted ({error.reason}), tried {how.retries + 1} "
            "time(s), and no ensemble goes without it: mend that, or take the run off --runs; what was predicted is "
            "kept, and the same command continues"
        ) from error
    return {
        name: {part: read_predictions(storage.join(out, table_name(name, part))) for part in parts} for name in members
    }


def _key_of(member: Member, test: TestImages | None, how: MemberOptions) -> str:
    """What decides a prediction, but for the last bits that machines and batch sizes may change."""
    files, exported = member.weights.checkpoint.files, member.weights.exported
    state = exported.model_dump_json() if exported else files[STATE]["sha256"]
    about = {"format": FORMAT, "model": files[MODEL]["sha256"], "state": state}
    about |= {"test": test.sha256} if test else {"val": member.val.sha256}
    if test:  # tables of before EXIF was read do not hold: they are of pictures as they are stored
        about |= {"exif": how.exif} | ({"skip_bad": True} if how.skip_bad else {})
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _with_absolute_paths(task: MemberTask) -> MemberTask:
    """Tasks of Ray work in directories of their own."""
    member, cache_dir = task.member, task.how.cache_dir
    checkpoint = member.weights.checkpoint._replace(uri=storage.absolute(member.weights.uri))
    weights = member.weights._replace(checkpoint=checkpoint)
    val = replace(member.val, uris=tuple(map(storage.absolute, member.val.uris)))
    member = member._replace(weights=weights, val=val)
    how = task.how._replace(cache_dir=cache_dir.expanduser().absolute() if cache_dir else None)
    return task._replace(member=member, how=how)


def _predict_parts(tasks: dict[str, MemberTask], how: MemberOptions) -> Iterator[tuple[str, str, pa.Table]]:
    """Yield (member, part, table) as they are finished; where a task failed half-way, the other half is tried again."""
    while tasks:
        left = {}
        for name, (tables, error, can_mend) in _run(tasks, how):
            for part, table in tables.items():
                yield name, part, table
            if not error:
                continue
            if can_mend:
                raise InputError(f"{error}; what was predicted is kept, and the same command continues")
            if not how.retries:
                raise TaskFailed(name, error)
            print(f"{name} failed half-way and is tried again: {error}", flush=True)
            left[name] = tasks[name]._replace(sets=tuple(part for part in tasks[name].sets if part not in tables))
        tasks, how = left, how._replace(retries=how.retries - 1)


def _run(tasks: dict[str, MemberTask], how: MemberOptions) -> Iterator[tuple[str, Finished]]:
    if how.local or not has_cluster():
        yield from map_here(predict_task, tasks, retries=how.retries)
        return
    print(f"predicting {len(tasks)} member(s) over the cluster: {', '.join(tasks)}", flush=True)
    results = map_over_cluster(
        predict_task, tasks, cpus=how.cpus, gpus=how.gpus, retries=how.retries, autoscaling=how.autoscaling
    )
    with progress_bar("members predicted", len(tasks)) as advance:
        for result in results:
            yield result
            advance(1)


def map_here(function: Callable[[Any], Any], items: dict[str, Any], *, retries: int) -> Iterable[tuple[str, Any]]:
    """Run `function` of every item in this process, one after the other, with the retries of `map_over_cluster`."""
    for name, item in items.items():
        for attempt in range(retries + 1):
            try:
                result = function(item)
                break
            except InputError:
                raise
            except Exception as error:
                traceback.print_exc()
                if attempt == retries:
                    raise TaskFailed(name, f"{type(error).__name__}: {error}") from error
                print(f"{name} failed and is tried again ({attempt + 1} of {retries})", flush=True)
        yield name, result


def predict_task(task: MemberTask) -> Finished:
    """Predict what is wanted of one member; its checkpoint is read once."""
    member, how, tables = task.member, task.how, {}
    on_cluster = has_cluster() and not how.local
    if on_cluster:
        torch.set_num_threads(max(1, int(how.cpus)))  # the node's other cores may be another member's
    # Ray hides no GPU from a task that asked for none.
    device = named_device("cpu" if on_cluster and not how.gpus and how.device == "auto" else how.device)
    model = load_weights(member.weights).to(device)
    if VAL in task.sets:
        with progress_bar(f"predicting {task.name}", member.val.rows) as advance:
            predicted = predict_member(
                member, device=device, batch=how.batch, workers=how.workers, cache_dir=how.cache_dir,
                progress=advance, model=model)  # fmt: skip
        tables[VAL] = _checked_table(predicted, member, *row_names(member, how.cache_dir))
    if TEST in task.sets:
        try:
            tables[TEST] = _predict_test_list(task, model, device)
        except Exception as error:
            if not tables:
                raise
            if isinstance(error, InputError):
                return Finished(tables, str(error), can_mend=True)
            traceback.print_exc()
            return Finished(tables, f"{type(error).__name__}: {error}")
    return Finished(tables)


def _predict_test_list(task: MemberTask, model: nn.Module, device: torch.device) -> pa.Table:
    how, config = task.how, task.member.weights.config
    seen = Seen()
    batches = image_batches(
        task.test_paths, batch=how.batch, size=config.data.image_size, workers=how.workers, skip_bad=how.skip_bad,
        exif=how.exif, seen=seen)  # fmt: skip
    with progress_bar(f"predicting the test list with {task.name}", len(task.test_paths)) as advance:
        predicted = predict(
            model, batches, prepare=build_preparation(config), device=device, bf16=config.engine.autocast == "bf16",
            progress=advance)  # fmt: skip
    if not len(predicted.rows):
        raise InputError(
            f"none of the test list's images can be read, such as {task.test_paths[0]}; correct --test-root"
        )
    for line in seen.lines():
        print(f"{task.name}: {line}", flush=True)
    return _checked_table(predicted, task.member, [task.test_names[row] for row in predicted.rows])


def _checked_table(
    predicted: PredictedRows, member: Member, images: list[str], videos: list[str] | None = None
) -> pa.Table:
    check_finite(predicted.predictions, images, source=member.weights.uri)
    return prediction_table(predicted, images, labels=True, videos=videos)
