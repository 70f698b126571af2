"""One trial: a Ray Train run with a few settings of its own, named after the trial, so that it resumes like any run."""

from __future__ import annotations

import socket
from typing import Any

from mtl_dist import storage
from mtl_dist.config import Config, build_config
from mtl_dist.errors import InputError
from mtl_dist.objective.scores import find_score
from mtl_dist.settings import unflatten

# What a trial reports to Ray Tune, beside its scores.
EPOCH = "epoch"
DIVERGED = "diverged"  # why it ended, where its loss was no longer finite


def trial_config(base: dict[str, Any], params: dict[str, Any], trial_id: str, trials_uri: str) -> Config:
    """Return the configuration of a trial: the search's, with the sampled settings, as a run of its own."""
    own = {"run.name": f"trial-{trial_id}", "run.storage": trials_uri}
    return build_config(base, unflatten(params), unflatten(own))


def run_trial(params: dict[str, Any], *, base: dict[str, Any], search_uri: str, metric: str) -> None:
    """Train one trial and report its evaluations to Tune. Runs in a process of Tune's that needs next to no CPU.

    That a trial diverged is a result: the same again would only diverge again. Ray's scheduler and searcher, which want
    a number, are told the worst that its `metric` can be.
    """
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    from mtl_dist.errors import NonFiniteLoss
    from mtl_dist.training.launch import run_ray

    check_seen(search_uri)
    config = trial_config(base, params, tune.get_context().get_trial_id(), storage.join(search_uri, "trials"))
    try:
        run_ray(config, callbacks=[TuneReportCallback()])
    except NonFiniteLoss as error:
        tune.report({metric: find_score(metric).worst, EPOCH: num_epochs(config.run.uri), DIVERGED: str(error)})


def check_seen(search_uri: str) -> None:
    """Raise an `InputError` on a host that does not see what the search has written: another disk of the same path."""
    if not storage.exists(storage.join(search_uri, "search.json")):
        raise InputError(
            f"host {socket.gethostname()} does not see {search_uri} of the host that started the search; give "
            "--run.storage s3://bucket/prefix, or a directory that all hosts mount"
        )


def num_epochs(run_uri: str) -> int:
    """Return after how many epochs a run was last evaluated."""
    from mtl_dist.training.tracking import read_records

    return max((record["epoch"] + 1 for record in read_records(run_uri) if record["kind"] == "eval"), default=0)
