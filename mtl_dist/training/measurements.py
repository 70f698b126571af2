"""What a rank shows to Prometheus while it trains: mtl_dist_<name>{run, rank}, of which Ray makes ray_mtl_dist_<name>.

`cluster/grafana/dashboard.json` draws them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Measurement(NamedTuple):
    """A gauge."""

    what: str
    of: str | None = None  # the label that tells its values apart, beside run and rank


MEASUREMENTS = {
    "step_s": Measurement("seconds of a step, the wait for its data included"),
    "data_wait_s": Measurement("seconds a step waited for its data"),
    "images_per_s": Measurement("images of this rank a second"),
    "checkpoint_step": Measurement("step of the latest checkpoint"),
    "restarts": Measurement("starts of the run after its first"),
    "step": Measurement("the last completed step"),
    "loss": Measurement("loss of the global batch", "task"),
    "gradient_norm": Measurement("norm of all gradients, before they are clipped"),
    "lr": Measurement("learning rate"),
    "score": Measurement("score of the last evaluation", "score"),
    "part_s": Measurement("seconds of a step by its parts, means of a minute", "part"),
    "own_s": Measurement("seconds of a step that a rank needs for itself, means of a minute: the slowest has most"),
    "gpu_memory_bytes": Measurement("the most of its GPU's memory that a rank has had"),
}
SCORES = ("p", "va", "expr", "au")  # that are shown


def shown_scores(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return those of an evaluation's scores that are shown."""
    return {name: scores[name] for name in SCORES if isinstance(scores.get(name), float)}
