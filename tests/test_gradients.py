"""Balancers that see gradients: weights as published, of the whole batch, for the trunk alone."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from mtl_dist.config import build_config
from mtl_dist.errors import InputError
from mtl_dist.families import FAMILIES
from mtl_dist.models import build_model
from mtl_dist.objective.affect import Affect
from mtl_dist.objective.gradients import CAGRAD_RADIUS, SOLVERS, build_balancer, describe_gram
from mtl_dist.objective.module import ObjectiveModule
from mtl_dist.presets import load_preset
from mtl_dist.sections import LossConfig
from mtl_dist.tasks import TASKS
from tests.test_balancing import ALL, ONES, present_of
from tests.test_objective import COUNTS, TinyModel, gradients, make_batch

# Gram matrices of three tasks: without conflict, with one, with three, and of gradients that depend on each other.
GRAMS = {
    "agree": [[1.0, 0.3, 0.2], [0.3, 2.0, 0.5], [0.2, 0.5, 0.7]],
    "one against two": [[1.0, -0.4, 0.1], [-0.4, 0.5, -0.2], [0.1, -0.2, 3.0]],
    "all against all": [[1.0, -0.3, -0.4], [-0.3, 1.0, -0.2], [-0.4, -0.2, 1.0]],
    "dependent": [[1.0, 2.0, 1.0], [2.0, 5.0, 1.0], [1.0, 1.0, 2.0]],
}
ORDERS = np.array([[0, 1, 2], [2, 0, 1], [1, 0, 2]])


def normalised(name: str) -> np.ndarray:
    gram = np.array(GRAMS[name])
    return gram / gram.trace()


@st.composite
def grams(draw) -> np.ndarray:
    """The Gram matrix of two to four gradients of very different lengths, which may depend on each other."""
    num, rng = draw(st.integers(2, 4)), np.random.default_rng(draw(st.integers(0, 10**6)))
    rows = rng.normal(size=(num, draw(st.integers(1, 6)))) * np.exp(rng.normal(size=(num, 1)))
    return rows @ rows.T / (rows**2).sum()


def orders_of(gram: np.ndarray) -> np.ndarray:
    return np.tile(np.arange(len(gram)), (len(gram), 1))


# ---------------------------------------------------------------------------------------------------------- the weights

# Of torchjd 0.18; CAGrad's are of scipy's SLSQP, that of the authors: torchjd's own solver stops 5e-5 beside them.
PUBLISHED = {
    "upgrad": {
        "agree": [0.333333333, 0.333333333, 0.333333333],
        "one against two": [0.494133285, 0.759130338, 0.358001533],
        "all against all": [0.652486078, 0.582387417, 0.619914685],
        "dependent": [0.333333333, 0.333333333, 0.333333333],
    },
    "imtl_g": {
        "agree": [0.399367342, 0.231527819, 0.369104839],
        "one against two": [0.352846986, 0.537068674, 0.11008434],
        "all against all": [0.357852883, 0.306163022, 0.335984095],
        "dependent": [0.25, 0.278491398, 0.471508602],
    },
    "aligned": {
        "agree": [0.203400676, 0.115357228, 0.240343037],
        "one against two": [0.271410024, 0.37866391, 0.113555568],
        "all against all": [0.347949206, 0.31482288, 0.333482912],
        "dependent": [0.147611872, 0.151629457, 0.291206157],
    },
    "mgda": {
        "agree": [0.372641509, 0.051886795, 0.575471696],
        "one against two": [0.354581673, 0.5750332, 0.070385127],
        "all against all": [0.357852882, 0.306163022, 0.335984095],
        "dependent": [1.0, 0.0, 0.0],
    },
    "pcgrad": {
        "agree": [1.0, 1.0, 1.0],
        "one against two": [1.453333333, 2.2, 1.086666667],
        "all against all": [1.84, 1.5, 1.66],
        "dependent": [1.0, 1.0, 1.0],
    },
    "cagrad": {
        "agree": [0.478798, 0.333333, 0.632743],
        "one against two": [0.397461, 0.729384, 0.333333],
        "all against all": [0.495987, 0.424345, 0.465677],
        "dependent": [0.866667, 0.333333, 0.333333],
    },
}


@pytest.mark.parametrize(("method", "name"), itertools.product(SOLVERS, GRAMS))
def test_weights_are_those_of_another_implementation(method, name):
    found = SOLVERS[method][0](normalised(name), ORDERS)
    np.testing.assert_allclose(found, PUBLISHED[method][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "name"), itertools.product(SOLVERS, GRAMS))
def test_the_weights_that_stand_here_are_torchjds(method, name, monkeypatch):
    oracles = pytest.importorskip("torchjd.aggregation")
    gram = torch.from_numpy(normalised(name))
    theirs = {
        "upgrad": lambda: oracles.UPGradWeighting(),
        "imtl_g": lambda: oracles.IMTLGWeighting(),
        "aligned": lambda: oracles.AlignedMTLWeighting(),
        "mgda": lambda: oracles.MGDAWeighting(1e-9, 20_000),
        "pcgrad": lambda: oracles.PCGradWeighting(),
        "cagrad": lambda: oracles.CAGradWeighting(CAGRAD_RADIUS),
    }[method]()
    orders = iter(ORDERS)
    monkeypatch.setattr(torch, "randperm", lambda number: torch.from_numpy(next(orders)))
    off = 1e-4 if method == "cagrad" else 1e-6
    np.testing.assert_allclose(theirs(gram).numpy(), PUBLISHED[method][name], rtol=1e-5, atol=off)


@given(grams())
def test_upgrads_sum_is_against_no_gradient(gram):
    a = SOLVERS["upgrad"][0](gram, orders_of(gram))
    assert (gram @ a >= -2e-4 * a.max()).all()  # its regularisation


@given(grams())
def test_mgdas_sum_is_the_shortest_of_all_means(gram):
    a = SOLVERS["mgda"][0](gram, orders_of(gram))
    assert a.min() >= 0
    assert a.sum() == pytest.approx(1)
    assert (gram @ a >= a @ gram @ a - 1e-8).all()  # what holds at the shortest, and nowhere else


@given(grams())
def test_imtl_gs_sum_has_one_projection_on_all_directions(gram):
    if np.linalg.cond(gram) > 1e6:
        return
    a = SOLVERS["imtl_g"][0](gram, orders_of(gram))
    projections = gram @ a / np.sqrt(gram.diagonal())
    np.testing.assert_allclose(projections, projections[0], rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(grams())
def test_cagrads_point_is_no_worse_than_that_of_a_general_solver(gram):
    num = len(gram)
    mean = np.full(num, 1 / num)
    slopes, radius = gram @ mean, CAGRAD_RADIUS * np.sqrt(mean @ gram @ mean)

    def worst(w: np.ndarray) -> float:
        return slopes @ w + radius * np.sqrt(max(w @ gram @ w, 0))

    other = minimize(
        worst, mean, bounds=[(0, 1)] * num, constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, tol=1e-12
    )
    w = SOLVERS["cagrad"][0](gram, orders_of(gram)) - mean
    if w.max() > 0:  # else nothing is left that all agree to
        assert worst(w / w.sum()) <= other.fun + 1e-7


@given(grams(), st.sampled_from(["upgrad", "mgda", "cagrad"]))
def test_the_order_of_terms_does_not_matter(gram, method):
    """The sum of gradients is one; weights may be others where gradients depend on each other."""
    solve, order = SOLVERS[method][0], np.arange(len(gram))[::-1]
    turned = solve(gram[np.ix_(order, order)], orders_of(gram))[order]
    difference = turned - solve(gram, orders_of(gram))
    assert difference @ gram @ difference < 1e-6


@pytest.mark.parametrize("method", SOLVERS)
def test_a_term_that_is_not_there_or_weighs_nothing_has_no_say(method):
    gram = torch.tensor(GRAMS["one against two"], dtype=torch.float64)
    balancer = build_balancer(method, ONES)
    alone = balancer.shares(gram, present_of("au"))
    assert alone.tolist() == [1, 1, 1]
    without = balancer.shares(gram, present_of("va", "au"))
    lost = gram.clone()
    lost[1], lost[:, 1] = 99.0, 99.0
    assert torch.equal(without, balancer.shares(lost, present_of("va", "au")))
    assert torch.equal(without, build_balancer(method, ONES | {"expr": 0.0}).shares(lost, ALL))


@pytest.mark.parametrize("method", SOLVERS)
def test_without_conflict_and_at_one_length_weights_are_about_those_of_fixed(method):
    shares = build_balancer(method, ONES).shares(torch.eye(3, dtype=torch.float64) * 7, ALL)
    expected = 1 + CAGRAD_RADIUS if method == "cagrad" else 1  # whose step is longer by that
    np.testing.assert_allclose(shares, expected, rtol=1e-6)


def test_pcgrads_order_is_drawn_by_the_step_and_goes_on_from_its_state():
    gram = torch.tensor(GRAMS["all against all"], dtype=torch.float64)
    old, new = (build_balancer("pcgrad", ONES) for _ in range(2))
    found = []
    for _ in range(6):
        found.append(old.shares(gram, ALL).tolist())
        assert old.shares(gram, ALL).tolist() == found[-1]
        old.stepped({}, ALL, None)
    assert len(set(map(tuple, found))) > 1
    new.load_state_dict(old.state_dict())
    assert torch.equal(new.shares(gram, ALL), old.shares(gram, ALL))


def test_gradients_that_are_no_numbers_end_in_weights_that_are_none():
    gram = torch.full((3, 3), float("nan"), dtype=torch.float64)
    assert build_balancer("upgrad", ONES).shares(gram, ALL).isnan().all()


# ------------------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("method", SOLVERS)
def test_the_trunk_has_the_weighted_sum_and_every_head_its_own_gradient(method):
    """Against plain derivatives, one task after the other."""
    config = LossConfig(va=0.7, expr=1.3, au=2.0)
    torch.manual_seed(0)
    plain = ObjectiveModule(TinyModel(), Affect(config, COUNTS)).double()
    batch = make_batch(24)
    balanced = ObjectiveModule(copy.deepcopy(plain.model), Affect(config, COUNTS), balancing=method, shared="trunk")
    loss = balanced.double()(batch)
    loss.total.backward()

    trunk = list(plain.model.trunk.parameters())
    each = []
    for task in TASKS:
        only = {other: config.weight(other) * (other == task) for other in TASKS}
        one = ObjectiveModule(plain.model, Affect(LossConfig(**only), COUNTS)).double()
        each.append(torch.autograd.grad(one(batch).total, trunk))
    shares = [float(loss.weights[task]) / config.weight(task) for task in TASKS]
    for place, parameter in enumerate(balanced.model.trunk.parameters()):
        expected = sum(share * of_task[place] for share, of_task in zip(shares, each))
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-11, atol=1e-14)
    assert loss.total.item() == pytest.approx(plain(batch).total.item(), rel=1e-12)

    plain(batch).total.backward()
    for task in TASKS:
        for mine, theirs in zip(*(getattr(m.model, task).parameters() for m in (balanced, plain))):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-15)


def test_looking_at_gradients_changes_none():
    torch.manual_seed(0)
    module = ObjectiveModule(TinyModel(), Affect(LossConfig(), COUNTS), shared="trunk").double()
    batch, other = make_batch(24), copy.deepcopy(module)
    looked, plain = module(batch, looks_at_gradients=True), other(batch)
    looked.total.backward()
    plain.total.backward()
    assert torch.equal(gradients(module), gradients(other))
    assert plain.gram is None
    told = describe_gram(looked.gram, TASKS, {"va", "au"})
    assert set(told["norm"]) == {"va", "au"}
    assert set(told["cosine"]) == {"va au"}
    shared = module.model.trunk(batch.inputs).detach().requires_grad_()
    va = module.model.va(shared).tanh()
    labels = batch.labels
    terms = []
    for dim in range(2):
        x, y = va[..., dim][labels.va_mask], labels.va[..., dim][labels.va_mask].double()
        cov = ((x - x.mean()) * (y - y.mean())).mean()
        terms.append(2 * cov / (x.var(correction=0) + y.var(correction=0) + (x.mean() - y.mean()) ** 2))
    (direct,) = torch.autograd.grad(1 - sum(terms) / 2, shared)
    assert told["norm"]["va"] == pytest.approx(float(direct.norm()), rel=1e-6)


@pytest.mark.parametrize("preset", ["small", "small-b", "small-baseline", "small-c", "small-d"])
def test_every_family_names_what_its_tasks_share(preset):
    """Every task asks something of it, and what comes before it is trained."""
    own = {"data": {"image_size": 80}, "model": {"sequence": {"dims": [20]}} if preset == "small-c" else {}}
    config = build_config(load_preset(preset), own)
    model = build_model(config.model, input_size=config.input_size)
    shared = FAMILIES[config.model.name].shared
    module = ObjectiveModule(model, Affect(config.loss, COUNTS), balancing="mgda", shared=shared)
    size = (8, 1, 20) if preset == "small-c" else (8, 1, 3, 80, 80)
    inputs = torch.randn(size, generator=torch.Generator().manual_seed(0))
    loss = module(make_batch(8)._replace(inputs=inputs), looks_at_gradients=True)
    assert (loss.gram.diagonal() > 0).all()
    loss.total.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name in trained if model.get_parameter(name).grad is None] == []


def test_a_trunk_that_is_not_trained_is_refused():
    model = TinyModel()
    model.trunk.requires_grad_(False)
    module = ObjectiveModule(model, Affect(LossConfig(), COUNTS), balancing="upgrad", shared="trunk")
    with pytest.raises(InputError, match=r"nothing of that is trained; train more of the model, or choose fixed"):
        module(make_batch(8))


def test_sampling_per_task_has_no_rows_in_common_and_is_refused():
    with pytest.raises(InputError, match=r"loss\.balancing is pcgrad, .* data\.sampling per_task"):
        build_config(load_preset("small"), {"loss": {"balancing": "pcgrad"}, "data": {"sampling": "per_task"}})
