"""Steps of calibration that leave themselves out: what is kept, that a fold has no part in what is chosen for it, and
what each step gains against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_dist.objective import bootstrap, gains
from mtl_dist.objective.calibration import STEPS, TASKS_OF, apply, fit, stack_members, whole
from mtl_dist.objective.choosing import LEAST_GAIN, choose, choose_nested
from mtl_dist.objective.crossfit import PLAIN_MEAN, cross_fit, make_folds, take_parts
from mtl_dist.objective.gains import SEED, Compared, measure_gains
from mtl_dist.objective.metrics import MetricSums, Predictions, Targets, grouped_sums, metric_sums
from mtl_dist.objective.scores import scores
from mtl_dist.timeline import Timeline
from tests.test_calibration import make_members, softmax

HALF_WINDOWS = (0, 5)


def make_rows(num_rows: int, *, noise=(0.8, 3.0), seed: int = 0, num_videos: int = 10, sure=(1.0, 1.0)):
    """Members with temperatures of their own, on labels that move slowly."""
    members, targets, _ = make_members(num_rows, noise=noise, seed=seed, num_videos=num_videos)
    expr = softmax(np.log(members.expr) * np.array(sure)[:, None, None])
    logit = np.log(members.au) - np.log1p(-members.au)
    au = 1 / (1 + np.exp(-logit * np.array(sure)[:, None, None]))
    video = np.arange(num_rows) * num_videos // num_rows
    timeline = Timeline(video, np.arange(num_rows) - np.searchsorted(video, video))
    return members._replace(expr=expr, au=au), targets, timeline


def shuffle_frames(timeline: Timeline, seed: int = 0) -> Timeline:
    """The same rows in another order in time: neighbours tell nothing of each other."""
    rng, frame = np.random.default_rng(seed), timeline.frame.copy()
    for number in range(timeline.video.max() + 1):
        mine = np.flatnonzero(timeline.video == number)
        frame[mine] = rng.permutation(frame[mine])
    return Timeline(timeline.video, frame)


def options(timeline: Timeline, steps: tuple[str, ...], *, num_folds: int = 4, half_windows=HALF_WINDOWS) -> dict:
    folds = make_folds(timeline.video, num_folds, seed=0)
    return {"folds": folds, "videos": timeline.video, "steps": steps, "half_windows": half_windows}


# ----------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.whole
def test_a_step_that_helps_is_kept_and_one_that_hurts_is_left_out():
    """Temperatures help: the member of noise is far too sure. Smoothing hurts: frames are shuffled."""
    members, targets, timeline = make_rows(1200, sure=(1.0, 8.0))
    rows = members, targets, shuffle_frames(timeline)
    how = options(timeline, ("temperature", "smoothing"), half_windows=(5, 20))
    nested = choose_nested(*rows, **how, seed=0)
    assert [kept.keys() for kept in (*nested.folds, nested.final.kept)] == [{"temperature"}] * 5
    assert set(nested.final.kept["temperature"]) == {"expr", "au"}
    found = measure_gains(nested.final.tried)
    assert found["temperature"]["expr"].low > 0
    assert found["smoothing"]["va"].high < 0
    plain, *_, auto = (scores(sums)["p"] for sums in cross_fit(*rows, **how, kept=nested.folds).sums.values())
    *_, whole_gain = (scores(sums)["p"] for sums in cross_fit(*rows, **how).sums.values())
    assert auto > plain + 0.02
    assert auto > whole_gain + 0.02


def test_smoothing_is_kept_where_frames_are_in_order():
    rows = make_rows(1200, sure=(1.0, 8.0))
    nested = choose_nested(*rows, **options(rows[2], ("smoothing",), half_windows=(5, 20)), seed=0)
    assert [*nested.folds, nested.final.kept] == [{"smoothing": ("va",)}] * 5


def test_a_step_that_changes_nothing_is_left_out():
    """One member has no weights; a half-window of 0 smooths nothing."""
    rows = make_rows(600, noise=(1.0,), sure=(1.0,))
    found = choose(*rows, **options(rows[2], ("weights", "class_smoothing", "smoothing"), half_windows=(0,)))
    assert found.kept == {}
    assert all(np.array_equal(pair.before, pair.after) for pair in found.tried.values())


@pytest.mark.whole
def test_tasks_are_decided_apart():
    """The second member knows nothing of expressions, and the first nothing of valence: weights help both; where
    members are alike in units, to choose among them does not."""
    (members, targets, timeline), rng = make_rows(600, noise=(1.0, 1.0)), np.random.default_rng(3)
    members.expr[1] = rng.dirichlet(np.full(8, 0.3), 600)
    members.va[0] = rng.uniform(-1, 1, (600, 2))
    members.au[1] = members.au[0]
    found = choose(members, targets, timeline, **options(timeline, ("weights",)))
    assert found.kept == {"weights": ("va", "expr")}


@pytest.mark.whole
def test_units_are_judged_at_the_thresholds_that_follow():
    """All probabilities are below 0.5: there no unit is ever called, and members' weights look worthless."""
    members, targets, timeline = make_rows(500, noise=(0.7, 4.0))
    rows = members._replace(au=members.au * 0.4), targets, timeline
    assert "au" not in choose(*rows, **options(timeline, ("weights",))).kept.get("weights", ())
    found = choose(*rows, **options(timeline, ("weights", "thresholds")))
    assert "au" in found.kept["weights"]
    assert found.kept["thresholds"] == ("au",)


def plain_choice(members, targets, timeline, *, folds, videos, steps, half_windows):
    """Choose by fitting every set of steps anew, and scoring all rows by what the other folds say."""

    parts = [tuple(take_parts(members, targets, timeline, np.flatnonzero(rows))
                   for rows in (folds != fold, folds == fold)) for fold in range(folds.max() + 1)]  # fmt: skip
    known = {}

    def score(kept: dict, task: str, *, at_half: bool) -> float | None:
        total, key = MetricSums.zero(), tuple(sorted(kept.items()))
        if key not in known:
            known[key] = [fit(*others, steps=kept, half_windows=half_windows) for others, _ in parts]
        for found, (_, own) in zip(known[key], parts):
            thresholds = 0.5 if at_half else found.thresholds
            total = total.plus(metric_sums(apply(own[0], found, own[2]), own[1], au_thresholds=thresholds))
        return scores(total)[task]

    kept, ahead = {}, {"thresholds": ("au",)} if "thresholds" in steps else {}
    for step in (step for step in STEPS if step in steps):
        more, before = {**kept, step: TASKS_OF[step]}, dict(kept)
        for task in TASKS_OF[step]:
            if step == "thresholds":
                gain = score(more, task, at_half=False) - score(more, task, at_half=True)
            else:
                gain = score(more | ahead, task, at_half=not ahead) - score(before | ahead, task, at_half=not ahead)
            if gain > LEAST_GAIN:
                kept[step] = (*kept.get(step, ()), task)
    return kept


@pytest.mark.whole
@pytest.mark.parametrize(
    ("steps", "seeds"),
    [(STEPS, (1,)), (("temperature", "class_smoothing", "prior", "smoothing", "moments"), (0, 1))],
)
def test_what_is_kept_is_what_a_plain_search_keeps(steps, seeds):
    num_kept, num_all = 0, len(seeds) * sum(len(TASKS_OF[step]) for step in steps)
    for seed in seeds:
        rows = make_rows(120, noise=(1.0, 2.0), seed=seed, num_videos=6, sure=(1.0, 3.0))
        how = options(rows[2], steps, num_folds=2)
        found = choose(*rows, **how)
        assert found.kept == plain_choice(*rows, **how)
        assert list(found.tried) == list(steps)
        num_kept += sum(map(len, found.kept.values()))
    assert 0 < num_kept < num_all


# ------------------------------------------------------------------------------------------------------- nestedness

CHEAP = ("temperature", "prior", "thresholds", "smoothing", "moments")


def spoil(targets: Targets, rows: np.ndarray, rng: np.random.Generator) -> Targets:
    """Put other labels on some rows, and hide some that were there."""
    spoilt = [array.copy() for array in targets]
    spoilt[0][rows] = rng.uniform(-1, 1, (len(rows), 2))
    spoilt[1][rows] = rng.integers(0, 8, len(rows))
    spoilt[2][rows] = rng.integers(0, 2, (len(rows), 12))
    for mask in spoilt[3:]:
        mask[rows] = rng.random(mask[rows].shape) < 0.5
    return Targets(*spoilt)


@pytest.mark.whole
@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(3, 9), st.data())
def test_labels_of_a_fold_change_nothing_that_is_chosen_or_fitted_for_it(seed, num_folds, num_videos, data):
    members, targets, timeline = make_rows(100, seed=seed, num_videos=num_videos, sure=(1.0, 4.0))
    how = options(timeline, CHEAP, num_folds=num_folds)
    fold = data.draw(st.integers(0, int(how["folds"].max())))
    found = []
    for labels in (targets, spoil(targets, np.flatnonzero(how["folds"] == fold), np.random.default_rng(seed))):
        nested = choose_nested(members, labels, timeline, **how, seed=0)
        found.append((nested, cross_fit(members, labels, timeline, **how, kept=nested.folds)))
    (before, fitted), (after, again) = found
    assert before.folds[fold] == after.folds[fold]
    for mine, other in zip(fitted.calibrations[fold], again.calibrations[fold]):
        np.testing.assert_array_equal(mine, other)
    own = how["folds"] == fold
    for mine, other in zip(fitted.predictions, again.predictions):
        np.testing.assert_array_equal(mine[own], other[own])
    np.testing.assert_array_equal(fitted.au_on[own], again.au_on[own])
    tried = [nested.final.tried["moments"].after for nested in (before, after)]
    assert not np.array_equal(*tried), "the labels were not used at all"


def test_labels_of_a_fold_change_what_is_chosen_for_other_folds_and_for_new_data():
    """Without this the test above would hold of a choice that looks at no labels."""
    members, targets, timeline = make_rows(600, sure=(1.0, 4.0))
    how = options(timeline, ("smoothing",), half_windows=(5,))
    before = choose_nested(members, targets, timeline, **how, seed=0)
    spoilt = [array.copy() for array in targets]
    mine = how["folds"] == 0
    spoilt[0][mine] = -5 * spoilt[0][mine]  # predictions now go the wrong way: the less they move the better
    after = choose_nested(members, Targets(*spoilt), timeline, **how, seed=0)
    assert before.final.kept == before.folds[1] == {"smoothing": ("va",)}
    assert (after.final.kept, after.folds[1]) != (before.final.kept, before.folds[1])
    assert after.folds[0] == before.folds[0]


def test_where_the_others_are_one_video_nothing_is_kept_and_all_steps_are_told_of():
    rows, told = make_rows(200, num_videos=2), []
    how = options(rows[2], CHEAP, num_folds=5)
    assert how["folds"].max() == 1
    nested = choose_nested(*rows, **how, seed=0, progress=told.append)
    assert nested.folds == [{}, {}]
    assert list(nested.final.tried) == list(CHEAP)
    assert sum(told) == 3 * len(CHEAP)


def test_what_no_fold_keeps_leaves_the_plain_mean():
    rows = make_rows(200)
    how = options(rows[2], CHEAP)
    found = cross_fit(*rows, **how, kept=[{}] * 4)
    sums = list(found.video_sums.values())
    assert len(sums) == len(CHEAP) + 1
    assert all(np.array_equal(sums[0], other) for other in sums)
    every = cross_fit(*rows, **how, kept=[whole(CHEAP)] * 4)
    for name, mine in cross_fit(*rows, **how).video_sums.items():
        np.testing.assert_array_equal(mine, every.video_sums[name])


# ------------------------------------------------------------------------------------------------------------ gains


def test_the_sums_of_videos_are_those_of_their_rows():
    members, targets, timeline = make_rows(300, num_videos=7)
    found = cross_fit(members, targets, timeline, **options(timeline, CHEAP))
    plain = Predictions(*(array.mean(0) for array in members))
    for number in range(7):
        mine = np.flatnonzero(timeline.video == number)
        for name, predicted, on in ((PLAIN_MEAN, plain, plain.au > 0.5), ("+ moments", found.predictions, found.au_on)):
            part = Predictions(*(array[mine] for array in predicted))._replace(au=on[mine].astype(float))
            sums = metric_sums(part, Targets(*(array[mine] for array in targets)))
            np.testing.assert_allclose(found.video_sums[name][number], sums.flatten(), atol=1e-9)


@pytest.mark.whole
def test_gains_and_their_intervals_equal_a_loop_over_draws_of_the_videos_rows(monkeypatch):
    """Few videos, two of them with expressions: some draws have none, and they do not count for what needs them."""
    chunk = 40
    monkeypatch.setattr(bootstrap, "CHUNK", chunk)
    monkeypatch.setattr(gains, "NUM_DRAWS", 2 * chunk)
    members, targets, timeline = make_rows(160, num_videos=5)
    targets.expr_mask[timeline.video > 1] = False
    video = timeline.video
    predicted = [Predictions(*(array[number] for array in members)) for number in (0, 1)]
    sums = [grouped_sums(part, targets, video, 5, au_on=part.au > 0.5) for part in predicted]
    found = measure_gains({"step": Compared(*sums, ("expr", "va"))})["step"]
    assert list(found) == ["p", "expr", "va"]

    def score(rows: np.ndarray) -> list[dict]:
        labels = Targets(*(array[rows] for array in targets))
        return [scores(metric_sums(Predictions(*(array[rows] for array in part)), labels)) for part in predicted]

    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(SEED)))
    counts = np.concatenate([rng.multinomial(5, [1 / 5] * 5, chunk) for _ in range(2)])
    drawn = [score(np.concatenate([np.repeat(np.flatnonzero(video == v), n) for v, n in enumerate(times)]))
             for times in counts]  # fmt: skip
    old, new = score(np.arange(160))
    lacking = sum(before["expr"] is None for before, _ in drawn)
    assert 0 < lacking < len(drawn)
    for key, gain in found.items():
        whole_draws = [(b, a) for b, a in drawn if key == "va" or b["expr"] is not None]
        low, high = np.percentile([a[key] - b[key] for b, a in whole_draws], [2.5, 97.5])
        assert gain.gain == pytest.approx(new[key] - old[key], abs=1e-12)
        assert (gain.low, gain.high) == pytest.approx((low, high), abs=1e-9)
        assert gain.videos == (5 if key == "va" else 2)


def test_labels_of_one_video_have_no_interval_and_no_labels_no_gain():
    members, targets, timeline = make_rows(160, num_videos=5)
    targets.expr_mask[timeline.video > 0] = False
    targets.au_mask[:] = False
    predicted = [Predictions(*(array[number] for array in members)) for number in (0, 1)]
    sums = [grouped_sums(part, targets, timeline.video, 5, au_on=part.au > 0.5) for part in predicted]
    found = measure_gains({"step": Compared(*sums, ("va", "expr", "au"))})["step"]
    assert list(found) == ["p", "va", "expr"]
    assert [gain.low is None for gain in found.values()] == [True, False, True]
    assert measure_gains({}) == {}


def test_all_steps_are_drawn_from_the_same_videos():
    """So a step that changes nothing gains nothing in every draw, and two that change the same are told the same of."""
    members, targets, timeline = make_rows(200, num_videos=8)
    part = stack_members([Predictions(*(array[n] for array in members)) for n in (0, 1)])
    sums = [grouped_sums(Predictions(*(array[n] for array in part)), targets, timeline.video, 8,
                         au_on=part.au[n] > 0.5) for n in (0, 1)]  # fmt: skip
    found = measure_gains({
        "one": Compared(*sums, ("va",)), "none": Compared(sums[0], sums[0], ("va",)),
        "other": Compared(sums[0], sums[1].copy(), ("va",)),
    })  # fmt: skip
    assert found["one"] == found["other"]
    assert found["none"]["p"][:3] == (0, 0, 0)
    assert found["one"]["p"].low < found["one"]["p"].gain < found["one"]["p"].high
