"""The final job and the page on sets far larger than the challenge's: seconds of calibration and of the intervals.

    python -m benchmarks.final [--rows 300000] [--videos 100000] [--auto]

Made-up predictions: labels with noise, two members. Calibration is the cross-fitting that `mtl_dist.ensemble` does, of
all steps over 5 folds of videos, --auto what `--calibrate auto` does before; the intervals are those of one method of
`mtl_dist.report`, per 100 draws of videos. Beside the seconds stand those of processor time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from mtl_dist.objective.calibration import STEPS, stack_members
from mtl_dist.objective.choosing import choose_nested
from mtl_dist.objective.crossfit import cross_fit, make_folds
from mtl_dist.objective.metrics import Predictions, Targets
from mtl_dist.objective.scores import scores
from mtl_dist.predicting.predictions import PredictedRows
from mtl_dist.report.intervals import bootstrap
from mtl_dist.report.results import Method, Result
from mtl_dist.tasks import NUM_AUS, NUM_EXPRESSIONS
from mtl_dist.timeline import Timeline

FOLDS, DRAWS, HALF_WINDOWS = 5, 100, (0, 1, 2, 4, 8, 16)
SHARES = (0.7, 0.6, 0.8)  # of rows with labels of VA, EXPR, AU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--videos", type=int, default=100_000)
    parser.add_argument("--auto", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    targets = make_targets(args.rows, rng)
    members = [make_predictions(targets, rng) for _ in range(2)]
    video = np.arange(args.rows) * args.videos // args.rows
    first = np.searchsorted(video, np.arange(args.videos))
    timeline = Timeline(video, np.arange(args.rows) - first[video])
    folds = make_folds(video, FOLDS, seed=0)
    how = {"folds": folds, "videos": video, "steps": STEPS, "half_windows": HALF_WINDOWS}
    rows = stack_members(members), targets, timeline
    say(f"calibration of {args.rows:,} rows", lambda: cross_fit(*rows, **how))
    if args.auto:
        say("choosing its steps", lambda: choose_nested(*rows, **how, seed=0))
    result = Result("made up", "", "made up", PredictedRows(np.arange(args.rows), members[0], targets), {})
    method = Method("made up", (result._replace(scores=scores(result.sums())),))
    say(f"{DRAWS} draws of {args.videos:,} videos", lambda: bootstrap([method], video, num_draws=DRAWS, seed=0))


def say(what: str, work: Callable[[], object]) -> None:
    """Do some work and print how long it took."""
    begun, busy = time.perf_counter(), time.process_time()
    work()
    print(f"{what}: {time.perf_counter() - begun:.1f} s ({time.process_time() - busy:.1f})", flush=True)


def make_targets(rows: int, rng: np.random.Generator) -> Targets:
    va_mask, expr_mask, au_mask = (rng.random(shape) < share for shape, share in zip((rows, rows, (rows, 12)), SHARES))
    labels = rng.uniform(-1, 1, (rows, 2)), rng.integers(0, NUM_EXPRESSIONS, rows), rng.integers(0, 2, (rows, NUM_AUS))
    return Targets(*labels, va_mask, expr_mask, au_mask)


def make_predictions(targets: Targets, rng: np.random.Generator) -> Predictions:
    rows = len(targets.expr)
    expr = rng.dirichlet(np.ones(NUM_EXPRESSIONS), rows)
    expr[np.arange(rows), targets.expr] += 0.3
    au = (targets.au + rng.normal(0, 1, (rows, NUM_AUS))) / 2
    va = (targets.va / 2 + rng.normal(0, 0.4, (rows, 2))).clip(-1, 1)
    return Predictions(va, expr / expr.sum(1, keepdims=True), 1 / (1 + np.exp(-4 * au + 1)))


if __name__ == "__main__":
    main()
