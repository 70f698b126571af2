"""Losses are those of one big batch: for any split over ranks and micro-batches, and whatever labels are missing."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from mtl_dist.label_counts import LabelCounts
from mtl_dist.objective.affect import Affect, asymmetric_loss, concordance
from mtl_dist.objective.gradients import total_gram
from mtl_dist.objective.losses import add_sums, global_losses, total_sums
from mtl_dist.objective.module import ObjectiveModule
from mtl_dist.sections import LossConfig
from mtl_dist.tasks import Batch, Labels, Outputs
from mtl_dist.training.micro_batches import split_batch
from tests.ranks import forkserver, start_ranks
from tests.windows import all_valid

COUNTS = LabelCounts(
    rows=100,
    va=80,
    expr=60,
    au=[50] * 12,
    expr_classes=[20, 10, 5, 5, 10, 5, 5, 0],
    au_positives=[10] * 11 + [0],
    unlabelled=1,
)
FEATURES = 5


class TinyModel(nn.Module):
    """Linear layers over features; BatchNorm would make the split of the batch matter."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(FEATURES, FEATURES).double()
        self.va, self.expr, self.au = (nn.Linear(FEATURES, width).double() for width in (2, 8, 12))

    def forward(self, inputs, valid):
        shared = self.trunk(inputs)
        return Outputs(self.va(shared).tanh(), self.expr(shared), self.au(shared))


def make_batch(size: int, seed: int = 0, *, tasks=("va", "expr", "au")) -> Batch:
    g = torch.Generator().manual_seed(seed)
    labels = Labels(
        va=torch.rand(size, 1, 2, generator=g) * 2 - 1,
        expr=torch.randint(0, 8, (size, 1), generator=g),
        au=torch.randint(0, 2, (size, 1, 12), generator=g).float(),
        va_mask=(torch.rand(size, 1, generator=g) < 0.7) & ("va" in tasks),
        expr_mask=(torch.rand(size, 1, generator=g) < 0.6) & ("expr" in tasks),
        au_mask=(torch.rand(size, 1, 12, generator=g) < 0.8) & ("au" in tasks),
    )
    inputs = torch.randn(size, 1, FEATURES, generator=g, dtype=torch.float64)
    return Batch(inputs, all_valid(inputs), labels, torch.arange(size)[:, None], torch.arange(size))


def losses_of(objective, outputs: Outputs, batch: Batch) -> dict[str, torch.Tensor]:
    sums = objective.sums(outputs, batch)
    return global_losses(objective, sums, total_sums(sums), scale=1.0)


def cut(batch: Batch, begin: int, end: int) -> Batch:
    return batch.take(slice(begin, end))


def sorted_so_that_ranks_lack_tasks(batch: Batch) -> Batch:
    """The first samples lose VA, the next EXPR, the last AU: a rank that holds one part lacks that task's labels."""
    third, labels = len(batch.samples) // 3, batch.labels
    va, expr, au = labels.va_mask.clone(), labels.expr_mask.clone(), labels.au_mask.clone()
    va[:third], expr[third : 2 * third], au[2 * third :] = False, False, False
    return batch._replace(labels=labels._replace(va_mask=va, expr_mask=expr, au_mask=au))


def gradients(module: nn.Module) -> torch.Tensor:
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in module.parameters()]
    )


def rank_main(rank, cuts, init_file, config, module, batch, parts, results):
    """One rank: its part of the batch in `parts` micro-batches, gradients averaged over ranks as the engine does."""
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=len(cuts))
    module = copy.deepcopy(module)
    micro = split_batch(cut(batch, *cuts[rank]), parts=parts, passes=1)
    total = gram = None
    if parts > 1:
        for part in micro:
            total = add_sums(total, module.sums(part))
        total = total_sums(total)
        if module.balancer.reads_gradients:
            gram = total_gram(sum(module.gram(part, total, parts=parts) for part in micro))
    for part in micro:
        loss = module(part, total, gram, parts=parts)
        (loss.total / parts).backward()  # the engine divides by the number of micro-batches
    mean = gradients(module)
    dist.all_reduce(mean)
    results.put((rank, (mean / len(cuts)).numpy().tolist(), loss.total.item()))
    dist.destroy_process_group()


CUTS = {2: [(0, 7), (7, 24)], 3: [(0, 8), (8, 16), (16, 24)], 5: [(0, 1), (1, 9), (9, 10), (10, 20), (20, 24)]}


@pytest.mark.whole
@pytest.mark.parametrize(
    ("num_ranks", "parts", "balancing"),
    [
        (2, 1, "fixed"),
        (3, 1, "uncertainty"),
        (2, 3, "uncertainty"),
        (3, 2, "dwa"),
        (5, 1, "famo"),
        (2, 3, "upgrad"),
        (3, 1, "pcgrad"),
        (5, 1, "cagrad"),
    ],
)
def test_gradients_of_many_ranks_are_those_of_one(num_ranks, parts, balancing, tmp_path):
    """Unequal batches, ranks that lack a task's labels, class weights, and micro-batches: to float64 tolerance."""
    config = LossConfig(va=0.7, expr=1.3, au=2.0, balancing=balancing, expr_weights="balanced", au_weights="balanced")
    torch.manual_seed(0)
    objective = Affect(config, COUNTS)
    module = ObjectiveModule(TinyModel(), objective, balancing=config.balancing, shared="trunk").double()
    if balancing in ("dwa", "famo"):  # in the midst of training
        getattr(module.balancer, {"dwa": "found", "famo": "logits"}[balancing]).copy_(torch.tensor([0.9, 1.4, 0.7]))
    batch = sorted_so_that_ranks_lack_tasks(make_batch(24))
    check_many_ranks(module, batch, config, num_ranks, parts, tmp_path)


def check_many_ranks(module, batch, config, num_ranks, parts, tmp_path) -> None:
    """Check the losses and gradients of real ranks, of micro-batches each, against those of the whole batch."""
    whole = copy.deepcopy(module)
    loss = whole(batch)
    loss.total.backward()
    results = forkserver.Queue()
    args = (CUTS[num_ranks], tmp_path / "store", config, module, batch, parts, results)
    processes = start_ranks(rank_main, args, num_ranks, join=False)
    found = [results.get(timeout=90) for _ in range(num_ranks)]
    processes.join()
    for _, mean, total in found:
        torch.testing.assert_close(torch.tensor(mean, dtype=torch.float64), gradients(whole), rtol=1e-12, atol=1e-15)
        assert total == pytest.approx(loss.total.item(), rel=1e-13)


def test_balanced_weights_are_bounded_and_a_unit_that_is_always_on_or_off_has_a_gradient():
    """1,000 rows: units that are on always, never, 4 in 5, once; classes of 989, 10, 1 and 0 rows."""
    counts = LabelCounts(
        rows=1000, va=0, expr=1000, au=[1000] * 12, expr_classes=[989, 10, 1, 0, 0, 0, 0, 0],
        au_positives=[1000, 0, 800, 1, *[500] * 8], unlabelled=0,
    )  # fmt: skip
    objective = Affect(LossConfig(expr_weights="balanced", au_weights="balanced"), counts)
    weights = objective.classes
    assert weights.au.tolist() == [1 / 20, 20, 0.25, 20, *[1.0] * 8]
    assert weights.expr.tolist() == pytest.approx([1000 / (3 * 989), 20, 20, 0, 0, 0, 0, 0])
    logits = torch.zeros(1, 1, 12, dtype=torch.float64, requires_grad=True)
    outputs = Outputs(torch.zeros(1, 1, 2), torch.zeros(1, 1, 8), logits)
    batch = make_batch(1)
    labels = batch.labels._replace(au=torch.ones(1, 1, 12), au_mask=torch.ones(1, 1, 12, dtype=torch.bool))
    objective.sums(outputs, batch._replace(labels=labels))["au"][0].backward()
    assert float(logits.grad.abs().amin()) > 0


def test_losses_are_the_written_out_formulas():
    batch = make_batch(50)
    labels, outputs = batch.labels, TinyModel()(batch.inputs, batch.valid)
    config = LossConfig(expr_weights="balanced", au_weights="balanced")
    objective = Affect(config, COUNTS)
    losses, weights = losses_of(objective, outputs, batch), objective.classes
    mask = labels.expr_mask.flatten()
    expr = F.cross_entropy(outputs.expr_logits.flatten(0, 1)[mask], labels.expr.flatten()[mask], weight=weights.expr)
    torch.testing.assert_close(losses["expr"], expr)
    entries = F.binary_cross_entropy_with_logits(
        outputs.au_logits, labels.au.double(), pos_weight=weights.au, reduction="none"
    )
    torch.testing.assert_close(losses["au"], entries[labels.au_mask].mean())
    cccs = []
    for dim in range(2):
        x, y = outputs.va[..., dim][labels.va_mask], labels.va[..., dim][labels.va_mask].double()
        cov = ((x - x.mean()) * (y - y.mean())).mean()
        cccs.append(2 * cov / (x.var(correction=0) + y.var(correction=0) + (x.mean() - y.mean()) ** 2))
    torch.testing.assert_close(losses["va"], 1 - sum(cccs) / 2, rtol=1e-7, atol=1e-8)


def test_focal_and_adjusted_cross_entropy_are_the_written_out_formulas():
    """Focal: (1 - p)^2 of the labelled class. Adjusted: logits plus log shares of the training labels, in the loss."""
    batch = make_batch(50)
    labels, outputs = batch.labels, TinyModel()(batch.inputs, batch.valid)
    objective = Affect(LossConfig(expr_focal=2.0, expr_prior=1.5), COUNTS)
    shares = (
        torch.tensor([20, 10, 5, 5, 10, 5, 5, 1], dtype=torch.float64) / 61
    )  # a class without a label counts as one
    logits = outputs.expr_logits[labels.expr_mask] + 1.5 * shares.log()
    p = logits.softmax(-1)[torch.arange(len(logits)), labels.expr[labels.expr_mask]]
    torch.testing.assert_close(losses_of(objective, outputs, batch)["expr"], (-p.log() * (1 - p) ** 2).mean())


def test_asymmetric_loss_is_focal_loss_where_both_exponents_are_one_number():
    g = torch.Generator().manual_seed(0)
    logits, on = torch.randn(40, 12, generator=g) * 3, (torch.rand(40, 12, generator=g) < 0.3).float()
    theirs = sigmoid_focal_loss(logits, on, alpha=-1, gamma=2.0, reduction="none")
    torch.testing.assert_close(asymmetric_loss(logits, on, 2.0, 2.0, 0.0), theirs)
    p = logits.sigmoid()
    shifted = (p - 0.05).clamp_min(0)
    expected = torch.where(on > 0, -p.log() * (1 - p), -(1 - shifted).log() * shifted**4)
    torch.testing.assert_close(asymmetric_loss(logits, on, 1.0, 4.0, 0.05), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [(0.5, 0.5, 0.0), (0.5, 0.3, 0.2), (0.0, 4.0, 0.05), (2.0, 2.0, 0.0)])
def test_losses_that_leave_out_what_is_easy_have_finite_gradients_at_every_logit(settings):
    logits = torch.tensor([-200.0, -20, -1, 0, 1, 20, 200], requires_grad=True)
    for on in (0.0, 1.0):
        asymmetric_loss(logits, torch.full_like(logits, on), *settings).sum().backward()
    assert logits.grad.isfinite().all()
    objective = Affect(LossConfig(expr_focal=settings[1]), COUNTS)
    batch = make_batch(7)
    sure = (torch.eye(8)[:7] * 300)[:, None].requires_grad_()
    outputs = Outputs(torch.zeros(7, 1, 2), sure, torch.zeros(7, 1, 12))
    objective.sums(outputs, batch)["expr"][0].backward()
    assert sure.grad.isfinite().all()


def test_the_gradient_of_ccc_is_that_of_the_direct_formula():
    batch, model = make_batch(30), TinyModel()
    inputs, valid, labels, *_ = batch
    loss = losses_of(Affect(LossConfig(), COUNTS), model(inputs, valid), batch)["va"]
    (from_sums,) = torch.autograd.grad(loss, model.va.weight)
    va = model(inputs, valid).va
    terms = []
    for dim in range(2):
        x, y = va[..., dim][labels.va_mask], labels.va[..., dim][labels.va_mask].double()
        cov = ((x - x.mean()) * (y - y.mean())).mean()
        terms.append(2 * cov / (x.var(correction=0) + y.var(correction=0) + (x.mean() - y.mean()) ** 2))
    (direct,) = torch.autograd.grad(1 - sum(terms) / 2, model.va.weight)
    torch.testing.assert_close(from_sums, direct, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("present", [p for n in range(4) for p in itertools.combinations(("va", "expr", "au"), n)])
def test_a_task_nobody_labelled_is_exactly_zero_with_zero_gradient(present):
    module = ObjectiveModule(TinyModel(), Affect(LossConfig(), COUNTS), balancing="uncertainty")
    loss = module(make_batch(20, tasks=present))
    loss.total.backward()
    assert torch.isfinite(loss.total)
    for place, (task, head) in enumerate(
        zip(("va", "expr", "au"), (module.model.va, module.model.expr, module.model.au))
    ):
        assert (loss.terms[task] == 0) == (task not in present)
        assert bool((head.weight.grad == 0).all()) == (task not in present)
        assert (module.balancer.log_variance.grad[place] == 0) == (task not in present)
        assert bool(loss.present[task]) == (task in present)


def test_a_prediction_that_is_not_finite_counts_only_where_it_is_labelled():
    batch, objective = make_batch(10), Affect(LossConfig(), COUNTS)
    outputs = TinyModel()(batch.inputs, batch.valid)
    poisoned = outputs._replace(va=outputs.va.index_fill(0, torch.tensor(3), float("nan")))
    everywhere = torch.ones_like(batch.labels.va_mask)
    for mask in (everywhere.index_fill(0, torch.tensor(3), False), everywhere):
        masked = batch._replace(labels=batch.labels._replace(va_mask=mask))
        assert torch.isnan(losses_of(objective, poisoned, masked)["va"]) == bool(mask[3])


def test_constant_predictions_have_a_finite_loss_and_gradient():
    va = torch.full((8, 1, 2), 0.25, dtype=torch.float64, requires_grad=True)
    outputs, batch = Outputs(va, torch.zeros(8, 1, 8), torch.zeros(8, 1, 12)), make_batch(8)
    labels = batch.labels._replace(va=torch.full((8, 1, 2), 0.25), va_mask=torch.ones(8, 1, dtype=torch.bool))
    loss = losses_of(Affect(LossConfig(), COUNTS), outputs, batch._replace(labels=labels))["va"]
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(va.grad).all()
    assert concordance(torch.zeros(6, dtype=torch.float64)) == 0


def test_a_weight_of_zero_switches_a_task_off():
    module = ObjectiveModule(TinyModel(), Affect(LossConfig(va=0.0), COUNTS), balancing="uncertainty")
    module(make_batch(20)).total.backward()
    assert module.model.va.weight.grad is None or (module.model.va.weight.grad == 0).all()
    assert module.model.au.weight.grad.abs().sum() > 0


class Spread:
    """Another objective, of two terms: how far outputs spread over the whole batch, which is no mean of samples, and
    how far they are from the inputs. The first is there where somebody's VA is labelled."""

    terms = ("spread", "distance")

    def __init__(self):
        self.fixed = {"spread": 0.5, "distance": 2.0}

    def sums(self, outputs, batch):
        x, there = outputs.va.double()[..., 0], batch.labels.va_mask
        x, far = torch.where(there, x, 0.0), (outputs.va.double() - batch.inputs[..., :2]) ** 2
        spread = torch.stack([there.double().sum(), x.sum(), (x * x).sum()])
        return {"spread": spread, "distance": torch.stack([far.sum(), far.new_tensor(far.numel())])}

    def weight(self, term, total):
        return total[0] if term == "spread" else total[1]

    def loss(self, term, total):
        if term == "spread":
            return (total[2] / total[0] - (total[1] / total[0]) ** 2).sqrt()
        return total[0] / total[1].detach()


def make_other(balancing: str) -> ObjectiveModule:
    torch.manual_seed(0)
    return ObjectiveModule(TinyModel(), Spread(), balancing=balancing).double()


@pytest.mark.parametrize("balancing", ["fixed", "uncertainty", "dwa", "famo"])
def test_another_objective_of_other_terms_is_exact_on_ranks_and_micro_batches_too(balancing, tmp_path):
    module, batch = make_other(balancing), sorted_so_that_ranks_lack_tasks(make_batch(24))
    whole = copy.deepcopy(module)
    loss = whole(batch)
    loss.total.backward()
    assert list(loss.weights) == list(loss.terms) == list(Spread.terms)
    micro = split_batch(batch, parts=3, passes=1)
    total = None
    for part in micro:
        total = add_sums(total, module.sums(part))
    for part in micro:
        (module(part, total, parts=3).total / 3).backward()
    torch.testing.assert_close(gradients(module), gradients(whole), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("balancing", ["fixed", "uncertainty", "dwa", "famo"])
def test_a_term_of_another_objective_that_has_nothing_to_learn_from_is_exactly_zero(balancing):
    """Its own formula is 0 / 0 then."""
    module = make_other(balancing)
    loss = module(make_batch(12, tasks=("expr",)))
    loss.total.backward()
    assert loss.terms["spread"] == 0
    assert not loss.present["spread"]
    assert torch.isfinite(gradients(module)).all()
