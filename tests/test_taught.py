"""Targets of a teacher where labels are missing: exact for any split, and for nothing that is labelled."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mtl_dist.config import build_config
from mtl_dist.errors import InputError
from mtl_dist.models import build_model
from mtl_dist.objective.affect import Affect
from mtl_dist.objective.losses import add_sums
from mtl_dist.objective.module import ObjectiveModule
from mtl_dist.objective.taught import Taught, Teacher
from mtl_dist.presets import load_preset
from mtl_dist.sections import LossConfig
from mtl_dist.tasks import TASKS, Batch, Labels, Outputs
from mtl_dist.training.averaging import WeightAverage
from tests.test_objective import (
    COUNTS,
    TinyModel,
    check_many_ranks,
    gradients,
    losses_of,
    make_batch,
    sorted_so_that_ranks_lack_tasks,
)

BALANCERS = ("fixed", "uncertainty", "famo", "upgrad")


def make_teacher(*, tasks: tuple[str, ...] = TASKS, seed: int = 7, sure: float = 2.0) -> Teacher:
    """Another network, whose logits are spread so far that it is sure of some rows and not of others."""
    torch.manual_seed(seed)
    model = TinyModel().requires_grad_(False).eval()
    for head in (model.expr, model.au):
        head.weight *= sure * 3
    return Teacher(model, tasks)


def make_module(teacher: Teacher | None, *, balancing: str = "fixed", **own) -> ObjectiveModule:
    config = LossConfig(va=0.7, expr=1.3, au=2.0, expr_weights="balanced", expr_prior=1.0, au_gamma_neg=2.0, **own)
    objective = Affect(config, COUNTS)
    torch.manual_seed(0)
    objective = Taught(objective, teacher, config, COUNTS) if teacher else objective
    return ObjectiveModule(TinyModel(), objective, balancing=balancing, shared="trunk").double()


def labelled_everywhere(batch: Batch) -> Batch:
    masks = {f"{task}_mask": torch.ones_like(getattr(batch.labels, f"{task}_mask")) for task in TASKS}
    return batch._replace(labels=batch.labels._replace(**masks))


def labelled_nowhere(batch: Batch) -> Batch:
    masks = {f"{task}_mask": torch.zeros_like(getattr(batch.labels, f"{task}_mask")) for task in TASKS}
    return batch._replace(labels=batch.labels._replace(**masks))


# ------------------------------------------------------------------------------------------------------------ exactness


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    least=st.sampled_from([0.0, 0.6, 0.95]),
    balancing=st.sampled_from(BALANCERS),
    data=st.data(),
)
def test_any_split_of_a_batch_has_the_losses_and_gradients_of_the_whole(rows, seed, least, balancing, data):
    """A part is a micro-batch of a rank; what ranks add is that they are added up, as in the test below. One may be
    empty, as that of a rank without rows."""
    module = make_module(make_teacher(), balancing=balancing, teacher_confidence=least)
    batch, whole = make_batch(rows, seed), copy.deepcopy(module)
    batch.rows[data.draw(st.integers(0, rows - 1))] = -1  # a frame that counts in another window
    loss = whole(batch)
    loss.total.backward()
    ends = sorted(data.draw(st.lists(st.integers(0, rows), max_size=3)))
    parts = [batch.take(slice(begin, end)) for begin, end in zip([0, *ends], [*ends, rows])]
    total = None
    for part in parts:
        total = add_sums(total, module.sums(part))
    gram = sum(module.gram(part, total, parts=len(parts)) for part in parts)
    for part in parts:
        found = module(part, total, gram, parts=len(parts))
        (found.total / len(parts)).backward()
        assert found.total.item() == pytest.approx(loss.total.item(), rel=1e-12, abs=1e-14)
    torch.testing.assert_close(gradients(module), gradients(whole), rtol=1e-12, atol=1e-14)
    for task, share in module.objective.taught(total).items():
        assert float(share) == pytest.approx(float(whole.objective.taught(loss.sums)[task]), rel=1e-13)


@pytest.mark.whole
@pytest.mark.parametrize(("num_ranks", "parts", "balancing"), [(2, 1, "fixed"), (2, 3, "upgrad"), (5, 1, "famo")])
def test_gradients_of_many_ranks_are_those_of_one(num_ranks, parts, balancing, tmp_path):
    """Ranks that lack a task's labels altogether, and have only targets of it."""
    module = make_module(make_teacher(), balancing=balancing)
    batch = sorted_so_that_ranks_lack_tasks(make_batch(24))
    check_many_ranks(module, batch, LossConfig(), num_ranks, parts, tmp_path)


# --------------------------------------------------------------------------------------------------------- the formulas


def test_losses_are_the_written_out_formulas():
    """Frame by frame, in numpy: the part of labels, and the mean over entries of what the teacher says."""
    config = LossConfig(teacher_weight=0.3, teacher_confidence=0.8)
    batch, teacher, model = make_batch(30), make_teacher(), TinyModel()
    labels, outputs = batch.labels, model(batch.inputs, batch.valid)
    objective = Taught(Affect(config, COUNTS), teacher, config, COUNTS)
    found = losses_of(objective, outputs, batch)
    of_labels = losses_of(objective.by_labels, outputs, batch)
    mine, theirs = ([t[:, 0].detach().numpy() for t in out] for out in (outputs, teacher.model(batch.inputs, None)))

    def softmax(logits: np.ndarray) -> np.ndarray:
        shares = np.exp(logits - logits.max())
        return shares / shares.sum()

    errors, weights = dict.fromkeys(TASKS, 0.0), dict.fromkeys(TASKS, 0.0)
    for row in range(30):
        if not labels.va_mask[row, 0]:
            errors["va"] += ((mine[0][row] - theirs[0][row]) ** 2).mean()
            weights["va"] += 1
        q, p = softmax(theirs[1][row]), softmax(mine[1][row])
        if not labels.expr_mask[row, 0] and q.max() >= 0.8:
            errors["expr"] += q.max() * -(q * np.log(p)).sum()
            weights["expr"] += q.max()
        for unit in range(12):
            q, p = (1 / (1 + np.exp(-logits[2][row, unit])) for logits in (theirs, mine))
            sure = max(q, 1 - q)
            if not labels.au_mask[row, 0, unit] and sure >= 0.8:
                errors["au"] += sure * -(q * np.log(p) + (1 - q) * np.log(1 - p))
                weights["au"] += sure
    entries = {"va": 30, "expr": 30, "au": 30 * 12}
    shares = objective.taught(objective.sums(outputs, batch))
    for task in TASKS:
        assert 0 < weights[task] < entries[task]
        assert (found[task] - of_labels[task]).item() == pytest.approx(0.3 * errors[task] / entries[task], rel=1e-9)
        assert shares[task].item() == pytest.approx(weights[task] / entries[task], rel=1e-12)


@pytest.mark.parametrize("balancing", BALANCERS)
def test_a_batch_that_is_labelled_everywhere_has_the_gradients_that_it_has_without_a_teacher_bit_for_bit(balancing):
    batch = labelled_everywhere(make_batch(24))
    taught = make_module(make_teacher(), balancing=balancing, teacher_confidence=0.0)
    plain = make_module(None, balancing=balancing)
    for module in (taught, plain):
        module(batch).total.backward()
    assert torch.equal(gradients(taught), gradients(plain))


def test_only_outputs_of_missing_entries_have_another_gradient():
    config = LossConfig(teacher_confidence=0.0)
    batch = make_batch(24)
    of_both = []
    for objective in (Affect(config, COUNTS), Taught(Affect(config, COUNTS), make_teacher(), config, COUNTS)):
        outputs = Outputs(*(t.detach().requires_grad_() for t in TinyModel.forward(_seeded(), batch.inputs, None)))
        sum(losses_of(objective, outputs, batch).values()).backward()
        of_both.append([output.grad for output in outputs])
    masks = batch.labels.va_mask, batch.labels.expr_mask, batch.labels.au_mask
    for before, after, is_labelled in zip(*of_both, masks):
        assert torch.equal(before[is_labelled], after[is_labelled])
        assert (before[~is_labelled] == 0).all()
        assert (after[~is_labelled] != 0).any()


def _seeded() -> TinyModel:
    torch.manual_seed(3)
    return TinyModel()


@pytest.mark.parametrize(("least", "taught"), [(0.0, {"expr", "au"}), (1.0, set())])
def test_the_least_confidence_leaves_out_expressions_and_units_and_no_valence_and_arousal(least, taught):
    module = make_module(make_teacher(sure=1.0), teacher_confidence=least)
    loss = module(labelled_nowhere(make_batch(24)))
    shares = module.objective.taught(loss.sums)
    assert float(shares["va"]) == 1
    assert {task for task in ("expr", "au") if shares[task] > 0} == taught
    assert {task for task in TASKS if loss.present[task]} == taught | {"va"}
    loss.total.backward()
    for task in ("expr", "au"):
        assert bool(getattr(module.model, task).weight.grad.any()) == (task in taught)
        assert (loss.terms[task] == 0) == (task not in taught)


def test_a_step_without_any_label_has_the_teachers_part_alone():
    module = make_module(make_teacher(), balancing="uncertainty", teacher_confidence=0.0)
    batch = labelled_nowhere(make_batch(8))
    loss = module(batch)
    loss.total.backward()
    assert torch.isfinite(gradients(module)).all()
    twice = make_module(make_teacher(), teacher_confidence=0.0, teacher_weight=1.0)(batch)
    for task in TASKS:
        assert float(twice.terms[task]) == pytest.approx(2 * float(loss.terms[task]), rel=1e-12)


def test_padding_and_frames_for_the_sake_of_others_are_not_taught():
    """Whatever the network makes of them."""
    config = LossConfig(teacher_confidence=0.0)
    objective = Taught(Affect(config, COUNTS), make_teacher(), config, COUNTS)
    batch = labelled_nowhere(make_batch(6))
    valid = torch.tensor([True, True, False, True, True, False])[:, None]
    rows = torch.tensor([0, -1, -1, 3, 4, -1])[:, None]  # the second is context
    batch = batch._replace(valid=valid, rows=rows)
    outputs = TinyModel()(batch.inputs, batch.valid)
    places = torch.tensor([1, 2, 5])
    poisoned = Outputs(*(output.detach().index_fill(0, places, float("nan")).requires_grad_() for output in outputs))
    total = objective.sums(poisoned, batch)
    kept = torch.tensor([0, 3, 4])
    apart = objective.sums(Outputs(*(output[kept] for output in outputs)), batch.take(kept))
    for task in TASKS:
        torch.testing.assert_close(total[task], apart[task], rtol=1e-13, atol=0)
        assert total[task][-1].item() == 3 * (12 if task == "au" else 1)


def test_what_the_training_set_the_teacher_or_the_loss_does_not_know_is_not_taught():
    counts = COUNTS.model_copy(update={"expr": 0, "au": [0] * 5 + [50] * 7})
    batch = labelled_nowhere(make_batch(10))
    outputs = TinyModel()(batch.inputs, batch.valid)

    def shares(tasks=TASKS, **own) -> dict[str, float]:
        config = LossConfig(teacher_confidence=0.0, **own)
        objective = Taught(Affect(config, counts), make_teacher(tasks=tasks), config, counts)
        total = objective.sums(outputs, batch)
        assert total["au"][-1].item() in (0, 70)
        return {task: share.item() for task, share in objective.taught(total).items()}

    assert shares().keys() == {"va", "au"}
    assert shares(tasks=("expr", "au")).keys() == {"au"}
    assert shares(au=0.0).keys() == {"va"}


def test_epochs_before_the_teacher_begins_are_those_without_one():
    taught, plain = make_module(make_teacher(), teacher_after=2), make_module(None)
    batch, found = make_batch(24), []
    for epoch in range(4):
        taught.objective.begin_epoch(epoch)
        taught.zero_grad()
        loss = taught(batch)
        loss.total.backward()
        found.append(gradients(taught))
        assert all((share > 0) == (epoch >= 2) for share in taught.objective.taught(loss.sums).values())
    plain(batch).total.backward()
    assert torch.equal(found[0], gradients(plain))
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[3])
    assert not torch.equal(found[2], found[0])


# ---------------------------------------------------------------------------------------------------------- the teacher


class Noisy(TinyModel):
    """A teacher with dropout and statistics, which notes how it is asked."""

    def __init__(self):
        super().__init__()
        self.norm, self.asked = nn.BatchNorm1d(5).double(), []

    def forward(self, inputs, valid):
        self.asked.append((self.training, torch.is_grad_enabled()))
        inputs = nn.functional.dropout(self.norm(inputs[:, 0]), 0.5, self.training)[:, None]
        return super().forward(inputs, valid)


@pytest.mark.parametrize("balancing", ["fixed", "upgrad"])
def test_a_teacher_is_asked_in_evaluation_mode_without_gradients_and_is_no_part_of_what_is_trained(balancing):
    teacher = Teacher(Noisy().eval(), TASKS)  # whose parameters would take gradients
    module = make_module(teacher, balancing=balancing).train()
    before, draws = copy.deepcopy(teacher.model.state_dict()), torch.get_rng_state()
    module(make_batch(12), looks_at_gradients=True).total.backward()
    assert torch.equal(torch.get_rng_state(), draws)
    assert set(teacher.model.asked) == {(False, False)}
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    ours = {id(parameter) for parameter in teacher.model.parameters()}
    assert not ours & {id(parameter) for parameter in module.parameters()}
    assert module.state_dict().keys() == make_module(None, balancing=balancing).state_dict().keys()


def test_balancers_see_the_shared_tensor_of_the_model_and_not_of_its_own_average():
    """The average is of the same class, and has a trunk, too."""
    module = make_module(make_teacher(), balancing="upgrad")
    module.objective = Taught(
        module.objective.by_labels, Teacher(WeightAverage(module.model, 0.9).model, TASKS), LossConfig(), COUNTS
    )
    batch = make_batch(12)
    with module._holding_shared() as held:
        module.objective.sums(module._predict(batch), batch)
    assert len(held) == 1
    assert held[0].made.requires_grad


def test_an_average_has_the_statistics_of_the_step_before_whatever_is_saved_between():
    """In evaluation mode they are what its targets depend on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = WeightAverage(model, 0.9)
    for step in range(1, 4):
        model(torch.randn(8, 3))
        average.update(model, step)
        for mine, current in zip(average.model.buffers(), model.buffers()):
            assert torch.equal(mine, current)


@pytest.mark.parametrize("preset", ["small", "small-b", "small-baseline", "small-c", "small-d"])
def test_every_family_is_taught_by_its_own_average(preset):
    own = {"data": {"image_size": 80}, "loss": {"teacher": "ema", "teacher_confidence": 0.0}, "train": {"ema": 0.9}}
    own["model"] = {"sequence": {"dims": [20]}} if preset == "small-c" else {}
    config = build_config(load_preset(preset), own)
    model = build_model(config.model, input_size=config.input_size)
    teacher = Teacher(WeightAverage(model, 0.9).model, TASKS)
    module = ObjectiveModule(model, Taught(Affect(config.loss, COUNTS), teacher, config.loss, COUNTS))
    size = (2, 3, 20) if preset == "small-c" else (2, 3, 3, 80, 80)
    inputs = torch.randn(size, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([[True, True, True], [True, True, False]])
    labels = Labels(
        torch.zeros(2, 3, 2), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 12),
        *(torch.zeros(shape, dtype=torch.bool) for shape in ((2, 3), (2, 3), (2, 3, 12))),
    )  # fmt: skip
    rows = torch.where(valid, torch.arange(6).view(2, 3), -1)
    loss = module(Batch(inputs, valid, labels, rows, torch.arange(2)))
    loss.total.backward()
    assert {task: float(total[-1]) for task, total in loss.sums.items()} == {"va": 5, "expr": 5, "au": 60}
    assert all(loss.present.values())
    assert torch.isfinite(gradients(module)).all()
    assert gradients(module).any()


# --------------------------------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"loss": {"teacher": "ema"}}, r"loss\.teacher is ema, .* train\.ema is 0: there is none; set it"),
        (
            {"loss": {"teacher": "runs/one", "teacher_after": 50}},
            r"loss\.teacher_after is 50 and train\.epochs 50: no epoch is left",
        ),
        (
            {"loss": {"teacher": "runs/one"}, "data": {"sampling": "per_task"}},
            r"loss\.teacher stands where labels are missing, and data\.sampling per_task hides labels",
        ),
        ({"loss": {"teacher": "runs/one", "teacher_weight": 0}}, r"loss\.teacher_weight is 0: .*greater than 0"),
        ({"loss": {"teacher": "runs/one", "teacher_confidence": 1.5}}, r"loss\.teacher_confidence is 1\.5"),
        ({"loss": {"teacher": "runs/one", "teacher_weight": float("nan")}}, r"loss\.teacher_weight is nan"),
    ],
)
def test_settings_that_cannot_go_with_a_teacher_are_refused(layer, words):
    with pytest.raises(InputError, match=words):
        build_config({"train": {"epochs": 50}}, layer)
