"""Metrics against scikit-learn and scipy, and the golden constants of the challenge's public label counts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from mtl_dist.objective.metrics import MetricSums, Predictions, Targets, metric_sums
from mtl_dist.objective.scores import constant_scores, label_sums, scores
from mtl_dist.tasks import LabelCounts

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
