"""Join a Ray cluster, so that every process of this job there has the environment it needs and knows its own cluster.

Ray hands on neither by itself. Where several Rays run on a machine and RAY_ADDRESS is not set, Ray Train's actors ask
the wrong one whether a run is alive. They hear that it is not, and take its resources away. The next run then waits for
ever.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from mtl_dist.errors import InputError

# Environment that processes need and a cluster's nodes may lack: the driver's own is handed on, by name.
HANDED_ON = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_MAX_ATTEMPTS",
    "MTL_CACHE_DIR",
    "MTL_S3_TIMEOUT_S",
    "OMP_WAIT_POLICY",
)


PLAIN_PRINT = {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}  # else what ranks print comes twice: Ray's log repeats it


def join_cluster(alone: str) -> None:
    """Connect this process to its cluster; `alone` is what to do where none answers."""
    import ray

    if ray.is_initialized():
        return
    # What `ray job submit --runtime-env-json` set is in our environment too: the same value is no conflict.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    try:
        ray.init(log_to_driver=True, logging_level="warning", runtime_env=runtime_env())
    except ConnectionError as error:
        raise InputError(
            f"no Ray cluster answers: {error}; start one (python -m cluster.local up), submit with `ray job submit`, "
            f"or {alone}"
        ) from None


def runtime_env() -> dict[str, object]:
    """Return what Ray sets in every process of the job."""
    return {
        "env_vars": {name: os.environ[name] for name in HANDED_ON if name in os.environ} | PLAIN_PRINT,
        "worker_process_setup_hook": f"{__name__}.{begin_process.__name__}",
    }


def begin_process() -> None:
    """Set RAY_ADDRESS to the cluster of this process; Ray calls it at the start of each."""
    import ray

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    for name, level in quiet_loggers().items():
        logging.getLogger(name).setLevel(level)


def quiet_loggers() -> dict[str, int]:
    """Return Ray's loggers that say what we say, or what is not so, and what they still may say."""
    import ray

    return {
        # Every score, of every rank. It is named after its file, so that Ray's own setting does not reach it.
        str(Path(ray.__file__).parent / "train/v2/_internal/execution/context.py"): logging.WARNING,
        # It takes every trial that has ended for one that died, and warns.
        "ray.train.v2._internal.execution.controller.placement_group_cleaner": logging.ERROR,
    }


def has_cluster() -> bool:
    """Whether this process was given a Ray cluster: by `ray job submit`, or RAY_ADDRESS."""
    return bool(os.environ.get("RAY_ADDRESS"))


def note_idle_gpus(what: str, remedy: str) -> None:
    """Say that GPUs stay idle: Ray gives a process none that it does not ask for."""
    import ray

    if gpus := ray.cluster_resources().get("GPU"):
        print(f"note: the cluster has {gpus:g} GPU(s), and {what} is on CPUs; use them with {remedy}", flush=True)
