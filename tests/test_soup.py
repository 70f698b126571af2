"""Means of checkpoints: against numpy, torch's update_bn and choices made by hand; what is written, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save
from torch import nn
from torch.optim.swa_utils import update_bn

import mtl_dist
from mtl_dist import storage
from mtl_dist.batchnorm import find_norms, find_trained_norms, statistics_anew
from mtl_dist.objective.affect import PredictedRows
from mtl_dist.objective.crossfit import make_folds
from mtl_dist.objective.metrics import MetricSums, Predictions, Targets, metric_sums
from mtl_dist.objective.scores import scores
from mtl_dist.predicting.members import Member, open_member, open_val, predict_member, row_names
from mtl_dist.runs.checkpoint import best, committed
from mtl_dist.runs.start import build_started, find_start
from mtl_dist.runs.weights import load_weights, open_last, open_weights
from mtl_dist.sealed import seal, unseal
from mtl_dist.shards.splits import group_rows
from mtl_dist.soup import outputs
from mtl_dist.soup.__main__ import main
from mtl_dist.soup.greedy import add_greedily, choose, choose_across
from mtl_dist.soup.ingredients import find_ingredients, find_notes
from mtl_dist.soup.means import mean_of
from mtl_dist.soup.options import SoupCommand
from mtl_dist.soup.statistics import estimate_statistics, open_training_pass
from tests.conftest import assert_one_message, run_here
from tests.test_ensemble import files_below, rewrite, rewrite_state

fast = settings(max_examples=60, deadline=None, derandomize=True)

# --------------------------------------------------------------------------------------------------------------- means


@fast
@given(st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float64]))
def test_a_mean_is_numpys_in_float64_cast_back_and_counts_are_the_newests(count, seed, dtype):
    rng = np.random.default_rng(seed)
    drawn = (rng.normal(size=(count, 3, 2)) * 10.0 ** rng.integers(-3, 4, (count, 1, 1))).astype(dtype)
    states = [{"w": torch.from_numpy(own), "n": torch.tensor(n)} for n, own in enumerate(drawn)]
    newest = states[int(rng.integers(count))]
    found = mean_of(iter(states), newest)
    total = np.zeros((3, 2))
    for own in drawn:
        total += own
    assert found["w"].numpy().dtype == dtype
    np.testing.assert_array_equal(found["w"].numpy(), (total / count).astype(dtype))
    assert found["n"] == newest["n"]
    assert found["n"].dtype == torch.int64


def test_a_mean_in_float64_keeps_what_float32_loses():
    states = [{"w": torch.tensor([value])} for value in (1e8, 1.0, 1.0, -1e8)]
    assert mean_of(states, states[-1])["w"].item() == 0.5
    assert sum(state["w"] for state in states).item() == 0.0
    kept = states[0]["w"].clone()
    mean_of(states, states[0])
    assert torch.equal(states[0]["w"], kept)


# ---------------------------------------------------------------------------------------------------------- statistics


def test_statistics_anew_are_those_of_update_bn_bit_for_bit_and_frozen_layers_keep_theirs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))
    model.append(nn.BatchNorm2d(2))
    reference = nn.Sequential(*model)  # the same layers
    batches = [torch.randn(size, 3, 8, 8) for size in (6, 6, 3)]

    def seeded():
        for number, batch in enumerate(batches):
            torch.manual_seed(number)
            yield batch

    update_bn(seeded(), reference)
    expected = {name: buffer.clone() for name, buffer in reference.named_buffers()}
    for norm in find_norms(model).values():
        norm.running_mean.fill_(7.0)  # what an average of checkpoints left
    model.eval()
    with torch.no_grad(), statistics_anew(model, find_trained_norms(model)):
        assert model.training
        for batch in seeded():
            model(batch)
    assert not model.training
    assert model[1].momentum == 0.3
    assert expected.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffer, expected[name]) for name, buffer in model.named_buffers())
    assert model[1].num_batches_tracked == len(batches)

    model[1].requires_grad_(False)
    before = {name: buffer.clone() for name, buffer in model[1].named_buffers()}
    with torch.no_grad(), statistics_anew(model, find_trained_norms(model)):
        model(torch.randn(5, 3, 8, 8))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model[1].named_buffers())
    assert not torch.equal(model[4].running_mean, expected["4.running_mean"])


# -------------------------------------------------------------------------------------------------------------- greedy


def test_the_greedy_choice_is_that_made_by_hand():
    """A is best. B lowers it, C leaves it as it is, D raises what A and C have, E lowers that."""
    table = {(0,): 1.0, (0, 1): 0.9, (0, 2): 1.0, (0, 2, 3): 1.1, (0, 2, 3, 4): 1.05}
    asked = []

    def score(chosen):
        asked.append(chosen)
        return table[chosen]

    assert add_greedily([0, 1, 2, 3, 4], score) == (0, 2, 3)
    assert asked == list(table)
    assert add_greedily([3, 0], {(3,): 1.0, (0, 3): 1.0}.__getitem__) == (0, 3)


@fast
@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_a_greedy_choice_never_scores_less_than_what_it_began_with(count, seed):
    rng, table = np.random.default_rng(seed), {}

    def score(chosen):
        return table.setdefault(chosen, float(rng.integers(4)))

    order = rng.permutation(count).tolist()
    chosen = add_greedily(order, score)
    assert order[0] in chosen
    assert list(chosen) == sorted(set(chosen))
    assert score(chosen) >= score((order[0],))


def predicted(is_right: list[bool]) -> PredictedRows:
    """Predictions of rows that are all labelled Neutral, and nothing else: Neutral where they are right, else Anger."""
    count = len(is_right)
    expr = np.eye(8)[[0 if right else 1 for right in is_right]]
    none = np.zeros((count, 12))
    targets = Targets(none[:, :2], np.zeros(count, int), none, none[:, 0] > 0, none[:, 0] == 0, none > 0)
    return PredictedRows(np.arange(count), Predictions(none[:, :2], expr, none), targets)


def test_what_is_chosen_on_a_half_is_scored_on_the_other():
    """A is right on the first half and B on the second, which says nothing of the other; together they are wrong."""
    halves = np.array([0, 0, 1, 1])
    of = {(0,): [1, 1, 0, 0], (1,): [0, 0, 1, 1], (0, 1): [0, 0, 0, 0]}
    predict = {chosen: predicted(is_right) for chosen, is_right in of.items()}.__getitem__
    whole = choose(2, predict, halves >= 0)
    assert (whole.soup, whole.best) == ((0,), 0)
    # F1 of one of eight classes: 2 hits, 2 misses.
    assert scores(metric_sums(*predict((0,))[1:]))["p"] == pytest.approx(2 / 3 / 8)
    found = choose_across(2, predict, halves)
    assert [choice.soup for choice in found.choices] == [(1,), (0,)]  # the i-th is scored on half i
    assert (found.soup["p"], found.best["p"]) == (0.0, 0.0)
    # With the mean right everywhere each half chooses it, and it is scored so.
    of[0, 1] = [1, 1, 1, 1]
    predict = {chosen: predicted(is_right) for chosen, is_right in of.items()}.__getitem__
    found = choose_across(2, predict, halves)
    assert [choice.soup for choice in found.choices] == [(0, 1), (0, 1)]
    assert (found.soup["p"], found.best["p"]) == (pytest.approx(1 / 8), 0.0)


# ------------------------------------------------------------------------------------------------------- whole commands


def soup(*args) -> str:
    done = run_here("mtl_dist.soup", *map(str, args))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read_soup(out: Path) -> dict:
    return unseal((out / "soup.json").read_bytes())


def weights_of(uri: str) -> dict[str, np.ndarray]:
    return load_file(f"{uri}/model.safetensors")


def state_of(run: Path) -> dict:
    return json.loads((Path(best(committed(str(run))[0]).uri) / "state.json").read_text())


def is_statistic(name: str) -> bool:
    return "running_" in name or "num_batches" in name


def copy_run(run: Path, dest: Path, seed: int, spread: float = 0.02) -> Path:
    """Copy a run, and move the weights of its best checkpoint."""
    shutil.copytree(run, dest)
    rng = np.random.default_rng(seed)
    moved = {
        name: value if is_statistic(name) else (value * (1 + spread * rng.normal(size=value.shape))).astype(value.dtype)
        for name, value in weights_of(best(committed(str(run))[0]).uri).items()
    }
    rewrite(dest, "model.safetensors", save(moved))
    return dest


@pytest.fixture(scope="module")
def tail(run, tmp_path_factory) -> Path:
    """The tail average of a run's two checkpoints."""
    out = tmp_path_factory.mktemp("soups") / "tail"
    soup(run, "--last", 2, "--out", out, "--batch", 8)
    return out


@pytest.fixture(scope="module")
def three(run, tmp_path_factory) -> list[Path]:
    """Three runs that began alike."""
    root = tmp_path_factory.mktemp("three")
    return [run, copy_run(run, root / "second", 1), copy_run(run, root / "third", 2)]


def test_a_tail_average_is_the_mean_of_the_last_checkpoints_with_statistics_of_update_bn(tail, run):
    assert {path.name for path in tail.iterdir()} == {"soup.json", "model.safetensors", "README.md", "config.json"}
    last = open_last(str(run), 2)
    first, second, found = (weights_of(uri) for uri in (last[0].uri, last[1].uri, str(tail)))
    assert found.keys() == second.keys()
    for name in found:
        if not is_statistic(name):
            mean = (first[name].astype(np.float64) + second[name]) / 2
            np.testing.assert_array_equal(found[name], mean.astype(np.float32), err_msg=name)

    # The same mean, and torch's own function over the same data.
    model = load_weights(last[1])
    state = {name: torch.from_numpy(value) for name, value in found.items()}
    statistics = {name: value for name, value in model.state_dict().items() if is_statistic(name)}
    model.load_state_dict(state | statistics)
    command = SoupCommand((str(run),), "out", last=2, batch=8)
    member = Member(str(run), last[1], open_val(last[1], str(run)))
    training = open_training_pass(member, command)
    assert (training.num_steps, training.num_samples) == (5, 40)

    class OfPairs(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, pair):
            return self.model(*pair)

    update_bn(([pair] for pair in training.inputs(torch.device("cpu"))), OfPairs(model))
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(found[name], value.numpy(), err_msg=name)
    assert all(value == 5 for name, value in found.items() if "num_batches" in name)


def test_fewer_batches_of_the_training_set_are_its_first(run):
    weights = open_weights(str(run))
    member = Member(str(run), weights, open_val(weights, str(run)))
    model, reference = load_weights(weights), load_weights(weights)
    passes = [open_training_pass(member, SoupCommand((str(run),), "out", bn_batches=n, batch=4)) for n in (2, None, 99)]
    assert [training.num_steps for training in passes] == [2, 5, 5]
    pairs = list(passes[0].inputs(torch.device("cpu")))
    assert [len(inputs) for inputs, _ in pairs] == [4, 4, 4, 4]  # two steps of 8, in passes of 4
    estimate_statistics(model, passes[0], device=torch.device("cpu"))
    update_bn(([inputs] for inputs, _ in pairs), Alone(reference))
    mine, theirs = (find_norms(net) for net in (model, reference))
    first = next(iter(mine))  # dropout comes later
    assert torch.equal(mine[first].running_mean, theirs[first].running_mean)
    assert not model.training


class Alone(nn.Module):
    """A model of single valid frames."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return self.model(inputs, torch.ones(inputs.shape[:2], dtype=torch.bool))


def test_the_mean_is_scored_beside_its_checkpoints_and_told_on_the_card(tail, run):
    found, last = read_soup(tail), open_last(str(run), 2)
    names = [f"cropped, step {weights.checkpoint.step}" for weights in last]
    assert list(found["scores"]) == ["constant predictor", *names, "mean of the weights"]
    for name, weights in zip(names, last):
        assert found["scores"][name]["p"] == pytest.approx(weights.checkpoint.score, abs=1e-4)
    member = Member("", last[1], open_val(last[1], ""))
    own = predict_member(member, device=torch.device("cpu"), model=load_weights(open_weights(str(tail))))
    assert found["scores"]["mean of the weights"] == scores(metric_sums(own.predictions, own.targets))
    assert (found["method"], found["taken"], found["bn_samples"]) == ("tail average", names, 40)

    card = (tail / "README.md").read_text()
    assert "the mean of the weights of 2 checkpoints (tail average)" in card
    assert "estimated anew on 40 augmented training samples" in card
    for name, weights in zip(names, last):
        assert f"| {name} | `{weights.checkpoint.files['model.safetensors']['sha256']}` | yes |" in card
        assert f"| {name} | " in card.split("## Scores")[1]
    assert str(run.parent) not in card + (tail / "config.json").read_text() + (tail / "soup.json").read_text()


def test_commands_that_take_weights_read_it(tail, run, runs, dataset, tmp_path):
    weights = open_weights(str(tail))
    assert (weights.view, weights.exported.scores["p"]) == (
        "cropped",
        read_soup(tail)["scores"]["mean of the weights"]["p"],
    )
    assert weights.identity == open_weights(str(run)).identity
    images = sorted((dataset / "cropped" / "v0").glob("*.jpg"))
    result = mtl_dist.load(tail, device="cpu").predict(images)
    assert len(result) == len(images)
    done = run_here("mtl_dist.predict", "--runs", tail, "--input", dataset / "cropped/v0", "--out", tmp_path / "v0.csv")
    assert done.returncode == 0, done.stderr

    # As a member of an ensemble, beside a run, with its validation set.
    member = ["mtl_dist.ensemble", "--local", "--runs", run, tail, "--out", tmp_path / "ensemble", "--steps"]
    done = run_here(*member)
    assert_one_message(done, f"{tail} is an export, which does not say where its validation set is; give it with --val")
    val = runs / "shards/cropped/val"
    done = run_here(*member, "--val", val, val)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "ensemble/score.json").read_text())
    assert report["scores"]["tail"]["p"] == pytest.approx(weights.exported.scores["p"], abs=1e-6)
    assert_one_message(run_here(*member, "--val", val, f"{runs}/shards/cropped/train"), "is not the validation set")
    assert_one_message(run_here("mtl_dist.report", tail, "--out", tmp_path / "report"), "has no committed checkpoint")

    # A run that begins with it.
    config = open_weights(str(run)).config
    started = config.run.model_copy(update={"start": str(tail), "start_with": "model"})
    start = find_start(config.model_copy(update={"run": started}), {})
    model = build_started(config, start).state_dict()
    assert all(np.array_equal(model[name].numpy(), value) for name, value in weights_of(str(tail)).items())


def test_a_finished_one_stays_and_another_is_not_written_over_it(tail, run, three):
    before = {path: path.stat().st_mtime_ns for path in tail.iterdir()}
    assert "holds this already; nothing is left to do" in soup(run, "--last", 2, "--out", tail)
    for args in (["--last", 2, "--bn-batches", 2], ["--last", 2, "--greedy"]):
        done = run_here("mtl_dist.soup", run, *args, "--out", tail)
        assert_one_message(done, f"--out is {tail}, which holds the mean of other checkpoints, or one made in another")
    assert before == {path: path.stat().st_mtime_ns for path in tail.iterdir()}


def test_the_same_command_makes_the_same_bytes_also_after_it_was_killed(tail, run, tmp_path):
    out = tmp_path / "again"
    out.mkdir()
    shutil.copy(tail / "soup.json", out)  # config.json, written last, is not there
    (out / "model.safetensors").write_bytes(b"half of it")
    soup(run, "--last", 2, "--out", out, "--batch", 8)
    assert files_below(out) == files_below(tail)


def test_what_fails_while_it_is_written_leaves_nothing(run, tmp_path, monkeypatch):
    real, out = storage.upload, tmp_path / "out"

    def upload(path, uri):
        if uri.endswith("README.md"):
            raise KeyboardInterrupt
        real(path, uri)

    monkeypatch.setattr(outputs.storage, "upload", upload)
    with pytest.raises(KeyboardInterrupt):
        main([str(run), "--last", "2", "--out", str(out), "--bn-batches", "1"])
    assert list(tmp_path.iterdir()) == []


def test_a_uniform_soup_is_of_the_best_checkpoints_of_runs(three, tmp_path):
    said = soup(*three, "--out", tmp_path / "out", "--bn-batches", 1)
    assert "note:" not in said  # one start: the same seed
    states = [weights_of(best(committed(str(run))[0]).uri) for run in three]
    found = weights_of(str(tmp_path / "out"))
    for name in found:
        if not is_statistic(name):
            mean = sum(state[name].astype(np.float64) for state in states) / 3
            np.testing.assert_allclose(found[name], mean, rtol=1e-6, atol=1e-9, err_msg=name)
    about = read_soup(tmp_path / "out")
    assert (about["method"], len(about["taken"]), about["bn_samples"]) == ("uniform soup", 3, 8)


def test_a_greedy_soup_tells_its_score_in_sample_and_on_other_videos(three, tmp_path):
    said = soup(*three, "--greedy", "--out", tmp_path / "out", "--bn-batches", 2)
    about = read_soup(tmp_path / "out")
    rows = about["scores"]
    in_sample, elsewhere = rows["greedy soup, chosen on these rows"], rows["greedy soup, chosen on other videos"]
    singles = [scored["p"] for name, scored in rows.items() if ", step " in name]
    assert len(singles) == 3
    assert in_sample["p"] >= max(singles)
    assert f"P {in_sample['p']:.4f} in sample, for it was chosen on these rows" in said
    assert f"chosen on other videos {elsewhere['p']:.4f}" in said
    assert "The choice was made on all rows below" in (tmp_path / "out/README.md").read_text()

    # What is written has the score in sample. What was chosen on a half, made by itself, has that on the other one.
    member = open_member(str(three[0]))
    halves = make_folds(group_rows(pa.array(row_names(member).videos), None), 2, seed=0)
    assert set(halves) == {0, 1}

    def sums(uri, rows):
        own = predict_member(member, device=torch.device("cpu"), model=load_weights(open_weights(str(uri))))
        return metric_sums(*(type(part)(*(array[rows] for array in part)) for part in own[1:]))

    assert scores(sums(tmp_path / "out", halves >= 0))["p"] == pytest.approx(in_sample["p"], abs=1e-9)
    total = MetricSums.zero()
    for number, half in enumerate(about["halves"]):
        own = [run for run in three if any(name.startswith(f"{run.name},") for name in half["soup"])]
        if len(own) > 1:
            soup(*own, "--out", tmp_path / str(number), "--bn-batches", 2)
        total = total.plus(sums(tmp_path / str(number) if len(own) > 1 else own[0], halves == number))
    assert scores(total)["p"] == pytest.approx(elsewhere["p"], abs=1e-9)


def test_where_nothing_is_added_the_best_checkpoint_is_left_as_it_was(run, tmp_path, monkeypatch):
    """Its own statistics of BatchNorm too."""
    other = copy_run(run, tmp_path / "noise", 3, spread=0.02)
    monkeypatch.setattr("mtl_dist.soup.greedy.add_greedily", lambda order, score: (order[0],))
    soup(run, other, "--greedy", "--out", tmp_path / "out", "--bn-batches", 1)
    about = read_soup(tmp_path / "out")
    chosen = {"cropped": run, "noise": other}[about["taken"][0].split(",")[0]]
    found, kept = weights_of(str(tmp_path / "out")), weights_of(best(committed(str(chosen))[0]).uri)
    assert all(np.array_equal(found[name], kept[name]) for name in kept)
    assert about["bn_samples"] == 0
    assert "to which no other checkpoint was added (greedy soup)" in (tmp_path / "out/README.md").read_text()


def test_frozen_statistics_are_averaged_and_no_training_set_is_read(three, tmp_path):
    frozen = [Path(shutil.copytree(run, tmp_path / run.name)) for run in three[:2]]
    for run in frozen:
        config = state_of(run)["config"]
        rewrite_state(run, config=config | {"engine.batchnorm": "frozen", "data.train": ["/gone"]})
    done = run_here("mtl_dist.soup", *frozen, "--out", tmp_path / "out", "--bn-batches", "2")
    assert_one_message(done, "--bn-batches is given", "has no BatchNorm that learns")
    soup(*frozen, "--out", tmp_path / "out")
    states = [weights_of(best(committed(str(run))[0]).uri) for run in frozen]
    for name, value in weights_of(str(tmp_path / "out")).items():
        if "running_" in name:
            mean = (states[0][name].astype(np.float64) + states[1][name]) / 2
            np.testing.assert_array_equal(value, mean.astype(np.float32))
    assert read_soup(tmp_path / "out")["bn_samples"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run.seed": 5}, "did not begin with the same weights"),
        ({"model.weights": "imagenet"}, "did not begin with the same weights"),
        ({}, ""),
    ],
)
def test_runs_that_did_not_begin_alike_are_noted(three, tmp_path, changes, words):
    other = Path(shutil.copytree(three[1], tmp_path / "other"))
    config = state_of(other)["config"]
    rewrite_state(other, config=config | changes)
    notes = find_notes(find_ingredients([str(three[0]), str(other)], None), None)
    assert [words in note for note in notes] == [True] * bool(words)


def test_runs_of_one_backbone_with_other_heads_are_noted(three, tmp_path):
    copies = [Path(shutil.copytree(run, tmp_path / run.name)) for run in three[:2]]
    for seed, run in enumerate(copies):
        config = state_of(run)["config"]
        began = {"with": "backbone", "uri": "/runs/faces", "sha256": "a" * 64}
        rewrite_state(run, config=config | {"run.seed": seed}, began_from=began)
    (note,) = find_notes(find_ingredients(list(map(str, copies)), None), None)
    assert "began with one backbone, but with other random heads" in note
    for run in copies:
        rewrite_state(run, began_from=began | {"with": "model"})
    assert find_notes(find_ingredients(list(map(str, copies)), None), None) == []


def test_a_tail_with_gaps_is_noted(run):
    found = find_ingredients([str(run)], 2)
    (note,) = find_notes([one._replace(weights=keeps(one.weights, 1)) for one in found], 2)
    assert "with gaps between; train with --checkpoint.keep-last 2" in note
    assert find_notes(found, 2) == []


def keeps(weights, count: int):
    checkpoint = weights.config.checkpoint.model_copy(update={"keep_last": count})
    return weights._replace(config=weights.config.model_copy(update={"checkpoint": checkpoint}))


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["runs/a", "--out", "out"], ["runs/a alone gives one checkpoint", "--last 5"]),
        (["runs/a", "--last", "1", "--out", "out"], ["alone gives one checkpoint"]),
        (["--out", "out"], ["no run is named"]),
        (["runs/a", "runs/a/", "--out", "out"], ["run runs/a is named twice"]),
        (["runs/a", "--last", "0", "--out", "out"], ["--last is 0; expected 1 or more"]),
        (["runs/a", "runs/b", "--bn-batches", "0", "--out", "out"], ["--bn-batches is 0; expected 1 or more"]),
        (["runs/a", "runs/b", "--seed", "3", "--out", "out"], ["--seed is 3, and only --greedy reads it"]),
        (["nosuch", "--last", "2", "--out", "out"], ["run nosuch has 0 committed checkpoint(s)"]),
    ],
)
def test_what_is_wrong_whatever_runs_hold_is_one_message(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_message(run_here("mtl_dist.soup", *args), *words)
    assert list(tmp_path.iterdir()) == []


def test_fewer_checkpoints_than_asked_for_are_refused_with_how_to_keep_more(run, tmp_path):
    done = run_here("mtl_dist.soup", run, "--last", "9", "--out", tmp_path / "out")
    assert_one_message(done, "has 2 committed checkpoint(s), and the last 9 are wanted", "--checkpoint.keep-last 9")


def test_what_is_no_whole_checkpoint_of_a_tail_is_passed_over_and_said(run, tmp_path, capsys):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    newest = Path(open_last(str(copy), 2)[-1].uri)
    (newest / "COMMIT.json").unlink()
    capsys.readouterr()
    assert len(open_last(str(copy), 1)) == 1
    assert f"passed over {newest}: no COMMIT.json" in capsys.readouterr().out
    done = run_here("mtl_dist.soup", copy, "--last", "2", "--out", tmp_path / "out")
    assert_one_message(done, "has 1 committed checkpoint(s)", f"{newest}: no COMMIT.json", "the last 2 are wanted")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": {"data.image_size": 96}}, ["data.image_size is 80 of", "and 96 of"]),
        ({"config": {"model.backbone": "vgg_small"}}, ["model.backbone is 'small' of", "mtl_dist.ensemble"]),
        ({"view": "cropped_aligned"}, ["is of view 'cropped', and", "of 'cropped_aligned'"]),
        ({"classes": {"expressions": ["Neutral"], "aus": [1]}}, ["has other classes"]),
        (
            {"extractors": [{"name": "x", "sha256": "a" * 64, "input_size": 112, "pool": "mean", "width": 4}]},
            ["was trained on features of none, and", "of x"],
        ),
        ({"identity": {"training set": "a" * 64, "validation set": "b" * 64}}, ["different validation sets"]),
    ],
)
def test_models_that_are_not_alike_are_refused(three, tmp_path, changes, words):
    other = Path(shutil.copytree(three[1], tmp_path / "other"))
    own = changes | ({"config": state_of(other)["config"] | changes["config"]} if "config" in changes else {})
    rewrite_state(other, **own)
    done = run_here("mtl_dist.soup", three[0], other, "--out", tmp_path / "out")
    assert_one_message(done, *words)
    assert not (tmp_path / "out").exists()


def test_settings_of_training_may_differ(three, tmp_path):
    other = Path(shutil.copytree(three[1], tmp_path / "other"))
    config = state_of(other)["config"]
    rewrite_state(other, config=config | {"optim.lr": 0.5, "model.dropout": 0.1, "loss.va_mse": 0.5})
    assert len(find_ingredients([str(three[0]), str(other)], None)) == 2


def test_tensors_of_other_shapes_are_refused(three, tmp_path):
    other = Path(shutil.copytree(three[1], tmp_path / "other"))
    state = weights_of(best(committed(str(other))[0]).uri)
    name = next(name for name in state if name.endswith("weight"))
    rewrite(other, "model.safetensors", save(state | {name: state[name][:-1]}))
    done = run_here("mtl_dist.soup", three[0], other, "--out", tmp_path / "out")
    assert_one_message(done, "have different architectures", name)
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_refused_by_name(three, tmp_path):
    other = Path(shutil.copytree(three[1], tmp_path / "other"))
    where = Path(best(committed(str(other))[0]).uri) / "model.safetensors"
    data = bytearray(where.read_bytes())
    data[-5] ^= 1
    where.write_bytes(data)
    done = run_here("mtl_dist.soup", three[0], other, "--out", tmp_path / "out")
    assert_one_message(done, f"{where} is damaged: its size or sha256", f"delete {where.parent}, or name other")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_named(three, tmp_path):
    other = Path(shutil.copytree(three[1], tmp_path / "other"))
    state = weights_of(best(committed(str(other))[0]).uri)
    name = next(name for name in state if name.endswith("weight"))
    rewrite(other, "model.safetensors", save(state | {name: state[name] * np.float32("nan")}))
    done = run_here("mtl_dist.soup", three[0], other, "--out", tmp_path / "out")
    assert_one_message(done, "the weights of other, step", f"are not finite ({name})")


def test_checkpoints_that_are_one_and_exports_are_refused(run, tail, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    done = run_here("mtl_dist.soup", run, copy, "--out", tmp_path / "out")
    assert_one_message(done, "are one and the same", "name them once")
    done = run_here("mtl_dist.soup", run, tail, "--out", tmp_path / "out")
    assert_one_message(done, f"{tail} is an export", "name the run that it came from")
    uris = [weights.uri for weights in open_last(str(run), 2)]
    done = run_here("mtl_dist.soup", *uris, "--last", "2", "--out", tmp_path / "out")
    assert_one_message(done, "--last is of runs, and", "is a checkpoint")
    assert [one.run for one in find_ingredients(uris, None)] == ["cropped", "cropped"]
    assert not (tmp_path / "out").exists()


def test_an_out_with_something_else_in_it_is_refused_and_left_alone(run, tail, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = run_here("mtl_dist.soup", run, "--last", "2", "--out", tmp_path)
    assert_one_message(done, f"--out is {tmp_path}, which holds something else already (notes.txt)")
    assert files_below(tmp_path) == {"notes.txt": b"mine"}
    done = run_here("mtl_dist.soup", run, "--last", "2", "--out", run / "soup")
    assert_one_message(done, f"where the run {run} keeps its own files")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "soup.json").write_bytes((tail / "soup.json").read_bytes().replace(b'"step": 1', b'"step": 2'))
    assert_one_message(run_here("mtl_dist.soup", run, "--last", "2", "--out", broken), "soup.json is damaged")
    (broken / "soup.json").write_bytes(seal({"format": "of others"}))
    assert_one_message(run_here("mtl_dist.soup", run, "--last", "2", "--out", broken), "it has format 'of others'")


def test_a_training_set_that_has_moved_or_is_another_is_named_with_the_flag(run, runs, tmp_path):
    train = runs / "shards/cropped/train"
    moved = Path(shutil.copytree(train, tmp_path / "moved"))
    args = ["mtl_dist.soup", run, "--last", "2", "--bn-batches", "1", "--out", tmp_path / "out"]
    train.rename(tmp_path / "away")
    try:
        assert_one_message(run_here(*args), "no shard set at", "say where it is with --train")
        assert run_here(*args, "--train", moved).returncode == 0
    finally:
        (tmp_path / "away").rename(train)
    other = runs / "shards/cropped_aligned/train"
    done = run_here(*args[:-1], tmp_path / "other", "--train", other)
    assert_one_message(done, "data.train has view 'cropped_aligned'")
    val = runs / "shards/cropped_aligned/val"
    assert_one_message(run_here(*args[:-1], tmp_path / "other", "--val", val), "is not the validation set")
