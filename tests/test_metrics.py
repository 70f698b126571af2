"""Metrics against scikit-learn and scipy, and the golden constants of the challenge's public label counts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from mtl_dist.label_counts import LabelCounts
from mtl_dist.objective.metrics import MetricSums, Predictions, Targets, metric_sums
from mtl_dist.objective.scores import SCORES, constant_scores, label_sums, scores, single_scores

# Label counts of the s-Aff-Wild2 validation split as its papers print them (26,876 rows).
REAL_VAL = LabelCounts(
    rows=26876, va=26876, expr=15440, au=[26876] * 12, unlabelled=0,
    expr_classes=[1886, 487, 565, 1254, 3751, 1893, 1003, 4601],
    au_positives=[5531, 2554, 5442, 8818, 13224, 11421, 8319, 782, 757, 808, 20427, 2934])  # fmt: skip


def make_data(size: int, seed: int = 0) -> tuple[Predictions, Targets]:
    rng = np.random.default_rng(seed)
    targets = Targets(
        va=rng.uniform(-1, 1, (size, 2)).astype(np.float32),
        expr=rng.integers(0, 8, size),
        au=rng.integers(0, 2, (size, 12)),
        va_mask=rng.random(size) < 0.7,
        expr_mask=rng.random(size) < 0.6,
        au_mask=rng.random((size, 12)) < 0.8,
    )
    va = (0.5 * targets.va + rng.normal(0, 0.4, (size, 2))).clip(-1, 1).astype(np.float32)
    expr = rng.dirichlet(np.ones(8), size).astype(np.float32)
    expr[np.arange(size), targets.expr] += 0.2
    au = (0.3 * targets.au + 0.7 * rng.random((size, 12))).astype(np.float32)
    return Predictions(va, expr, au), targets


def take(values, rows):
    return type(values)(*(array[rows] for array in values))


def test_scores_equal_sklearn_and_scipy_on_100003_masked_values():
    predictions, targets = make_data(100_003)
    found = scores(metric_sums(predictions, targets))
    for name, dim in (("ccc_v", 0), ("ccc_a", 1)):
        x, y = (a[targets.va_mask, dim].astype(np.float64) for a in (predictions.va, targets.va))
        r = stats.pearsonr(x, y).statistic
        ccc = 2 * r * x.std() * y.std() / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
        assert found[name] == pytest.approx(ccc, rel=1e-12)
    truth, guess = targets.expr[targets.expr_mask], predictions.expr[targets.expr_mask].argmax(1)
    assert found["expr"] == pytest.approx(sk.f1_score(truth, guess, average="macro", labels=range(8)), rel=1e-12)
    f1 = [
        sk.f1_score(targets.au[known, i], predictions.au[known, i] > 0.5) for i, known in enumerate(targets.au_mask.T)
    ]  # fmt: skip
    assert found["au"] == pytest.approx(np.mean(f1), rel=1e-12)
    hit = (predictions.au > 0.5) == targets.au
    right = [hit[known, i].mean() for i, known in enumerate(targets.au_mask.T)]
    assert found["au_accuracy"] == pytest.approx(np.mean(right), rel=1e-12)
    assert found["p"] == pytest.approx((found["ccc_v"] + found["ccc_a"]) / 2 + found["expr"] + found["au"])
    assert found["frames"] == {"va": targets.va_mask.sum(), "expr": len(truth), "au": targets.au_mask.sum(0).max()}


def intraclass(x: np.ndarray, y: np.ndarray) -> float:
    """ICC(3,1) by the analysis of variance of Shrout and Fleiss (1979): n targets, k = 2 raters."""
    ratings = np.stack([x, y], axis=1)
    n, k = ratings.shape
    mean = ratings.mean()
    between = k * ((ratings.mean(1) - mean) ** 2).sum()
    raters = n * ((ratings.mean(0) - mean) ** 2).sum()
    error = ((ratings - mean) ** 2).sum() - between - raters
    of_targets, of_error = between / (n - 1), error / ((n - 1) * (k - 1))
    return (of_targets - of_error) / (of_targets + (k - 1) * of_error)


def make_signed_data(size: int) -> tuple[Predictions, Targets]:
    """With labels and predictions of exactly 0, and more labels of one sign."""
    predictions, targets = make_data(size)
    rng = np.random.default_rng(1)
    va = [values * (rng.random(values.shape) < 0.8) for values in (predictions.va, (targets.va + 0.2).clip(-1, 1))]
    return predictions._replace(va=va[0]), targets._replace(va=va[1])


def test_the_scores_of_valence_and_arousal_equal_sklearn_scipy_and_an_analysis_of_variance():
    predictions, targets = make_signed_data(100_003)
    found = scores(metric_sums(predictions, targets))
    for side, dim in (("v", 0), ("a", 1)):
        x, y = (a[targets.va_mask, dim].astype(np.float64) for a in (predictions.va, targets.va))
        agree, has_sign = np.sign(x) == np.sign(y), y != 0
        expected = {
            "rmse": sk.root_mean_squared_error(y, x),
            "pcc": stats.pearsonr(x, y).statistic,
            "icc": intraclass(x, y),
            "sagr": agree.mean(),
            "sagr_not0": agree[has_sign].mean(),
        }
        assert 0.05 < (~has_sign).mean() < 0.3
        for name, value in expected.items():
            assert found[f"{name}_{side}"] == pytest.approx(value, rel=1e-10), name


def test_scores_over_leading_axes_are_those_of_each():
    data = [make_signed_data(size) for size in (3, 50, 400)]
    data[0] = data[0][0], data[0][1]._replace(va_mask=np.zeros(3, bool))
    flat = np.stack([metric_sums(*each).flatten() for each in data]).reshape(3, 1, -1)
    for score in SCORES:
        together = score.of(MetricSums.unflatten(flat))
        alone = [score.of(metric_sums(*each)) for each in data]
        np.testing.assert_array_equal(together[:, 0], alone, err_msg=score.key)
        assert together.shape == (3, 1, *((len(score.names),) if score.names else ()))


def test_no_value_is_worse_than_the_worst():
    predictions, targets = make_data(500)
    sides = np.where(targets.va > 0, -1, 1), np.where(targets.va > 0, 1, -1)
    wrong = predictions._replace(va=sides[0], expr=1 - predictions.expr, au=1 - targets.au)
    found = scores(metric_sums(wrong, targets._replace(va=sides[1])))
    for score in single_scores():
        assert score.sign * found[score.key] >= score.sign * score.worst, score.key
        assert score.better(found[score.key] + score.sign, than=found[score.key])
    assert found["rmse_v"] == 2


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.lists(st.integers(0, 200), max_size=5), st.integers(0, 9))
def test_sums_of_parts_are_the_sums_of_the_whole(size, cuts, seed):
    """However rows are split over ranks, batches or shards, the scores are those of one pass."""
    predictions, targets = make_data(size, seed)
    total = MetricSums.zero()
    edges = [0, *sorted(min(cut, size) for cut in cuts), size]
    for begin, end in itertools.pairwise(edges):
        rows = np.arange(begin, end)
        part = metric_sums(take(predictions, rows), take(targets, rows))
        total = total.plus(MetricSums.unflatten(part.flatten()))
    whole = scores(metric_sums(predictions, targets))
    assert np.array_equal(total.signs, metric_sums(predictions, targets).signs)
    for key, value in scores(total).items():
        assert value == (pytest.approx(whole[key], rel=1e-9, abs=1e-9) if isinstance(value, float) else whole[key])


def test_the_constant_predictor_has_the_golden_scores_on_the_real_validation_counts():
    found = constant_scores(label_sums(REAL_VAL))
    assert found["au"] == pytest.approx(0.358728, abs=5e-7)
    assert found["expr"] == pytest.approx(0.057395, abs=5e-7)
    assert found["va"] == 0.0
    assert found["p"] == pytest.approx(0.4161, abs=5e-5)


def test_the_constant_predictors_accuracy_is_that_of_the_commoner_answer():
    on, labelled = [1, 9, 5, *[0] * 9], [10] * 4 + [0] * 8
    counts = REAL_VAL.model_copy(update={"au": labelled, "au_positives": on})
    assert constant_scores(label_sums(counts))["au_accuracy"] == pytest.approx((0.9 + 0.9 + 0.5 + 1.0) / 4)
    none = REAL_VAL.model_copy(update={"au": [0] * 12, "au_positives": [0] * 12})
    assert constant_scores(label_sums(none))["au_accuracy"] is None


def test_the_constant_predictor_of_each_score_is_the_best_of_its_kind():
    predictions, targets = make_signed_data(3000)
    sums = metric_sums(predictions, targets)
    floor, counts = constant_scores(sums), targets.va[targets.va_mask].astype(np.float64)
    tried = []
    for va in (*np.linspace(-1, 1, 21), *counts.mean(0)):
        same = predictions._replace(va=np.full((3000, 2), va))
        tried.append(scores(metric_sums(same, targets)))
    for side, dim in (("v", 0), ("a", 1)):
        assert floor[f"rmse_{side}"] == pytest.approx(counts[:, dim].std(), rel=1e-9)
        assert floor[f"rmse_{side}"] == pytest.approx(min(s[f"rmse_{side}"] for s in tried), abs=1e-9)
        for name in ("sagr", "sagr_not0", "ccc", "pcc", "icc"):
            assert floor[f"{name}_{side}"] == max(s[f"{name}_{side}"] for s in tried), name
    assert floor["va"] == 0


def test_what_label_counts_do_not_tell_of_the_constant_predictor_is_left_out():
    found = constant_scores(label_sums(REAL_VAL))
    missing = {score.key for score in SCORES} - found.keys()
    assert missing == {f"{name}_{side}" for name in ("rmse", "sagr", "sagr_not0") for side in "va"}
    none = constant_scores(label_sums(REAL_VAL.model_copy(update={"va": 0})))
    assert (none["rmse_v"], none["ccc_v"], none["covers"]) == (None, None, ["expr", "au"])


def test_a_class_that_does_not_occur_counts_as_zero():
    """scikit-learn's default averages over the classes present: 1.0 here, where the challenge says 0.25."""
    none, labels = np.zeros((4, 12)), np.array([0, 0, 4, 4])
    targets = Targets(none[:, :2], labels, none, none[:, 0] > 0, none[:, 0] == 0, none > 0)
    predictions = Predictions(np.zeros((4, 2)), np.eye(8)[[0, 0, 4, 4]], np.zeros((4, 12)))
    found = scores(metric_sums(predictions, targets))
    assert found["expr"] == pytest.approx(0.25)
    assert found["covers"] == ["expr"]
    assert found["au_accuracy"] is None
    assert found["p"] == found["expr"]
    assert found["va"] is None
    assert found["au"] is None


def test_constant_valence_has_no_concordance():
    predictions, targets = make_data(100)
    flat = predictions._replace(va=np.full_like(predictions.va, 0.3))
    assert scores(metric_sums(flat, targets))["ccc_v"] == 0.0
