"""Make sets of features: open pictures and extractors, plan, make what is missing, write the indexes last."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from mtl_dist import storage
from mtl_dist.data.cache import Cache
from mtl_dist.data.index import (
    FEATURES,
    INDEX_NAME,
    Extractor,
    FeatureIndex,
    check_stored,
    dump_index,
    index_dir,
    read_index,
)
from mtl_dist.data.reader import ShardReader
from mtl_dist.data.video_rows import read_rows
from mtl_dist.device import named_device
from mtl_dist.errors import InputError
from mtl_dist.features.describing import How, Source
from mtl_dist.features.extractors import FeatureNet, find_feature_nets
from mtl_dist.features.folds import find_folds
from mtl_dist.features.leaks import say_leaks
from mtl_dist.features.moments import add_up
from mtl_dist.features.options import CreateOptions
from mtl_dist.features.plan import PictureSet, SetPlan, plan_set
from mtl_dist.features.shard import Finished, ShardTask, make_shard
from mtl_dist.joining import has_cluster
from mtl_dist.machine import num_cpus
from mtl_dist.predicting.cluster import TaskFailed, map_over_cluster
from mtl_dist.processes import as_done, process_pool, spawn, telling
from mtl_dist.progress import progress_bar

CPUS_OF_A_PROCESS = 8  # threads of it compute, and another decodes for them; more would wait for the interpreter
GPU_WORKERS = 4
TRAIN = "train"  # the split whose rows statistics are of


class _Wanted(NamedTuple):
    """A set of features that is to be made."""

    part: PictureSet
    net: FeatureNet
    dest: str


def create_features(dest: str, options: CreateOptions) -> None:
    """Make `<dest>/<view>/<split>/` of every set of pictures, of several extractors `<dest>/<name>/<view>/<split>/`.

    Raises `InputError` before anything is written for what is wrong with pictures, extractors or `dest`.
    """
    storage.check_writable(dest, flag="DEST")
    on_cluster = has_cluster() and not options.local
    pictures = _open_pictures(options)
    nets = find_feature_nets(options)
    say_leaks(pictures, nets)
    place = _place(options, on_cluster)
    wanted = [_Wanted(part, net, _dest_of(dest, net, nets, part)) for net in nets for part in pictures]
    statistics = [_find_statistics(one, wanted, nets, options) for one in wanted]
    with contextlib.ExitStack() as held:
        plans = [
            plan_set(part, net, where, how=place.how, shard_mib=options.shard_mib, claims=held)
            for part, net, where in wanted
        ]
        begun, finished = time.monotonic(), [dict(plan.done) for plan in plans]
        with progress_bar("describing pictures", sum(plan.index.rows for plan in plans)) as advance:
            advance(sum(made.entry.rows for done in finished for made in done.values()))
            todo = {(number, task.name): task for number, plan in enumerate(plans) for task in plan.tasks}
            todo = {key: task for key, task in todo.items() if key[1] not in finished[key[0]]}
            making = _over_cluster(todo, options, advance) if on_cluster else _on_this_machine(todo, place, advance)
            for (number, name), made in making:
                finished[number][name] = made
        _write_indexes(plans, [_place_of_training(one, wanted) for one in wanted], statistics, finished)
    _say(plans, finished, num_made=sum(len(task.rows.samples) for task in todo.values()), begun=begun)


def _open_pictures(options: CreateOptions) -> list[PictureSet]:
    """Open the sets of pictures, with their rows by video. Raises `InputError`."""
    opened: dict[tuple[str, str], PictureSet] = {}
    for given in options.data:
        uri = storage.absolute(index_dir(given))
        index = read_index(uri)
        if (key := (index.view, index.split)) in opened:
            raise InputError(
                f"--data has {opened[key].source.uri} and {uri}, both of view '{index.view}' and split "
                f"'{index.split}': their features would lie at one place; make those of one of them elsewhere"
            )
        check_stored(uri, index)
        cache_dir = options.cache_dir.expanduser().absolute() if options.cache_dir else None
        rows = read_rows(ShardReader(uri, index, Cache(cache_dir)))
        folds = None
        if options.folds and index.split == TRAIN:
            folds = find_folds(rows, options.folds, options.folds_by, source=uri)
        opened[key] = PictureSet(Source(uri, index.sha256, cache_dir), index, rows, folds)
    return sorted(opened.values(), key=lambda part: (part.index.view, part.index.split != TRAIN))


def _dest_of(dest: str, net: FeatureNet, nets: list[FeatureNet], part: PictureSet) -> str:
    names = [net.name] if len(nets) > 1 else []
    return storage.absolute(storage.join(dest, *names, part.index.view, part.index.split))


# ---------------------------------------------------------------------------------------------------------- statistics


def _find_statistics(
    one: _Wanted, wanted: list[_Wanted], nets: list[FeatureNet], options: CreateOptions
) -> FeatureIndex | None:
    """Return the index whose statistics a set gets; None: those of the training rows that this command describes.

    Raises `InputError` where there is none, or one of another extractor.
    """
    if _place_of_training(one, wanted) is not None:
        if options.statistics:
            raise InputError("--statistics is for a validation set that is made alone, and --data has the training set")
        return None
    given = options.statistics[nets.index(one.net)] if options.statistics else None
    uri = given or storage.join(one.dest.rpartition("/")[0], TRAIN)
    if given is None and not storage.exists(storage.join(uri, INDEX_NAME)):
        raise InputError(
            f"{one.dest} would have no mean and deviation: these are of training rows; name the training set in --data "
            "too, or its features with --statistics"
        )
    index = read_index(uri, formats=(FEATURES,))
    if index.split != TRAIN:
        raise InputError(f"--statistics {uri} are features of split '{index.split}'; expected those of '{TRAIN}'")
    if index.extractor.identity != one.net.extractor.identity:
        theirs, mine = map(_describe, (index.extractor, one.net.extractor))
        raise InputError(f"--statistics {uri} are features of {theirs}; expected {mine}, as this set's")
    return index


def _describe(extractor: Extractor) -> str:
    return (
        f"{extractor.name} (weights {extractor.sha256[:12]}, {extractor.input_size} pixels, pool {extractor.pool}, "
        f"{extractor.width} numbers, {extractor.folds} fold(s))"
    )


def _place_of_training(one: _Wanted, wanted: list[_Wanted]) -> int | None:
    """Return the place of the set whose rows a set's statistics are of: its own where it is the training set."""
    for place, other in enumerate(wanted):
        if (other.net, other.part.index.view, other.part.index.split) == (one.net, one.part.index.view, TRAIN):
            return place
    return None


def _write_indexes(
    plans: list[SetPlan],
    training: list[int | None],
    statistics: list[FeatureIndex | None],
    finished: list[dict[str, Finished]],
) -> None:
    """Write every index, last of its set; `training` are the places of the plans whose rows statistics are of.

    Raises `InputError` for one that had other statistics.
    """
    for plan, place, given, done in zip(plans, training, statistics, finished):
        if given is None:
            parts = [finished[place][task.name].moments for task in plans[place].tasks]
            mean, std = add_up(parts, plan.net.width).statistics()
        else:
            mean, std = given.mean, given.std
        index = plan.feature_index(done, mean, std)
        if plan.indexed is not None and (plan.indexed.mean, plan.indexed.std) != (mean, std):
            raise InputError(
                f"{plan.dest}/{INDEX_NAME} has the statistics of other training rows; choose another destination, or "
                "delete it: its shards are kept"
            )
        storage.write_bytes(storage.join(plan.dest, INDEX_NAME), dump_index(index))


# ------------------------------------------------------------------------------------------------------------ the work


class _Place(NamedTuple):
    """How the work is spread on a machine, and how a process of it computes."""

    how: How
    jobs: int  # CPUs or GPUs


def _place(options: CreateOptions, on_cluster: bool) -> _Place:
    """Decide how features are computed: what is computed does not depend on the numbers of processes and threads."""
    if on_cluster:
        device = "cuda" if options.gpus_per_shard else "cpu"
        if options.device not in ("auto", device):
            raise InputError(
                f"--device is {options.device}, and shards get {options.gpus_per_shard:g} GPUs on a cluster"
            )
        threads, jobs = (1, 1) if device == "cuda" else (options.cpus_per_shard, 1)
    else:
        device = named_device(options.device).type
        jobs = options.jobs or (torch.cuda.device_count() if device == "cuda" else num_cpus())
        threads = 1
    workers = options.workers or (GPU_WORKERS if device == "cuda" else -(-threads // CPUS_OF_A_PROCESS))
    return _Place(How(device, options.batch, options.bf16, threads, workers), jobs)


def _on_this_machine(
    todo: dict[tuple[int, str], ShardTask], place: _Place, progress: Callable[[int], None]
) -> Iterator[tuple[tuple[int, str], Finished]]:
    how, processes = place.how, min(place.jobs, len(todo))
    if how.device == "cpu" and todo:
        processes = min(-(-place.jobs // CPUS_OF_A_PROCESS), len(todo))
        threads = place.jobs // processes
        how = how._replace(threads=threads, workers=max(how.workers, -(-threads // CPUS_OF_A_PROCESS)))
    todo = {key: task._replace(how=how) for key, task in todo.items()}
    if processes <= 1:
        for key, task in todo.items():
            yield key, make_shard(task, progress)
        return
    devices = spawn.SimpleQueue()
    for number in range(processes):
        devices.put(number)
    with (
        telling(progress) as told,
        process_pool(processes, begin=_begin, args=(told, devices, how.device)) as pool,
    ):
        yield from as_done(pool, _make_told, todo)


_told: Any = None  # in a process of the pool: the queue that it tells of rows


def _begin(told: Any, devices: Any, device: str) -> None:
    global _told
    _told = told
    if device == "cuda":
        torch.cuda.set_device(devices.get() % torch.cuda.device_count())


def _make_told(task: ShardTask) -> Finished:
    return make_shard(task, _told.put)


def _over_cluster(
    todo: dict[tuple[int, str], ShardTask], options: CreateOptions, progress: Callable[[int], None]
) -> Iterator[tuple[tuple[int, str], Finished]]:
    if not todo:
        return
    names = {f"{task.dest.rpartition('/')[2]} {key[1]} of set {key[0] + 1}": key for key, task in todo.items()}
    print(f"making {len(todo)} shard(s) over the cluster", flush=True)
    made = map_over_cluster(
        make_shard, {name: todo[key] for name, key in names.items()}, cpus=options.cpus_per_shard,
        gpus=options.gpus_per_shard, retries=options.retries, autoscaling=options.autoscaling,
        what="describing pictures", unit="shard")  # fmt: skip
    try:
        for name, finished in made:
            progress(finished.entry.rows)
            yield names[name], finished
    except TaskFailed as error:
        raise InputError(
            f"{error.name} could not be made ({error.reason}), tried {options.retries + 1} time(s); mend that: the "
            "shards that are finished stay, and the same command continues"
        ) from error


# ------------------------------------------------------------------------------------------------------- what is said


def _say(plans: list[SetPlan], finished: list[dict[str, Finished]], *, num_made: int, begun: float) -> None:
    for plan, done in zip(plans, finished):
        index, width = plan.index, plan.net.width
        size = sum(made.entry.tar_bytes for made in done.values())
        num_videos = sum(len(task.rows.videos) for task in plan.tasks)
        vanished = sum(made.num_vanished for made in done.values()) / (index.rows * width)
        print(
            f"{plan.dest}: {index.rows:,} rows of {num_videos:,} videos in {len(plan.tasks):,} shards, {width} numbers "
            f"a row, {size / 1e6:,.1f} MB; {vanished:.2%} of the numbers are too small for float16 and became 0"
        )
    if num_made:
        seconds = time.monotonic() - begun
        print(f"described {num_made:,} pictures in {seconds:.1f} s, {num_made / max(seconds, 1e-9):,.0f} pictures/s")
    else:
        print("nothing is left to do: every shard was there already")
