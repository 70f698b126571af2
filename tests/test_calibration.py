"""Combining and calibrating members: against naive references and scipy, and that no row is scored with parameters that
were fitted on it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from sklearn.metrics import f1_score

from mtl_dist.objective.calibration import (
    FEW_ROWS,
    STEPS,
    Calibration,
    apply,
    describe,
    f1_threshold,
    fit,
    fit_temperatures,
    sigmoid_temperature,
    softmax_temperature,
    stack_members,
    temper,
    whole,
)
from mtl_dist.objective.crossfit import PLAIN_MEAN, cross_fit, make_folds
from mtl_dist.objective.member_weights import concordance_weights, select_members
from mtl_dist.objective.metrics import Predictions, Targets, metric_sums
from mtl_dist.objective.scores import scores
from mtl_dist.objective.smoothing import smooth
from mtl_dist.timeline import make_timeline, video_names

HALF_WINDOWS = (0, 5, 20)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def make_members(num_rows: int, *, noise: tuple[float, ...], seed: int = 0, num_videos: int = 10):
    """Members that see the truth through noise of their own; labels move slowly in a video."""
    rng = np.random.default_rng(seed)
    video = np.sort(rng.integers(0, num_videos, num_rows))
    time = np.arange(num_rows)
    va = 0.6 * np.column_stack([np.sin(time / 40 + video), np.cos(time / 55 + video)])
    expr = (time // 9 + video) % 8
    on = (np.sin(time[:, None] / 13 + np.arange(12)) > np.linspace(-0.5, 0.8, 12)).astype(float)
    masks = rng.random(num_rows) < 0.8, rng.random(num_rows) < 0.7, rng.random((num_rows, 12)) < 0.8
    targets = Targets(va, expr, on, *masks)
    members = []
    for size in noise:
        logits = 2 * np.eye(8)[expr] + size * rng.normal(0, 1.5, (num_rows, 8))
        au = 2 * on - 1.5 + size * rng.normal(0, 1.5, (num_rows, 12))
        seen = (va + size * rng.normal(0, 0.5, va.shape)).clip(-1, 1)
        members.append(Predictions(seen, softmax(logits), 1 / (1 + np.exp(-au))))
    images = [f"video{number}/{4 * place + 1:05d}.jpg" for place, number in enumerate(video)]
    return stack_members(members), targets, images


# --------------------------------------------------------------------------------------------------------- temperature


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_temperatures_are_those_that_scipy_finds(true):
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (3000, 8))
    truth = (softmax(logits).cumsum(1) > rng.random((3000, 1))).argmax(1)
    shown = true * np.log(softmax(logits))

    def loss(t):
        return -np.log(softmax(shown / t))[np.arange(3000), truth].mean()

    found = softmax_temperature(shown, truth)
    assert found == pytest.approx(optimize.minimize_scalar(loss, bounds=(0.05, 20), method="bounded").x, rel=1e-3)
    assert found == pytest.approx(true, rel=0.1)

    z = rng.normal(0, 2, 4000)
    on = rng.random(4000) < 1 / (1 + np.exp(-z))
    found = sigmoid_temperature(true * z, on)
    best = optimize.minimize_scalar(
        lambda t: np.logaddexp(0, np.where(on, -1, 1) * true * z / t).mean(), bounds=(0.05, 20), method="bounded"
    )
    assert found == pytest.approx(best.x, rel=1e-3)


def test_the_temperature_of_many_rows_is_that_of_all_of_them_wherever_it_was_looked_for_first():
    """Every fourth row alone, where the search begins, has another temperature."""
    rng = np.random.default_rng(2)
    z = rng.normal(0, 2, 4 * FEW_ROWS + 3)
    on = rng.random(len(z)) < 1 / (1 + np.exp(-z))
    shown = np.where(np.arange(len(z)) % 4 == 0, 3.0, 0.7) * z

    def slope(scale):
        return ((1 / (1 + np.exp(-scale * shown)) - on) * shown).mean()

    assert sigmoid_temperature(shown, on) == pytest.approx(1 / optimize.brentq(slope, 0.05, 20, xtol=1e-14), rel=1e-9)
    logits, truth = np.column_stack([np.zeros_like(shown), shown]), on.astype(int)
    assert softmax_temperature(logits, truth) == pytest.approx(sigmoid_temperature(shown, on), rel=1e-9)


def test_temperatures_of_perfect_and_of_reversed_members_stay_within_their_bounds():
    z = np.linspace(-3, 3, 100)
    assert sigmoid_temperature(z, z > 0) == pytest.approx(0.05, rel=1e-8)
    assert sigmoid_temperature(z, z < 0) == pytest.approx(20, rel=1e-8)


def test_tempering_divides_logits_and_one_leaves_all_as_it_is():
    members, _, _ = make_members(200, noise=(1.0, 2.0))
    assert temper(members, np.ones((2, 2))) is members
    tempered = temper(members, np.array([[2.0, 1.0], [1.0, 0.5]]))
    np.testing.assert_allclose(tempered.expr[0], softmax(np.log(members.expr[0]) / 2), rtol=1e-9)
    np.testing.assert_allclose(tempered.expr[1], members.expr[1], rtol=1e-9)
    logit = np.log(members.au[1] / (1 - members.au[1]))
    np.testing.assert_allclose(tempered.au[1], 1 / (1 + np.exp(-2 * logit)), rtol=1e-6)
    np.testing.assert_array_equal(tempered.va, members.va)


# ------------------------------------------------------------------------------------------------------------- weights


def ccc(x, y):
    return 2 * np.cov(x, y, ddof=0)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)


def simplex(steps: int) -> np.ndarray:
    grid = np.arange(steps + 1) / steps
    return np.array([(a, b, 1 - a - b) for a in grid for b in grid if a + b <= 1 + 1e-9]).clip(0)


@pytest.mark.parametrize("seed", range(6))
def test_weights_of_va_have_no_lower_ccc_than_any_on_a_grid(seed):
    rng = np.random.default_rng(seed)
    y = rng.uniform(-1, 1, 300)
    x = np.array([a * y + b + c * rng.normal(size=300) for a, b, c in rng.uniform(-0.5, 1, (3, 3))])
    found = concordance_weights(x, y)
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1)
    best = max(ccc(w @ x, y) for w in simplex(50))
    if best > 0:
        assert ccc(found @ x, y) >= best - 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_no_member_counted_once_more_or_less_gives_a_better_ensemble(seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 8, 200)
    parts = softmax(np.eye(8)[truth] * rng.uniform(0, 2, (4, 1, 1)) + rng.normal(0, 1, (4, 200, 8)))

    def score(p):
        return f1_score(truth, p.argmax(-1), average="macro", labels=range(8))

    found = select_members(parts, score)
    counts = next(found * total for total in range(1, 60) if np.allclose(found * total, (found * total).round()))
    reached = score(np.tensordot(found, parts, axes=1))
    assert reached >= score(parts.mean(0))
    for step in (*np.eye(4), *-np.eye(4)):
        if (counts + step).min() >= 0 and (counts + step).sum() >= 1:
            assert score(np.tensordot(counts + step, parts, axes=1)) <= reached + 1e-6


def test_a_member_of_noise_gets_little_weight_and_a_useful_one_most():
    members, targets, images = make_members(2000, noise=(0.7, 6.0))
    found = fit(members, targets, make_timeline(images), steps=whole(("weights",)), half_windows=HALF_WINDOWS)
    assert found.va_weights[0].min() > 0.8
    assert found.expr_weights[0] > 0.6
    assert np.median(found.au_weights[0]) > 0.6


# ----------------------------------------------------------------------------------------------------------- thresholds


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(40, 90), st.integers(1, 50))
def test_no_threshold_has_a_greater_f1(seed, num_rows, num_values):
    """With many equal probabilities too; compared with every threshold there is."""
    rng = np.random.default_rng(seed)
    p, on = rng.integers(0, num_values, num_rows) / num_values, rng.random(num_rows) < 0.5
    on[:20] = True
    found = f1_score(on, p > f1_threshold(p, on))
    assert found == pytest.approx(max(f1_score(on, p > t) for t in [-1.0, *np.unique(p)]))


def test_a_threshold_of_few_positives_is_a_half():
    p = np.linspace(0, 1, 500)
    assert f1_threshold(p, p > 0.97) == 0.5
    assert f1_threshold(p, p > 0.9) == pytest.approx(0.9, abs=0.01)
    assert f1_threshold(np.array([]), np.array([], bool)) == 0.5


def test_thresholds_reach_the_metric():
    members, targets, _ = make_members(300, noise=(1.0,))
    one, thresholds = Predictions(*(a[0] for a in members)), np.linspace(0.1, 0.9, 12)
    shifted = one._replace(au=(one.au > thresholds).astype(float))
    mine = metric_sums(one, targets, au_thresholds=thresholds)
    np.testing.assert_array_equal(mine.au, metric_sums(shifted, targets).au)
    assert not np.array_equal(mine.au, metric_sums(one, targets).au)


# ------------------------------------------------------------------------------------------------------------ smoothing


def naive_smooth(values, images, half):
    frames = [int(image[-9:-4]) for image in images]
    videos = [image.split("/")[0] for image in images]
    rows = range(len(images))
    near = [[j for j in rows if videos[j] == videos[i] and abs(frames[j] - frames[i]) <= half] for i in rows]
    return np.array([np.mean([values[j] for j in which]) for which in near])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(0, 12), st.integers(0, 12))
def test_smoothing_equals_a_plain_loop(seed, num_rows, first, second):
    """In any order of rows, with gaps and rows of one image."""
    rng = np.random.default_rng(seed)
    images = [f"v{rng.integers(3)}/{rng.integers(1, 40):05d}.jpg" for _ in range(num_rows)]
    values = rng.uniform(-1, 1, (num_rows, 2))
    found = smooth(values, make_timeline(images), np.array([first, second]))
    for column, half in enumerate((first, second)):
        expected = naive_smooth(values[:, column], images, half) if half else values[:, column]
        np.testing.assert_allclose(found[:, column], expected, atol=1e-12)


def test_smoothing_keeps_constants_and_never_mixes_videos():
    images = [f"v{n // 50}/{n % 50:05d}.jpg" for n in range(100)]
    values = np.repeat(np.arange(100) // 50, 2).reshape(100, 2) * 1.0
    np.testing.assert_allclose(smooth(values, make_timeline(images), np.array([7, 1000])), values, atol=1e-12)


def test_frames_are_numbers_at_the_ends_of_names_else_the_order_of_the_file():
    timeline = make_timeline(["a/00007.jpg", "a/00003.jpg", "b/x_10.png", "b/x_12.png", "a/00007.jpg"])
    assert timeline.frame.tolist() == [4, 0, 0, 2, 4]
    assert timeline.video.tolist() == [0, 0, 1, 1, 0]
    assert make_timeline(["a/one.jpg", "a/00900.jpg", "a/one.jpg", "a/two.jpg"]).frame.tolist() == [0, 1, 0, 2]
    assert make_timeline(["a/20201231235959001.jpg", "a/20201231235959002.jpg"]).frame.tolist() == [0, 1]
    faces = ["a/00001_0.jpg", "a/00009_0.jpg", "a/00900_0.jpg", "b/1_3.jpg", "b/1_5.jpg"]  # a: no numbers of frames
    assert make_timeline(faces).frame.tolist() == [0, 1, 2, 0, 2]
    assert make_timeline(["a/12.5.jpg", "a/12.9.jpg", "a/13.0.jpg"]).frame.tolist() == [0, 1, 2]  # seconds
    assert make_timeline(["a/f.0010.jpg", "a/f.0012.jpg"]).frame.tolist() == [0, 2]
    assert make_timeline(["1.jpg", "2.jpg", "5.jpg"], ["x", "y", "x"]).frame.tolist() == [0, 0, 4]
    assert video_names(["deep/er/1.jpg", "1.jpg"]) == ["deep/er", "1.jpg"]


# --------------------------------------------------------------------------------------------------- all of it together


def test_without_steps_it_is_the_plain_mean():
    members, targets, images = make_members(100, noise=(1.0, 2.0, 3.0))
    timeline = make_timeline(images)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(
            fit(members, targets, timeline, steps=whole(()), half_windows=HALF_WINDOWS), Calibration.plain_mean(3)
        )
    )
    for mine, stacked in zip(apply(members, Calibration.plain_mean(3), timeline), members):
        np.testing.assert_allclose(mine, stacked.mean(0))


def test_data_without_labels_leaves_the_plain_mean():
    members, targets, images = make_members(100, noise=(1.0, 2.0))
    nothing = targets._replace(**{name: np.zeros_like(getattr(targets, name)) for name in targets._fields[3:]})
    found = fit(members, nothing, make_timeline(images), steps=whole(STEPS), half_windows=HALF_WINDOWS)
    for mine, plain in zip(found, Calibration.plain_mean(2)):
        np.testing.assert_array_equal(mine, plain)
    assert fit_temperatures(members, nothing).tolist() == [[1, 1], [1, 1]]


@pytest.fixture(scope="module")
def data():
    members, targets, images = make_members(1500, noise=(0.8, 2.0, 4.0))
    timeline = make_timeline(images)
    folds = make_folds(timeline.video, 4, seed=0)
    found = cross_fit(
        members, targets, timeline, folds=folds, videos=timeline.video, steps=STEPS, half_windows=HALF_WINDOWS
    )
    return members, targets, timeline, folds, found


@pytest.mark.whole
def test_labels_of_a_fold_change_nothing_that_is_applied_to_it(data):
    members, targets, timeline, folds, found = data
    rng = np.random.default_rng(5)
    for fold in range(4):
        mine = np.flatnonzero(folds == fold)
        spoilt = [array.copy() for array in targets]
        for array in spoilt:
            array[mine] = array[rng.permutation(mine)]
        how = {"folds": folds, "videos": timeline.video, "steps": STEPS, "half_windows": HALF_WINDOWS}
        again = cross_fit(members, Targets(*spoilt), timeline, **how)
        for before, after in zip(found.calibrations[fold], again.calibrations[fold]):
            np.testing.assert_array_equal(before, after)
        np.testing.assert_array_equal(found.predictions.va[mine], again.predictions.va[mine])
        np.testing.assert_array_equal(found.au_on[mine], again.au_on[mine])
        other = (fold + 1) % 4
        assert any(not np.array_equal(a, b) for a, b in zip(found.calibrations[other], again.calibrations[other])), (
            "the labels were not used at all"
        )


def test_out_of_fold_scores_are_those_of_the_out_of_fold_predictions(data):
    members, targets, _, _, found = data
    au = found.au_on.astype(float)  # as decided
    whole = scores(metric_sums(found.predictions._replace(au=au), targets))
    last = scores(found.sums[f"+ {STEPS[-1]}"])
    assert {key: whole[key] for key in ("p", "ccc_v", "expr", "au")} == pytest.approx(
        {key: last[key] for key in ("p", "ccc_v", "expr", "au")}
    )
    mean = scores(metric_sums(Predictions(*(a.mean(0) for a in members)), targets))
    assert scores(found.sums[PLAIN_MEAN])["p"] == pytest.approx(mean["p"])
    assert list(found.sums) == [PLAIN_MEAN, *(f"+ {step}" for step in STEPS)]


def test_each_step_improves_what_it_is_for_on_data_that_needs_it(data):
    found = {name: scores(sums) for name, sums in data[-1].sums.items()}
    assert found["+ weights"]["va"] > found["+ temperature"]["va"] + 0.02
    assert found["+ temperature"]["expr"] > found[PLAIN_MEAN]["expr"] + 0.02
    assert found["+ class_smoothing"]["expr"] >= found["+ weights"]["expr"]
    assert found["+ class_smoothing"]["au"] > found["+ weights"]["au"]
    assert found["+ thresholds"]["au"] > found["+ prior"]["au"]
    assert found["+ thresholds"]["va"] == found["+ weights"]["va"]
    assert found["+ smoothing"]["va"] > found["+ thresholds"]["va"]
    assert found["+ smoothing"]["au"] == found["+ thresholds"]["au"]


def test_weights_alone_help_where_members_differ(data):
    members, targets, timeline, folds, _ = data
    alone = cross_fit(
        members, targets, timeline, folds=folds, videos=timeline.video, steps=("weights",), half_windows=HALF_WINDOWS
    )
    assert list(alone.sums) == [PLAIN_MEAN, "+ weights"]
    mean, weighted = (scores(sums) for sums in alone.sums.values())
    for task in ("va", "expr", "au"):
        assert weighted[task] > mean[task] + 0.02


def test_the_line_of_moments_has_the_greatest_ccc_of_all_lines():
    rng = np.random.default_rng(0)
    truth = rng.normal(0.2, 0.3, (400, 2)).clip(-1, 1)
    seen = 0.4 * truth + rng.normal(0, 0.1, truth.shape) - 0.1
    members, targets, images = make_members(400, noise=(1.0,))
    targets = targets._replace(va=truth, va_mask=np.ones(400, bool))
    members = members._replace(va=seen[None])
    found = fit(members, targets, make_timeline(images), steps=whole(("moments",)), half_windows=HALF_WINDOWS)
    for dimension, line in enumerate(found.va_line):
        x, y = seen[:, dimension], truth[:, dimension]
        best = optimize.minimize(lambda ab, x=x, y=y: -ccc(ab[0] * x + ab[1], y), [1.0, 0.0], tol=1e-10)
        np.testing.assert_allclose(line, best.x, rtol=1e-3, atol=1e-4)
    assert np.abs(apply(members, found, make_timeline(images)).va).max() <= 1


def test_a_prior_calls_rare_expressions_where_a_member_favours_common_ones():
    rng = np.random.default_rng(0)
    shares = np.array([0.5, 0.25, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01])
    truth = rng.choice(8, 4000, p=shares)
    likelihood = softmax(1.5 * np.eye(8)[truth] + rng.normal(0, 1, (4000, 8)))
    expr = likelihood * shares / (likelihood * shares).sum(-1, keepdims=True)
    members, targets, images = make_members(4000, noise=(1.0,))
    members = members._replace(expr=expr[None])
    targets = targets._replace(expr=truth, expr_mask=np.ones(4000, bool))
    timeline = make_timeline(images)
    found = fit(members, targets, timeline, steps=whole(("prior",)), half_windows=HALF_WINDOWS)
    assert (np.diff(found.expr_factors[:6]) > 0).all()
    called = apply(members, found, timeline).expr
    np.testing.assert_allclose(called.sum(-1), 1)
    before, after = (f1_score(truth, p.argmax(-1), average="macro") for p in (expr, called))
    assert after > before + 0.02
    few = targets._replace(expr_mask=np.arange(4000) < 10)
    assert (fit(members, few, timeline, steps=whole(("prior",)), half_windows=HALF_WINDOWS).expr_factors == 1).all()


def test_parameters_are_described_by_name_for_the_steps_that_were_taken(data):
    about = describe(data[-1].calibrations[0], ["x", "y", "z"], steps=("weights", "smoothing"))
    assert list(about) == ["weights", "smoothing"]
    assert list(about["weights"]) == ["valence", "arousal", "expression"] + [
        f"AU{n}" for n in (1, 2, 4, 6, 7, 10, 12, 15, 23, 24, 25, 26)
    ]
    assert sum(about["weights"]["AU25"].values()) == pytest.approx(1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=200), st.integers(2, 8), st.integers(0, 3))
def test_folds_part_no_group_are_balanced_and_the_same_twice(groups, num_folds, seed):
    groups = np.unique(groups, return_inverse=True)[1]
    folds = make_folds(groups, num_folds, seed=seed)
    assert len(set(zip(groups.tolist(), folds.tolist()))) == groups.max() + 1
    sizes = np.bincount(folds)
    assert len(sizes) == min(num_folds, groups.max() + 1)
    assert sizes.min() > 0
    assert sizes.max() - sizes.min() <= np.bincount(groups).max()
    np.testing.assert_array_equal(folds, make_folds(groups, num_folds, seed=seed))
