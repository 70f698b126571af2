"""What a run will do, found out before anything starts: its data, its order, its checkpoints, its size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mtl_dist import storage
from mtl_dist.config import Config
from mtl_dist.data.balanced import BalancedOrder
from mtl_dist.data.cache import GIB, Cache
from mtl_dist.data.index import NO_SET, Sets, check_pair, check_stored, read_sets
from mtl_dist.data.mixed import MixedOrder, build_mixed_order, pass_rows, shares_of, split_batch
from mtl_dist.data.order import Order
from mtl_dist.data.samples import Samples, noun_of, open_samples
from mtl_dist.data.task_orders import TaskOrders, build_task_orders
from mtl_dist.errors import Damaged, InputError
from mtl_dist.families import FEATURES, objective_of
from mtl_dist.label_counts import LabelCounts
from mtl_dist.objective.labelled import check_labels, note_labels
from mtl_dist.objective.scores import HOW_TO_SCORE, NO_SCORE, Score, find_score
from mtl_dist.progress import progress_bar
from mtl_dist.shards.folds import part_by_fold
from mtl_dist.shards.overlap import check_shared, find_shared
from mtl_dist.training.balance import Balance, build_balance, describe_balance
from mtl_dist.training.sinks.opening import check_installed

if TYPE_CHECKING:
    from mtl_dist.runs.start import Start


AnyOrder = Order | BalancedOrder | MixedOrder | TaskOrders


class Data(NamedTuple):
    """The sets of a run, and how many steps an epoch over the first has."""

    train: Sets
    val: Sets | None  # None: nothing is scored
    num_samples: int  # of training: rows, or windows of rows
    noun: str  # what they are called
    steps_per_epoch: int
    tasks: tuple[str, ...]  # that a step reads a batch of each; none: one batch with the labels of all

    def identity(self) -> dict[str, str]:
        """What a checkpoint must agree with besides the configuration."""
        return {"training set": self.train.sha256, "validation set": self.val.sha256 if self.val else NO_SET}


def open_data(config: Config) -> Data:
    """Read the indexes and check that they fit each other and the configuration. Raises `InputError`.

    Everything is found out from the indexes; to hold a fold out, from sidecars too.
    """
    cache = _cache(config)
    train, val = _open_sets(config, cache)
    _check_inputs(config, train)
    if objective_of(config.model.name).reads_labels:
        check_labels(config.loss, train.labels, val and val.labels, names=(str(train), str(val)))
    batch, share, tasks = config.train.global_batch, config.data.epoch_fraction, ()
    noun = noun_of(train, config)
    samples = open_samples(train, config, cache)
    if noun == "windows":
        _check_windows(config, train, samples)
    num_samples = int(samples.group_sizes.sum())
    if config.data.mix:
        _check_mix(config, train, noun)
    rows = {"": num_samples}
    if config.data.sampling == "per_task":
        counts = {task: count for task, count in train.labels.of_tasks().items() if count}
        rows, tasks = {f" with labels of {task}": count for task, count in counts.items()}, tuple(counts)
    for which, count in rows.items():
        if _share_of(count, share) < batch:
            part = f", of which an epoch reads {share:g} (data.epoch_fraction)" if share < 1 else ""
            raise InputError(
                f"train.global_batch is {batch}, but {train} has {count} {noun}{which}{part}; use a smaller batch"
            )
    if not rows:
        raise InputError(f"data.sampling is per_task, but {train} has no labels of any task")
    return Data(train, val, num_samples, noun, _share_of(min(rows.values()), share) // batch, tasks)


def _open_sets(config: Config, cache: Cache) -> tuple[Sets, Sets | None]:
    """Read what is trained on, and what it is scored on: a set, a fold, or nothing."""
    for flag, uris in (("data.train", config.data.train or [""]), ("data.val", config.data.val)):
        if not all(uris):
            raise InputError(f"--{flag} is not given; expected the directory or s3:// prefix that holds an index.json")
    train = read_sets(config.data.train)
    if config.data.fold:
        return part_by_fold(train, config.data.fold, cache)
    if not config.data.val:
        return train, None
    val = read_sets(config.data.val)
    check_pair(train, val)
    return train, val


def _check_inputs(config: Config, train: Sets) -> None:
    """Raise where the model does not read what the sets hold."""
    widths, own = [extractor.width for extractor in train.extractors], config.model
    if bool(widths) != (own.backbone == FEATURES):
        holds, other = ("features", "pictures") if widths else ("pictures", "features")
        raise InputError(
            f"{train} holds {holds}, and model.backbone {own.backbone} reads {other}; give a set of {other}, or "
            + ("a model of features: --preset small-c" if widths else "another model.backbone")
        )
    if not widths:
        return
    if list(own.sequence.dims) != widths:
        raise InputError(
            f"model.sequence.dims is {list(own.sequence.dims)}, and {train} has rows of {widths} numbers; leave it "
            "out: it is filled in from data.train"
        )


def _check_mix(config: Config, train: Sets, noun: str) -> None:
    """Raise where the sets cannot give their parts of a step."""
    if noun == "windows":
        raise InputError("data.mix is for pictures, and these samples are windows of videos; leave it out")
    if len(config.data.mix) != len(train.parts()) or len(config.data.mix) < 2:
        raise InputError(
            f"data.mix has {len(config.data.mix)} share(s) and data.train {len(train.parts())} set(s); give two sets "
            "or more, and a share for each"
        )
    batch = config.train.global_batch
    of_sets = zip(*(split_batch(batch, shares) for shares in shares_of(config)))
    for uri, labels, counts in zip(train.uris, train.label_counts, of_sets):
        if (most := max(counts)) > (rows := pass_rows(labels.rows)):
            raise InputError(
                f"data.mix gives {most} of train.global_batch {batch} rows to {uri}, and a pass over it has {rows}: a "
                "row would come twice in a step; give it a smaller share, or a smaller batch"
            )
        if not most:
            raise InputError(
                f"data.mix leaves {uri} out: its share is less than half a row of train.global_batch {batch}; give it "
                "a larger share, or leave the set out of data.train"
            )


def _check_windows(config: Config, train: Sets, samples: Samples) -> None:
    """Raise where windows cannot be had as they are asked for."""
    window, longest = config.model.sequence.window, int(samples.whole().frames.max())
    if window > longest:
        raise InputError(
            f"model.sequence.window is {window} rows, and the longest video of {train} has {longest}; give a shorter "
            "window"
        )
    if config.data.sampling != "masked":
        raise InputError(
            f"data.sampling is {config.data.sampling}, and which window has a label of a task is another in every "
            "epoch; give data.sampling masked"
        )


def note_data(config: Config, data: Data) -> list[str]:
    """Say what of the data is not trained, or not scored; and of what video nothing of time can be learnt."""
    alone = int((data.train.video_rows == 1).sum()) if data.train.extractors else 0
    about = f"{alone} training video(s) have one row: nothing comes before or after it" if alone else ""
    is_read = objective_of(config.model.name).reads_labels
    notes = note_labels(config.loss, data.train.labels, data.val and data.val.labels) if is_read else []
    return [*notes, *filter(None, [about])]


def _share_of(count: int, share: float) -> int:
    return math.floor(count * share + 1e-9)  # 0.29 of 100 is 29


def build_order(
    config: Config, data: Data, train: Samples, progress: Callable[[int], None] = lambda count: None
) -> AnyOrder:
    """Make the order of training. `per_task` and balanced sampling read all labels; `progress` is told of shards."""
    settings, group_sizes, steps = _settings_of(config), train.group_sizes, data.steps_per_epoch
    if data.tasks:
        labelled = train.labelled(progress)
        chosen = {task: labelled[task] for task in data.tasks}
        return build_task_orders(chosen, group_sizes, epoch_steps=steps, **settings)
    if config.data.mix:
        sizes = [part.group_sizes for part in train.parts]
        batch, block, seed = config.train.global_batch, config.data.block_shards, config.run.seed
        how = {"global_batch": batch, "num_steps": steps, "block_shards": block, "seed": seed}
        return build_mixed_order(sizes, shares_of(config), **how)
    if config.data.balance != "none":
        return _balance(config, data, train, progress).order
    is_whole = config.data.epoch_fraction == 1
    return Order(group_sizes, epoch_steps=None if is_whole else steps, **settings)


def _settings_of(config: Config) -> dict[str, int]:
    """Return what orders of one batch are made with."""
    return {
        "global_batch": config.train.global_batch,
        "streams": config.num_streams,
        "block_shards": config.data.block_shards,
        "seed": config.run.seed,
    }


def _balance(config: Config, data: Data, train: Samples, progress: Callable[[int], None]) -> Balance:
    of_set = Order(train.group_sizes, epoch_steps=data.steps_per_epoch, **_settings_of(config))
    return build_balance(config.data, of_set, train, str(data.train), progress)


def check_scored(data: Data, score: Score, *, setting: str, what: str) -> None:
    """Raise `InputError` where runs could not compete by a score: `setting` names it, `what` is what competes."""
    if not data.val:
        raise InputError(f"{what}s compete by {setting} {score.key}, and there is {NO_SCORE}; {HOW_TO_SCORE}")
    if score.task in data.val.labels.missing_tasks():
        raise InputError(
            f"{setting} is {score.key}, and {data.val} has no labels of {score.task}: no {what} would be scored; "
            "give another metric, or a validation set with such labels"
        )


class Plan(NamedTuple):
    """What a run will do."""

    text: str
    begins: bool  # there is no checkpoint to go on from

    def __str__(self) -> str:
        return self.text


def plan_run(config: Config, *, num_ranks: tuple[int, int] | None = None, compares: bool = True) -> Plan:
    """Check what the storage can tell before ranks start, and say what will happen. Raises `InputError`.

    `num_ranks` is the least and the most; None: `ray.num_ranks`. `compares`: also look for pictures that both sets
    have, for which up to 128 MiB are read, and read all labels for balanced sampling.
    """
    from mtl_dist.runs.checkpoint import committed, read_state
    from mtl_dist.runs.patience import Patience, watched_score
    from mtl_dist.runs.same_run import check_same_run
    from mtl_dist.runs.start import check_pretrained, describe_start, find_start
    from mtl_dist.runs.teacher import TAUGHT_BY, describe_teacher, find_teacher

    check_installed(config.run.track)
    for key in config.checkpoint.best_of:
        find_score(key, setting="checkpoint.best_of")
    data = open_data(config)
    if config.train.patience:
        check_scored(data, watched_score(config), setting="checkpoint.best_of", what="run of train.patience")
    for uri, index in data.train.pairs() + (data.val.pairs() if data.val and not data.val.part else []):
        check_stored(uri, index)
    storage.check_writable(config.run.uri)
    found, _ = committed(config.run.uri)
    start, begins, state = None, False, {}
    for checkpoint in reversed(found):
        try:
            state = read_state(checkpoint)
        except Damaged:
            continue  # damaged: the run will pass it over too, and say so
        check_same_run(state, config, data.identity(), checkpoint.uri)
        done = checkpoint.step
        break
    else:
        check_pretrained(config)
        start, begins = find_start(config, data.identity()), True
        _check_extractors(start, data.train)
        done = _steps_before(config, data, start)
    if config.run.audit_dir:
        storage.check_writable(str(config.run.audit_dir), flag="--run.audit-dir")
    notes = note_data(config, data) + ([f"it begins with {describe_start(start.note)}"] if start else [])
    if teacher := find_teacher(config, data.train, state.get(TAUGHT_BY)):
        notes.append(f"labels that are missing are told by {describe_teacher(teacher)}")
    if compares and data.val:
        shared = find_shared(data.train, data.val)
        check_shared(shared, data.train, data.val)
        notes += filter(None, [shared.note()])
    notes += _note_profile(config, data, done)
    how = {"done": done, "ended": Patience(config, state).ended, "num_ranks": num_ranks or config.ray.num_ranks}
    text = _describe(config, data, notes, begins=begins, **how)
    drawn = _describe_drawn(config, data) if compares and config.data.balance != "none" else []
    return Plan("\n".join([text, *drawn]), begins=not done)


def _note_profile(config: Config, data: Data, done: int) -> list[str]:
    """Say where there is no step to profile. Raises `InputError` where there never is one."""
    first, last = config.run.profile, data.steps_per_epoch * config.last_epoch
    if first and first > last:
        raise InputError(f"run.profile is {first}, and the run ends at step {last}; give an earlier step")
    return [f"run.profile is {first}, and step {done} is done: there is no profile"] if first and first <= done else []


def _check_extractors(start: Start | None, train: Sets) -> None:
    """Raise `InputError` where a model would go on with features that mean something else."""
    theirs = start.extractors if start else []
    if theirs and [each.identity for each in theirs] != [each.identity for each in train.extractors]:
        raise InputError(
            f"run.start {start.uri} was trained on features of {', '.join(each.name for each in theirs)}, and {train} "
            f"has those of {', '.join(each.name for each in train.extractors) or 'none'}; give features of the same"
        )


def _epochs_of(config: Config) -> str:
    """Name the setting that ends training."""
    name = "train.epochs" if config.last_epoch == config.train.epochs else "train.stop_epoch"
    return f"{name} {config.last_epoch}"


def _steps_before(config: Config, data: Data, start: Start | None) -> int:
    """Return how many steps what a run begins with has had. Raises `InputError` where none would be left."""
    done = start.state["step"] if start and config.run.start_with == "everything" else 0
    if done >= (total := data.steps_per_epoch * config.last_epoch):
        raise InputError(
            f"run.start {start.uri} has had {done} steps, and {_epochs_of(config)} are {total}: give "
            "more epochs, or begin with less: --run.start-with model"
        )
    return done


def _describe(
    config: Config, data: Data, notes: list[str], *, done: int, ended: str, num_ranks: tuple[int, int], begins: bool
) -> str:
    train, val, steps = data.train, data.val, data.steps_per_epoch
    total = steps * config.train.epochs
    low, high = num_ranks
    where = f", {'begins after' if begins else 'continues from'} step {done}" if done else ", begins"
    if ended or done >= steps * config.last_epoch:
        where = f", is finished (step {done} of {total}{ended and f'; {ended}'}): nothing is left to do"
    weights = f"of {config.run.start}" if config.run.start else config.model.weights
    frozen = " (frozen)" if config.model.freeze_backbone else ""
    batch = config.train.global_batch
    size_mb = sum(shard.tar_bytes for shard in train.shards) / 1e6
    inputs, numbers = f"input {config.input_size} x {config.input_size}", 3 * config.input_size**2
    if widths := [extractor.width for extractor in train.extractors]:
        inputs, numbers = f"rows of {' + '.join(map(str, widths))}", sum(widths)
    if data.noun == "windows":
        window = config.model.sequence.window
        inputs, numbers = f"windows of {window}, {inputs}", numbers * window
    inputs_mb = batch * max(len(data.tasks), 1) * numbers * 4 / 1e6
    ranks = (f"{high}" if low == high else f"{low} to {high}") + " rank" + "s" * (high > 1)
    streams = "" if config.data.mix else f"{config.num_streams} streams, "
    num_left = data.num_samples - steps * batch
    left_out = f"{num_left} {data.noun} an epoch are left out, others each time"
    left_out = left_out if num_left else f"every {data.noun.removesuffix('s')} once an epoch"
    if config.data.balance != "none":
        left_out = f"of {data.noun} that are drawn anew for every epoch"
    if config.data.mix:
        left_out = f"of {len(config.data.mix)} sets, as below"
    if data.tasks:
        left_out = f"each of {len(data.tasks)} batches, of rows with labels of {', '.join(data.tasks)}"
    lines = [
        f"run     {config.run.uri}{where}",
        f"train   {train}: {train.rows} rows of {train.view}, {_labelled(train.labels)}, "
        f"{len(train.shards)} shards, {size_mb:.1f} MB",
        f"val     {val}: {val.rows} rows, {_labelled(val.labels)}, {len(val.shards)} shards"
        if val
        else f"val     {NO_SCORE}; {HOW_TO_SCORE}",
        f"steps   {steps} an epoch, {total} in all; {left_out}",
        f"batch   {batch} over {ranks}, {streams}{inputs_mb:.0f} MB of inputs",
        f"model   {config.model.name}, backbone {config.model.backbone}{frozen}, weights {weights}, {inputs}",
    ]
    return "\n".join([*lines, *_describe_mix(config, data), *(f"note    {note}" for note in notes)])


def _describe_drawn(config: Config, data: Data) -> list[str]:
    """Say what balanced sampling draws: all labels are read for it."""
    with progress_bar("reading labels", len(data.train.shards)) as advance:
        balance = _balance(config, data, open_samples(data.train, config, _cache(config)), advance)
    return describe_balance(config, balance)


def _cache(config: Config) -> Cache:
    return Cache(config.data.cache_dir, max_bytes=int(config.data.cache_gib * GIB))


def _describe_mix(config: Config, data: Data) -> list[str]:
    """Say what each set gives to a step, and how often it is seen in the whole run."""
    if not config.data.mix:
        return []
    sizes = [np.array([labels.rows]) for labels in data.train.label_counts]
    how = {"global_batch": config.train.global_batch, "num_steps": data.steps_per_epoch}
    order = build_mixed_order(sizes, shares_of(config), block_shards=1, seed=0, **how)
    first, last, lines = order.counts[0], order.counts[-1], []
    for uri, begin, end, passes in zip(data.train.uris, first, last, order.passes(config.train.epochs)):
        counts = f"{begin}" if begin == end else f"{begin}, and {end} in the last epoch,"
        lines.append(
            f"mix     {counts} of a step's {config.train.global_batch} rows are of {uri}: read {passes:.1f} times"
        )
    return lines


def _labelled(counts: LabelCounts) -> str:
    return f"labelled {', '.join(f'{task} {count}' for task, count in counts.of_tasks().items())}"
