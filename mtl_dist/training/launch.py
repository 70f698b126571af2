"""Start ranks: this process alone or as one of torchrun's, or under Ray Train.

Ray is imported here, in joining.py and stopping.py, in tune/ and cluster/, and nowhere else.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mtl_dist import storage
from mtl_dist.config import Config
from mtl_dist.errors import SCRIPT_PREFIX, Damaged, InputError, RunFailed, StorageError
from mtl_dist.joining import has_cluster, join_cluster, note_idle_gpus
from mtl_dist.machine import num_cpus
from mtl_dist.runs.checkpoint import committed
from mtl_dist.sealed import seal, unseal
from mtl_dist.settings import dump_yaml
from mtl_dist.spans import RANKS, span
from mtl_dist.training.engine import collective_timeout
from mtl_dist.training.learner import check_start
from mtl_dist.training.measurements import MEASUREMENTS, shown_scores
from mtl_dist.training.micro_batches import read_changes
from mtl_dist.training.plan import Plan
from mtl_dist.training.restarts import is_torchrun
from mtl_dist.training.same_disk import check_seen, seen_by_all
from mtl_dist.training.stopping import StopFlag, driver_signals
from mtl_dist.training.torchrun import join_torchrun, torchrun_rank

if TYPE_CHECKING:
    from ray.train import WorkerGroupError

# A worker that does not answer, and ranks that do not all start, are given up after so long; Ray's own defaults are
# 600 s and 60 s.
RAY_TIMEOUTS = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30"}
MAX_REASONS, MAX_REASON = 3, 300  # ranks and characters of a message
ASK_EVERY_S = 2.0  # of the controller by a rank that is alone; several ask at the same steps


class LocalContext:
    """A rank of torchrun, or the only one. SIGTERM and Ctrl-C stop it after the step; a second Ctrl-C ends it."""

    def __init__(self):
        self.rank, self.num_ranks = torchrun_rank()
        self.launcher = uuid.uuid4().hex  # under torchrun `run_local` puts the launchers' names in its place
        self.command_line = typed_command()
        self.num_cpus = max(1, num_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.has_gpu = has_gpus()
        self.signal = 0  # the one that asked to stop
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def publish(self, metrics: dict[str, Any]) -> None:
        pass

    def observe(self, **values: float | Mapping[str, float]) -> None:
        pass

    def should_stop(self) -> bool:
        return bool(self.signal)

    def should_save(self) -> bool:
        return False

    def _ask(self, number: int, frame) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        os.write(1, b"stopping after this step ...\n")  # print may be interrupted here by itself


class RayContext:
    """A rank of Ray Train."""

    def __init__(self, config: Config, *, note: str, command_line: str):
        import ray.train
        from ray.util.metrics import Gauge

        # What botocore tells of itself at INFO, per rank, would bury the run's own lines.
        for name in ("botocore", "aiobotocore"):
            logging.getLogger(name).setLevel(logging.WARNING)
        context = ray.train.get_context()
        self.rank, self.num_ranks = context.get_world_rank(), context.get_world_size()
        self.launcher, self.command_line = note.rpartition("/")[2], command_line
        self._stop = StopFlag(_stop_name(note))
        self.num_cpus = max(1, int(config.ray.cpus_per_rank))  # the machine's other cores may be another rank's
        self.has_gpu = config.ray.gpus_per_rank > 0  # Ray hides no GPU from a worker that asked for none
        self._asked, self._notice = 0.0, None
        self._gauges = {
            name: Gauge(f"mtl_dist_{name}", about.what, tag_keys=("run", "rank", *filter(None, [about.of])))
            for name, about in MEASUREMENTS.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": config.run.name, "rank": str(self.rank)})

    def publish(self, metrics: dict[str, Any]) -> None:
        import ray.train

        if self.rank == 0:
            self.observe(score=shown_scores(metrics))
        with span(RANKS):
            ray.train.report(metrics)

    def observe(self, **values: float | Mapping[str, float]) -> None:
        """Set Prometheus gauges, which Ray's node agents serve."""
        for name, value in values.items():
            for of, each in value.items() if isinstance(value, Mapping) else [(None, value)]:
                self._gauges[name].set(each, tags=None if of is None else {MEASUREMENTS[name].of: of})

    def should_stop(self) -> bool:
        return self.rank == 0 and self._stop.ask()

    def should_save(self) -> bool:
        """Whether a node of the run was given notice since this was last asked. A barrier of all ranks."""
        import ray.train

        if self.num_ranks == 1 and time.monotonic() - self._asked < ASK_EVERY_S:
            return False
        self._asked = time.monotonic()
        notice = ray.train.get_preemption_info()
        is_new = notice is not None and notice != self._notice
        self._notice = notice
        if is_new and self.rank == 0:
            print(f"a node is about to go (ranks {notice.preempted_ranks}): saving", flush=True)
        return is_new


def rehearse(config: Config, plan: Plan, *, is_local: bool, num_ranks: tuple[int, int]) -> str:
    """Do all that a start does before training, and say what would be trained. Raises `InputError`."""
    has_gpu = has_gpus() if is_local else config.ray.gpus_per_rank > 0
    start = check_start(config, has_gpu=has_gpu, num_ranks=num_ranks, begins=plan.begins)
    if has_cluster() and not is_local:
        connect(config)
    return f"{dump_yaml(config)}\n{plan}\n{start}"


def run_local(config: Config) -> None:
    """Train in this process: alone, or as one rank of torchrun. Exits with 128 + signal where one stopped it."""
    from mtl_dist.errors import NonFiniteLoss
    from mtl_dist.training.loop import fit
    from mtl_dist.training.status import print_ending

    context = LocalContext()
    use_cuda = context.has_gpu and config.engine.device != "cpu"
    if use_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "nccl" if use_cuda else "gloo"
    timeout = collective_timeout(config)
    if is_torchrun():
        context.launcher = join_torchrun(backend, timeout)
    else:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        fit(config, context)
    except NonFiniteLoss:
        if context.rank:
            sys.exit(2)  # all ranks raise it, and rank 0 says it
        raise
    status = 128 + context.signal if context.signal else 0
    if is_torchrun():
        dist.barrier()  # rank 0 comes when all is stored; see `leaving_standing` for what is not torn down
    else:
        dist.destroy_process_group()
    if status:
        sys.exit(status)
    if not context.rank:
        print_ending(config)


def typed_command() -> str:
    """Return the command that started this process, for people to read and repeat."""
    name = Path(sys.argv[0]).name
    return shlex.join([name, *sys.argv[1:]] if name.startswith(SCRIPT_PREFIX) else ["python", *sys.orig_argv[1:]])


def has_gpus() -> bool:
    """Whether torch can use a GPU in this process."""
    return torch.cuda.is_available()


def run_ray(config: Config, *, callbacks: list | None = None) -> None:
    """Train under Ray Train on the cluster this process is connected to. Exits with 128 + signal where one stopped it.

    Ray restarts ranks after any error, but a restart would only repeat an `InputError`. So the rank leaves a note. The
    restarted ranks read it and end at once, and this process raises the error again.

    Ray counts failures over the whole run, however long. Where it gives up although the run has come further meanwhile,
    the run is started again, with a new count. Raises `RunFailed` where the run has not come further.
    """
    from ray.train import WorkerGroupError

    for name, value in RAY_TIMEOUTS.items():
        os.environ.setdefault(name, value)
    note = storage.join(config.run.uri, f"failed-{uuid.uuid4().hex[:12]}.json")
    with seen_by_all(note), driver_signals(_stop_name(note)) as signals:
        while True:
            begun = _how_far(config.run.uri)
            trainer = build_trainer(config, note=note, callbacks=callbacks)
            if signals:  # Ray's own handler, which fit() would put in the place of ours, aborts without saving
                trainer._register_sigint_handler = lambda controller: None
            try:
                trainer.fit()
                break
            except WorkerGroupError as error:
                if reported := _read_note(note) or _input_error_of(error):
                    raise reported from None
                reached = _how_far(config.run.uri)
                is_stopped = signals is not None and signals.signal
                if reached <= begun or not config.ray.max_failures or is_stopped:
                    raise _gave_up(config, error, reached[0]) from error
                print(f"ranks failed often, but step {reached[0]} is stored: failures are counted anew", flush=True)
            except Exception as error:
                raise _read_note(note) or error from None
    if reported := _read_note(note):
        raise reported
    if signals and signals.signal:
        sys.exit(128 + signals.signal)


def _how_far(run_uri: str) -> tuple[int, int]:
    """Return the step of a run's newest checkpoint, and how often it has changed to smaller micro-batches."""
    return newest_step(run_uri), len(read_changes(run_uri))


def newest_step(run_uri: str) -> int:
    """Return the step of a run's newest checkpoint; 0 where there is none."""
    return max((checkpoint.step for checkpoint in committed(run_uri)[0]), default=0)


def _gave_up(config: Config, error: WorkerGroupError, reached: int) -> Exception:
    """Say in one message which ranks failed, why, and where the run stands."""
    failures = {
        rank: getattr(failure, "health_check_failure", failure) for rank, failure in error.worker_failures.items()
    }
    reasons = [
        f"rank {rank}: {type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0]}"[:MAX_REASON]
        for rank, failure in sorted(failures.items())
    ]
    kind = StorageError if any(isinstance(failure, StorageError) for failure in failures.values()) else RunFailed
    return kind(
        f"run {config.run.uri} failed more often than ray.max_failures {config.ray.max_failures} without getting "
        f"further than step {reached}. {'; '.join(reasons[:MAX_REASONS])} (MTL_TRACEBACK=1 shows all). The same "
        f"command continues from step {reached}"
    )


def _input_error_of(error: WorkerGroupError) -> InputError | None:
    """Return what a rank could not note in the storage, of Ray's own report of its failures."""
    failures = error.worker_failures.values()
    causes = (getattr(failure, "_base_exc", failure) for failure in failures)
    return next((cause for cause in causes if isinstance(cause, InputError)), None)


def _stop_name(note: str) -> str:
    return f"mtl_dist-stop-{note.rpartition('/')[2]}"


def build_trainer(config: Config, *, note: str, callbacks: list | None = None):
    """Build the TorchTrainer of a run; its ranks restart and resize as `config.ray` says."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    low, high = config.ray.num_ranks
    path, filesystem = ray_storage(storage.join(config.run.storage, config.run.name, "ray"))
    return TorchTrainer(
        _rank_main,
        train_loop_config={"config": config.model_dump(mode="json"), "note": note, "command_line": typed_command()},
        torch_config=TorchConfig(timeout_s=int(collective_timeout(config).total_seconds())),
        scaling_config=ScalingConfig(
            placement_strategy=config.ray.placement,
            num_workers=high if low == high else (low, high),
            elastic_resize_monitor_interval_s=config.ray.resize_every_s,
            use_gpu=config.ray.gpus_per_rank > 0,
            resources_per_worker={"CPU": config.ray.cpus_per_rank}
            | ({"GPU": g} if (g := config.ray.gpus_per_rank) else {}),
        ),
        run_config=RunConfig(
            name="train",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.ray.max_failures),
            callbacks=callbacks,
            # Every step of its own at INFO, several lines a run and evaluation, buries the run's lines.
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def connect(config: Config) -> None:
    """Connect to the cluster and check that it has room for the run's ranks. Raises `InputError`."""
    import ray

    join_cluster("train in this process with --local")
    if config.engine.device == "auto" and not config.ray.gpus_per_rank:
        note_idle_gpus("training", "--ray.gpus-per-rank 1")
    if config.ray.autoscaling:
        return
    least, nodes = config.ray.num_ranks[0], [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for resource, each in (("CPU", config.ray.cpus_per_rank), ("GPU", config.ray.gpus_per_rank)):
        room = sum(int(node.get(resource, 0) / each) for node in nodes) if each else least
        if room < least:
            total = sum(node.get(resource, 0) for node in nodes)
            raise InputError(
                f"ray.num_ranks {least} with {each:g} {resource} each need {each * least:g} {resource}; the cluster "
                f"has {total:g} on {len(nodes)} node(s), room for {room}: lower ray.num_ranks or "
                f"ray.{resource.lower()}s_per_rank, or add nodes (--ray.autoscaling where they come by themselves)"
            )


def ray_storage(uri: str):
    """Return (storage_path, storage_filesystem) for Ray: s3:// through s3fs, since pyarrow's S3 makes directory objects
    that servers other than AWS refuse."""
    if not storage.is_s3(uri):
        return str(storage.local_path(uri).resolve()), None
    import s3fs
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return uri.removeprefix("s3://"), PyFileSystem(FSSpecHandler(s3fs.S3FileSystem(endpoint_url=endpoint)))


def _rank_main(task: dict[str, Any]) -> None:
    from mtl_dist.errors import NonFiniteLoss
    from mtl_dist.training.loop import fit

    check_seen(task["note"])
    if storage.exists(task["note"]):
        return
    config = Config(**task["config"])
    try:
        fit(config, RayContext(config, note=task["note"], command_line=task["command_line"]))
    except InputError as error:
        kind = NonFiniteLoss if isinstance(error, NonFiniteLoss) else InputError
        about = {"kind": kind.__name__, "message": str(error)}
        storage.write_bytes(task["note"], seal(about))
        raise


def _read_note(uri: str) -> Exception | None:
    """Return what a rank noted before it gave up, as an exception; the note is removed."""
    from mtl_dist.errors import NonFiniteLoss

    try:
        about = unseal(storage.read_bytes(uri))
    except FileNotFoundError:
        return None
    except Damaged as error:
        return RunFailed(f"a rank gave up, and its reason in {uri} is damaged: {error}")
    storage.delete(uri)
    return {"InputError": InputError, "NonFiniteLoss": NonFiniteLoss}[about["kind"]](about["message"])
