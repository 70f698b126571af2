"""Loss balancing: the weights are the papers', the same on every rank, and a task without labels moves nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtl_dist.config import build_config
from mtl_dist.errors import InputError
from mtl_dist.objective.gradients import build_balancer
from mtl_dist.tasks import TASKS

ALL = {task: torch.tensor(True) for task in TASKS}
ONES = dict.fromkeys(TASKS, 1.0)


def losses_of(*values: float) -> dict[str, torch.Tensor]:
    return {task: torch.tensor(value, dtype=torch.float64) for task, value in zip(TASKS, values)}


def present_of(*tasks: str) -> dict[str, torch.Tensor]:
    return {task: torch.tensor(task in tasks) for task in TASKS}


@pytest.mark.parametrize("balancing", ["fixed", "uncertainty", "dwa", "famo"])
def test_what_is_minimised_is_the_sum_of_weight_times_loss(balancing):
    balancer = build_balancer(balancing, {"va": 0.5, "expr": 2.0, "au": 1.0})
    losses = {task: loss.requires_grad_() for task, loss in losses_of(1.2, 2.1, 0.7).items()}
    total = balancer(losses, ALL)
    gradients = torch.stack(torch.autograd.grad(total, list(losses.values())))
    torch.testing.assert_close(gradients, balancer.weights(losses, ALL))
    if balancing != "famo":
        torch.testing.assert_close(gradients, torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64))


def test_losses_that_all_weigh_nothing_are_refused():
    with pytest.raises(InputError, match=r"loss\.va, expr, au are all 0: nothing would be trained"):
        build_config({"loss": {"va": 0, "expr": 0, "au": 0}})
    assert build_config({"loss": {"va": 0, "expr": 0}}).loss.au == 1


def test_dwa_is_the_formula_written_out():
    """lambda_k = K exp(r_k / 2) / sum exp(r_i / 2), r_k = mean loss of the last epoch / of the one before it."""
    balancer = build_balancer("dwa", ONES)
    g = torch.Generator().manual_seed(0)
    means = []
    for epoch in range(5):
        expected = [1.0] * 3
        if epoch >= 2:
            ratios = [last / before for last, before in zip(means[-1], means[-2])]
            expected = [3 * math.exp(r / 2) / sum(math.exp(other / 2) for other in ratios) for r in ratios]
        found = balancer.weights(losses_of(1, 1, 1), ALL)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
        steps = torch.rand(7, 3, generator=g, dtype=torch.float64) + 0.1
        for step in steps:
            balancer.stepped(losses_of(*step.tolist()), ALL, None)
        balancer.finished_epoch()
        means.append(steps.mean(0).tolist())


def test_dwa_stays_finite_where_a_loss_rises_without_bound():
    balancer = build_balancer("dwa", ONES)
    for scale in (1e-6, 1.0):  # a ratio of a million, whose exponential is none of float64
        balancer.stepped(losses_of(scale, 1, 1), ALL, None)
        balancer.finished_epoch()
    assert balancer.weights(losses_of(1, 1, 1), ALL).tolist() == pytest.approx([3, 0, 0], abs=1e-12)


def test_dwa_takes_means_over_the_steps_that_have_labels_and_leaves_out_tasks_without_any():
    balancer = build_balancer("dwa", ONES)
    for va, au in ((1.0, 0.8), (0.5, 0.8)):
        balancer.stepped(losses_of(va, 0.0, au), present_of("va", "au"), None)
        balancer.stepped(losses_of(0.0, 0.0, au), present_of("au"), None)  # the mean of VA is not halved
        balancer.finished_epoch()
    shares = math.exp(0.5 / 2), math.exp(1 / 2)
    expected = [2 * shares[0] / sum(shares), 1.0, 2 * shares[1] / sum(shares)]
    torch.testing.assert_close(balancer.found, torch.tensor(expected, dtype=torch.float64))
    balancer.stepped(losses_of(0.0, 0.0, 0.4), present_of("au"), None)  # an epoch without labels of VA
    balancer.finished_epoch()
    assert balancer.last[0] / balancer.before[0] == 0.5
    assert balancer.last[2] / balancer.before[2] == 0.5
    torch.testing.assert_close(balancer.found[[0, 2]], torch.ones(2, dtype=torch.float64))


class PublishedFAMO:
    """The method as its authors' code has it, plainly: torch's own Adam and automatic derivatives."""

    def __init__(self):
        self.w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        self.adam = torch.optim.Adam([self.w], lr=0.025, weight_decay=1e-2)

    def loss(self, losses: torch.Tensor) -> torch.Tensor:
        self.before = losses.detach()
        z = F.softmax(self.w, -1).detach()
        c = (z / losses).sum().detach()
        return (losses.log() * z / c).sum()

    def update(self, after: torch.Tensor) -> None:
        delta = self.before.log() - after.log()
        (gradient,) = torch.autograd.grad(F.softmax(self.w, -1), self.w, grad_outputs=delta)
        self.w.grad = gradient
        self.adam.step()


class Toy(nn.Module):
    """Three tasks of very different scale that pull at the same parameters."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))

    def forward(self) -> torch.Tensor:
        x = self.x
        return torch.stack(
            [100 * (x[0] - 1.5) ** 2 + 1, (x * x).sum() + 0.1, 0.01 * (x[1] + 3).exp() + 0.001 * x[2] ** 2]
        )


def test_famo_is_the_published_method_on_a_toy():
    published, theirs, mine = PublishedFAMO(), Toy(), Toy()
    balancer = build_balancer("famo", ONES)
    for _ in range(60):
        found = dict(zip(TASKS, mine()))
        (gradient,) = torch.autograd.grad(balancer(found, ALL), mine.x)
        (expected,) = torch.autograd.grad(published.loss(theirs()), theirs.x)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
        for toy, slope in ((mine, gradient), (theirs, expected)):
            toy.x.data -= 0.01 * slope
        published.update(theirs().detach())
        balancer.stepped({task: loss.detach() for task, loss in found.items()}, ALL, dict(zip(TASKS, mine().detach())))
        torch.testing.assert_close(balancer.logits, published.w.detach(), rtol=1e-9, atol=1e-12)
    assert balancer.logits.abs().max() > 0.05, "it has moved"


@pytest.mark.parametrize("absent", TASKS)
def test_famo_leaves_a_task_without_labels_where_it_is(absent):
    """Nor does such a step count for it; the others share the weight."""
    balancer = build_balancer("famo", ONES)
    balancer.stepped(losses_of(1, 2, 3), ALL, losses_of(0.9, 1.9, 2.0))
    kept = {name: buffer.clone() for name, buffer in balancer.named_buffers()}
    tasks = [task for task in TASKS if task != absent]
    losses = {task: torch.tensor(0.0 if task == absent else 2.0, dtype=torch.float64) for task in TASKS}
    after = {task: loss * 0.5 if task == tasks[0] else loss for task, loss in losses.items()}
    balancer.stepped(losses, present_of(*tasks), after)
    place = TASKS.index(absent)
    for name in ("logits", "mean", "mean_square", "steps"):
        now = getattr(balancer, name)
        assert now[place] == kept[name][place]
        assert (now != kept[name]).sum() == 2
    weights = balancer.weights(losses, present_of(*tasks))
    assert weights[place] == 0
    assert weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("balancing", ["dwa", "famo", "uncertainty"])
def test_a_step_without_any_label_changes_nothing(balancing):
    balancer = build_balancer(balancing, ONES)
    kept = {name: tensor.clone() for name, tensor in balancer.state_dict().items()}
    assert balancer(losses_of(0, 0, 0), present_of()) == 0
    balancer.stepped(losses_of(0, 0, 0), present_of(), losses_of(0, 0, 0))
    balancer.finished_epoch()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in balancer.state_dict().items())


@pytest.mark.parametrize("balancing", ["dwa", "famo"])
def test_what_a_balancer_learned_is_in_its_state(balancing):
    """Loaded into a new one, it goes on bit by bit as the old one."""
    old, new = (build_balancer(balancing, ONES) for _ in range(2))
    g = torch.Generator().manual_seed(0)

    def go_on(balancer, rounds) -> torch.Tensor:
        for before, after in rounds:
            balancer.stepped(losses_of(*before), ALL, losses_of(*after))
        balancer.finished_epoch()
        return balancer.weights(losses_of(1, 2, 3), ALL)

    first, second, third = (torch.rand(4, 2, 3, generator=g, dtype=torch.float64).tolist() for _ in range(3))
    go_on(old, first)
    go_on(old, second)
    new.load_state_dict(old.state_dict())
    assert torch.equal(go_on(new, third), go_on(old, third))
    assert not torch.equal(
        old.weights(losses_of(1, 2, 3), ALL),
        build_balancer(balancing, ONES).weights(losses_of(1, 2, 3), ALL),
    )
