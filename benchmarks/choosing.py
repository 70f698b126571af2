"""Steps of calibration that leave themselves out: what that brings where they help, and where they hurt.

    python -m benchmarks.choosing [--draws 12] [--videos 20]

Made-up predictions of three members, with noise that is independent of frame, member and draw. All seven steps are
fitted on the videos of a draw, all of them ("all") or those that help out of fold ("auto"), and scored on 300 fresh
videos: that is what new data sees. Beside it what the ensemble says of "auto" without them: out of fold, nested as it
is done, and had the steps been chosen on the very folds that are scored. Worlds:

    helps   members of unlike noise, two of them too sure; units called too seldom; labels that move slowly
    hurts   members alike and calibrated; labels without order in time; few of them
    mixed   as "helps" in valence, arousal and units; as "hurts" in expressions
    videos  members alike; each sees every video with an offset of its own, so that what fits one does not fit another
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np

from mtl_dist.objective.calibration import STEPS, Calibration, apply, fit, stack_members, whole
from mtl_dist.objective.choosing import choose_nested
from mtl_dist.objective.crossfit import cross_fit, make_folds
from mtl_dist.objective.metrics import Predictions, Targets, metric_sums
from mtl_dist.objective.scores import scores
from mtl_dist.tasks import NUM_AUS, NUM_EXPRESSIONS
from mtl_dist.timeline import Timeline

FOLDS, HALF_WINDOWS, FRAMES, FRESH = 5, (0, 2, 5, 10), 40, 300


class World(NamedTuple):
    """How members see the labels of a task: VA, EXPR and AU in this order."""

    unlike: tuple[bool, bool, bool]  # members differ, some too sure; units are called too seldom
    slow: tuple[bool, bool, bool]  # labels move slowly
    labelled: tuple[float, float, float]  # share of rows
    offset: float = 0.0  # deviation of what a member adds to a video


YES, NO = (True,) * 3, (False,) * 3
WORLDS = {
    "helps": World(YES, YES, (0.8, 0.8, 0.8)),
    "hurts": World(NO, NO, (0.05, 0.05, 0.08)),
    "mixed": World((True, False, True), (True, False, True), (0.8, 0.05, 0.8)),
    "videos": World(NO, NO, (0.8, 0.8, 0.8), offset=1.0),
}


class Rows(NamedTuple):
    """What is fitted or scored."""

    members: Predictions
    targets: Targets
    timeline: Timeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=12)
    parser.add_argument("--videos", type=int, default=20)
    args = parser.parse_args()
    columns = ("all", "auto", "auto - all", "nested", "not nested", "kept")
    print(f"P above the plain mean's, mean of {args.draws} draws of {args.videos} videos (standard error)")
    print(f"{'':8}" + "".join(f"{name:>20}" for name in columns))
    for name, world in WORLDS.items():
        found = np.array([one_draw(world, args.videos, seed) for seed in range(args.draws)])
        error = found.std(0, ddof=1) / np.sqrt(len(found))
        cells = [f"{mean:+.4f} ({of:.4f})" for mean, of in zip(found.mean(0), error)]
        print(f"{name:8}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


def one_draw(world: World, num_videos: int, seed: int) -> list[float]:
    """Return the columns of the table for one draw; kept: of the steps times tasks that there are, how many."""
    rng = np.random.default_rng(seed)
    rows, fresh = make_rows(world, num_videos, rng), make_rows(world._replace(labelled=(1, 1, 1)), FRESH, rng)
    how = {"videos": rows.timeline.video, "steps": STEPS, "half_windows": HALF_WINDOWS}
    how["folds"] = make_folds(rows.timeline.video, FOLDS, seed=0)
    nested = choose_nested(*rows, **how, seed=0)
    plain = score_of(fresh, Calibration.plain_mean(3))
    own = [fit(*rows, steps=steps, half_windows=HALF_WINDOWS) for steps in (whole(STEPS), nested.final.kept)]
    all_gain, auto_gain = (score_of(fresh, calibration) - plain for calibration in own)
    said = []
    for kept in (nested.folds, [nested.final.kept] * FOLDS):
        first, *_, last = (scores(sums)["p"] for sums in cross_fit(*rows, **how, kept=kept).sums.values())
        said.append(last - first)
    return [all_gain, auto_gain, auto_gain - all_gain, *said, sum(map(len, nested.final.kept.values()))]


def score_of(rows: Rows, calibration: Calibration) -> float:
    """P of rows under a calibration."""
    found = apply(rows.members, calibration, rows.timeline)
    return scores(metric_sums(found, rows.targets, au_thresholds=calibration.thresholds))["p"]


def make_rows(world: World, num_videos: int, rng: np.random.Generator) -> Rows:
    """Draw labels, and what three members make of them."""
    n, video = num_videos * FRAMES, np.repeat(np.arange(num_videos), FRAMES)
    va = np.tanh(0.5 * wander(n, 2, is_slow=world.slow[0], rng=rng))
    expr = (wander(n, NUM_EXPRESSIONS, is_slow=world.slow[1], rng=rng) - np.linspace(0, 1, NUM_EXPRESSIONS)).argmax(-1)
    on = wander(n, NUM_AUS, is_slow=world.slow[2], rng=rng) > np.linspace(0, 1, NUM_AUS)
    masks = [rng.random(shape) < share for shape, share in zip((n, n, (n, NUM_AUS)), world.labelled)]
    members = []
    for place in range(3):
        offset = [world.offset * rng.normal(size=(num_videos, size))[video] for size in (2, NUM_EXPRESSIONS, NUM_AUS)]
        noise = [(0.7, 1.5, 3.0)[place] if unlike else 1.5 for unlike in world.unlike]
        sure = [(1.0, 3.0, 5.0)[place] if unlike else 1.0 for unlike in world.unlike]
        seen = 0.6 * va + 0.3 * offset[0] + 0.3 * noise[0] * rng.normal(size=va.shape)
        logits = 2 * np.eye(NUM_EXPRESSIONS)[expr] + offset[1] + noise[1] * rng.normal(size=(n, NUM_EXPRESSIONS))
        units = 2 * (on - 0.5) - world.unlike[2] + offset[2] + noise[2] * rng.normal(size=on.shape)
        powers = np.exp(sure[1] * (logits - logits.max(-1, keepdims=True)))
        au = 1 / (1 + np.exp(-sure[2] * units))
        members.append(Predictions(seen.clip(-1, 1), powers / powers.sum(-1, keepdims=True), au))
    targets = Targets(va, expr, on.astype(float), *masks)
    return Rows(stack_members(members), targets, Timeline(video, np.arange(n) % FRAMES))


def wander(n: int, size: int, *, is_slow: bool, rng: np.random.Generator) -> np.ndarray:
    """Return (n, size) numbers of deviation 1, which move slowly or have no order."""
    noise = rng.normal(size=(n, size))
    if not is_slow:
        return noise
    width = 12
    sums = np.cumsum(np.concatenate([noise, noise[:width]]), axis=0)
    return (sums[width:] - sums[:-width]) / np.sqrt(width)


if __name__ == "__main__":
    main()
