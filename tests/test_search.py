"""The search: its space, what Ray is handed, which trial is the best, how trials end."""

from __future__ import annotations

import csv
import json
import math
import shlex
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from ray import cloudpickle, tune
from ray.exceptions import ActorDiedError, RayTaskError
from ray.tune import Result

from mtl_dist.config import Config, build_config
from mtl_dist.errors import MAX_SEED, InputError, RunFailed, StorageError
from mtl_dist.joining import quiet_loggers
from mtl_dist.objective.scores import FIRST, find_score
from mtl_dist.presets import load_preset
from tests.conftest import assert_one_message, run_here
from tune.experiment import Asha, RandomSearch, Reporter, build_searcher
from tune.search import SearchConfig, _read_earlier, best_yaml, check_same_search, count_room, finish_search
from tune.search import main as search_main
from tune.space import build_param_space, default_space, read_space
from tune.trial import DIVERGED


class Results(list):
    """What `Tuner.fit` returns has these beside the trials' results."""

    errors: tuple = ()
    num_errors = 0


def trial(name: str, lr: float, *scores: float) -> Result:
    """A trial as Ray gives it back: `scores` are P after every epoch."""
    metrics = {"trial_id": name, "epoch": len(scores), "p": scores[-1], "config": {"optim.lr": lr}}
    return Result(metrics, None, None, "", pd.DataFrame({"p": scores}))


@pytest.mark.parametrize(
    ("trials", "lr"),
    [
        ([(0.1, 0.7), (0.2, math.nan), (0.3, 1.2)], 0.3),  # NaN compares as neither more nor less, and stops a sort
        ([(0.1, math.nan), (0.2, 0.5)], 0.2),
        ([(0.1, 0.9, 0.8), (0.2, 1.4, 0.6)], 0.2),  # by the best evaluation, whose checkpoint is kept
        ([(0.1, 0.9, 0.8), (0.2, 1.4, math.nan)], 0.2),
        ([(0.1, 0.9), (0.2, math.inf)], 0.1),
    ],
)
def test_the_best_trial_is_the_one_with_the_highest_score_that_is_a_number(trials, lr, tmp_path, capsys):
    results = Results(trial(f"t{place}", *values) for place, values in enumerate(trials))
    finish_search(Config(), results, str(tmp_path))
    assert yaml.safe_load((tmp_path / "best.yaml").read_text())["optim"]["lr"] == lr
    first = next(csv.DictReader((tmp_path / "trials.csv").open()))
    assert float(first["optim.lr"]) == lr
    scores = next(values for own, *values in trials if own == lr)
    assert float(first["best P"]) == max(value for value in scores if not math.isnan(value))
    assert float(first["last P"]) == pytest.approx(scores[-1], nan_ok=True)


def test_a_search_without_any_score_that_is_a_number_has_no_best_configuration(tmp_path):
    with pytest.raises(InputError, match="none of 2 trials has a score that is a number"):
        finish_search(Config(), Results([trial("a", 0.1, math.nan), trial("b", 0.2, math.nan)]), str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_of_an_error_the_trial_with_the_lowest_is_the_best(tmp_path, capsys):
    score, results = find_score("rmse_v"), Results()
    for name, lr, values in (("a", 0.1, (0.5, 0.4)), ("b", 0.2, (0.3, 0.6)), ("c", 0.3, (0.2, score.worst))):
        metrics = {"trial_id": name, "epoch": 2, "p": 1.0, score.key: values[-1], "config": {"optim.lr": lr}}
        metrics |= {DIVERGED: "step 9"} if name == "c" else {}
        results.append(Result(metrics, None, None, "", pd.DataFrame({score.key: values})))
    finish_search(Config(), results, str(tmp_path), score=score)
    assert yaml.safe_load((tmp_path / "best.yaml").read_text())["optim"]["lr"] == 0.2
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [(row["trial"], row["best RMSE V"], row["last RMSE V"]) for row in rows[:2]] == [
        ("b", "0.3000", "0.6000"), ("a", "0.4000", "0.4000")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "words"),
    [("rmse", "search.metric is 'rmse': did you mean 'rmse_"), ("f1_au", "search.metric is 'f1_au'")],
)
def test_a_metric_that_is_no_score_is_refused_before_anything_starts(metric, words):
    with pytest.raises(InputError, match=words):
        search_main(["--preset", "small", "--search.metric", metric])


# ----------------------------------------------------------------------------------------------------------- the space


def write_space(tmp_path, text: str):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim.warmup_steps: {uniform: [0, 500]}", "whole numbers.*'optim.warmup_steps: {integer: .0, 500.}'"),
        ("train.epochs: {loguniform: [1, 50]}", "whole numbers"),
        ("optim.warmup_steps: {integer: [0, 2.5]}", "expected two whole numbers"),
        ("optim.lr: {uniform: [false, true]}", "expected two numbers"),
        ("optim.warmup_steps: {integer: [false, true]}", "expected two whole numbers"),
        ("optim.lr: {choice: [0.1, true]}", "choice has True: .*expected no yes or no"),
        ("optim.nesterov: {uniform: [0, 1]}", "optim.nesterov: .*boolean"),
        ("loss.va: {uniform: [1.0, .inf]}", "expected finite values"),
        ("loss.va: {choice: [1.0, .nan]}", "expected finite values"),
        ("augment.crop_scale: {choice: [[0.8, 1.0], [.nan, 1.0]]}", "expected finite values"),
        ("run.seed: {integer: [0, 9]}", "run.seed is a run's own setting, which best.yaml leaves out"),
        ("run.name: {choice: [a, b]}", "a run's own setting"),
        ("ray.cpus_per_rank: {choice: [1, 2]}", "a run's own setting"),
        ("data.train: {choice: [a, b]}", "a run's own setting"),
        ("engine.device: {choice: [cpu, cuda]}", "a run's own setting"),
        # Each value alone is valid.
        (
            "data.streams: {choice: [24, 12]}\ntrain.global_batch: {choice: [24, 12]}",
            "drawn configurations are invalid",
        ),
        ("data.streams: {integer: [1, 24]}", "drawn configurations are invalid, such as data.streams"),
    ],
)
def test_a_space_that_cannot_work_is_refused_before_anything_starts(text, words, tmp_path):
    with pytest.raises(InputError, match=words):
        read_space(write_space(tmp_path, text), Config())


def test_the_default_space_is_drawn_from_too():
    assert default_space(Config())["optim.lr"] == {"loguniform": [0.00025, 0.004]}
    with pytest.raises(InputError, match=r"the default search space: .* drawn configurations are invalid, .*optim\.lr"):
        default_space(build_config({"optim": {"lr": 900.0}}))


def test_a_space_of_every_kind_is_taken_and_both_ends_of_integer_are_drawn(tmp_path):
    text = """
    optim.lr: {loguniform: [1.0e-4, 1.0e-2]}
    loss.va: {uniform: [0, 2]}
    optim.warmup_steps: {integer: [3, 5]}
    optim.nesterov: {choice: [true, false]}
    optim.clip_norm: {choice: [null, 1.0]}
    data.image_size: {choice: [112, 224]}
    """
    space = build_param_space(read_space(write_space(tmp_path, text), Config()))
    drawn = {space["optim.warmup_steps"].sample() for _ in range(100)}
    assert drawn == {3, 4, 5}
    assert all(type(value) is int for value in drawn)


@pytest.mark.parametrize("name", ["../../up", "a/b", "..", ""])
def test_the_name_of_a_search_is_one_part_of_a_path(name, shards, tmp_path):
    args = ["--run.storage", str(tmp_path / "in" / "runs"), "--search.name", name, "--preset", "small", "--dry-run"]
    args += ["--data.train", str(shards / "cropped" / "train"), "--data.val", str(shards / "cropped" / "val")]
    assert_one_message(run_here("tune.search", *args), f"name is '{name}': a name is letters")
    assert not list(tmp_path.iterdir())


def test_the_best_configuration_holds_nothing_of_the_run_the_cluster_and_the_machine():
    best = yaml.safe_load(best_yaml(Config(), {"optim.lr": 0.5}))
    assert best["optim"]["lr"] == 0.5
    assert not {"run", "ray"} & best.keys()
    assert not {"train", "val", "cache_dir"} & best["data"].keys()
    assert not {"device", "threads"} & best["engine"].keys()


# --------------------------------------------------------------------------------------------- what Ray Tune is handed


def some_trial(config):
    pass


def random_search(limit: int | None) -> RandomSearch:
    searcher = build_searcher("random", seed=0, limit=limit)
    searcher.add_configurations({"search": {"run": some_trial, "num_samples": 5, "config": {"x": tune.uniform(0, 1)}}})
    return searcher


def test_random_search_draws_no_more_trials_than_may_run_at_once():
    searcher = random_search(2)
    running = [searcher.next_trial(), searcher.next_trial()]
    assert searcher.next_trial() is None
    searcher.on_trial_complete(running[0].trial_id)
    assert searcher.next_trial() is not None
    assert searcher.next_trial() is None


def test_a_search_that_continues_takes_the_new_limit(tmp_path):
    first = random_search(1)
    first.next_trial()
    first.save_to_dir(tmp_path, "one")
    again = random_search(3)
    again.restore_from_dir(tmp_path)
    assert [again.next_trial() is not None for _ in range(3)] == [True, True, False]  # one of three runs already


@pytest.mark.parametrize(
    ("nodes", "ray", "room"),
    [
        ([{"CPU": 4}], {}, 3),  # four ranks, but each has a driver that takes a tenth
        ([{"CPU": 4}, {"CPU": 4}], {"num_ranks": 2}, 3),
        ([{"CPU": 5}, {"CPU": 5}], {"cpus_per_rank": 3}, 2),  # not three: a rank lies on one node
        ([{"CPU": 16, "GPU": 2}, {"CPU": 2}], {"gpus_per_rank": 1}, 2),
        ([{"CPU": 1}], {"autoscaling": True}, None),
    ],
)
def test_as_many_trials_run_at_once_as_nodes_have_room_for_ranks_and_drivers(nodes, ray, room):
    assert count_room(build_config({"ray": ray}), nodes) == room


def test_a_cluster_without_room_for_a_driver_beside_its_ranks_is_refused_where_ray_would_wait_for_ever():
    with pytest.raises(InputError, match=r"needs 2.1 CPU, 0.1 of them for its driver; the cluster has 2"):
        count_room(build_config({"ray": {"num_ranks": 2}}), [{"CPU": 1}, {"CPU": 1}])


def optuna_search(limit: int, seed: int = 0):
    pytest.importorskip("optuna")
    searcher = build_searcher("optuna", seed=seed, limit=limit)
    searcher.set_search_properties("p", "max", {"x": tune.uniform(0, 1)})
    return searcher


def test_optuna_draws_no_more_trials_than_may_run_at_once_and_learns_how_earlier_ones_end(tmp_path):
    searcher = optuna_search(2)
    assert [searcher.suggest(name) is not None for name in "abc"] == [True, True, False]
    searcher.save(str(tmp_path / "state"))
    again = optuna_search(1)
    again.restore(str(tmp_path / "state"))
    again.on_trial_complete("a", {"p": 1.5})
    assert [trial.value for trial in again.searcher._ot_study.trials] == [1.5, None]


def test_optuna_takes_every_seed_that_a_run_may_have_and_draws_by_it():
    drawn = [optuna_search(1, seed).suggest("a")["x"] for seed in (MAX_SEED, MAX_SEED, MAX_SEED - 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def asha(earlier=None, *names: str) -> Asha:
    scheduler = Asha(epochs=9, grace_epochs=1, reduction=3, earlier=earlier or {})
    scheduler.set_search_properties("p", "max")
    for name in names:
        scheduler.on_trial_add(None, SimpleNamespace(trial_id=name))
    return scheduler


def decide(scheduler: Asha, name: str, epoch: int, p: float) -> str:
    return scheduler.on_trial_result(None, SimpleNamespace(trial_id=name), {"epoch": epoch, "p": p})


def test_a_weak_trial_is_stopped_but_not_at_its_last_evaluation_whose_checkpoint_is_being_stored():
    scheduler = asha(None, "good", "weak", "late")
    assert [decide(scheduler, "good", epoch, 1.0) for epoch in (1, 3, 9)] == ["CONTINUE"] * 3
    assert decide(scheduler, "weak", 1, 0.5) == "STOP"
    assert decide(scheduler, "late", 9, 0.5) == "CONTINUE"


def test_of_an_error_the_trial_with_more_is_stopped():
    scheduler = Asha(epochs=9, grace_epochs=1, reduction=3, earlier={"a": [(1, 0.2)], "b": [(1, 0.3)]})
    scheduler.set_search_properties("rmse_v", "min")
    for name in ("a", "b", "c", "d"):
        scheduler.on_trial_add(None, SimpleNamespace(trial_id=name))
    ends = [
        scheduler.on_trial_result(None, SimpleNamespace(trial_id=name), {"epoch": 1, "rmse_v": value})
        for name, value in (("c", 0.9), ("d", 0.1))
    ]
    assert ends == ["STOP", "CONTINUE"]


def test_a_search_that_continues_stops_trials_by_what_earlier_ones_scored():
    assert decide(asha(None, "new"), "new", 1, 0.1) == "CONTINUE"  # nothing to compare with
    earlier = {"a": [(1, 0.9), (2, 1.0), (3, 1.1)], "b": [(1, 0.8)], "c": []}
    scheduler = asha(earlier, "a", "b", "c", "new")
    assert decide(scheduler, "new", 1, 0.1) == "STOP"
    assert decide(scheduler, "c", 1, 0.95) == "CONTINUE"
    assert decide(scheduler, "c", 3, 1.0) == "STOP"


def test_a_search_whose_state_ray_could_not_read_ends_and_does_not_begin_anew():
    with pytest.raises(StorageError, match="could not be continued"):
        asha({"a": []}, "new")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (cloudpickle.dumps([*range(100)])[:-20], "UnpicklingError: pickle data was truncated"),
        (b"\x80\x04cray.gone\nThing\n.", "ModuleNotFoundError: No module named 'ray.gone'"),
        (b"", "EOFError"),
    ],
)
def test_a_state_of_a_search_that_was_cut_or_is_of_another_version_is_refused_in_words(value, words, tmp_path):
    state = {"trial_data": [], "runner_data": {"_type": "CLOUDPICKLE_FALLBACK", "value": value.hex()}}
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune" / "experiment_state-1.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=rf"{tmp_path}/tune, which .* cannot be read \({words}.*another --search.name"):
        _read_earlier(str(tmp_path), "p")


def failed_trial(tmp_path, error: Exception, *, num_failures: int) -> SimpleNamespace:
    path = tmp_path / "error.pkl"
    path.write_bytes(cloudpickle.dumps(error))
    return SimpleNamespace(
        trial_id="t", pickled_error_file=str(path), error_file=None, num_failures=num_failures, max_failures=3
    )


def test_a_driver_that_died_with_its_node_is_started_again_several_times_and_an_error_once(tmp_path, capsys):
    reporter = Reporter(num_trials=3, num_ended=1)
    trial = failed_trial(tmp_path, ActorDiedError(), num_failures=1)
    reporter.on_trial_recover(1, [], trial)
    assert trial.max_failures == 3
    error = RayTaskError("run_trial", "Traceback ...", InputError("shard 3 is damaged"))
    trial = failed_trial(tmp_path, error, num_failures=1)
    reporter.on_trial_recover(1, [], trial)
    assert trial.max_failures == 1  # which the next failure passes
    reporter.on_trial_error(1, [], trial)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-3:-1] == [
        "trial t failed and is started again: shard 3 is damaged",
        "trial t failed: shard 3 is damaged",
    ]
    assert printed[-1].startswith("2 of 3 trials, about")


# ------------------------------------------------------------------------------------------------------ how trials end


def test_a_trial_that_diverged_is_never_the_best_and_is_shown(tmp_path, capsys):
    why = "step 9: the loss is not finite"
    diverged = trial("b", 30.0, 0.9)
    diverged.metrics |= {"p": FIRST.worst, "epoch": 1, DIVERGED: why}
    diverged.metrics_dataframe.loc[1] = [FIRST.worst]
    diverged.metrics_dataframe[DIVERGED] = [None, why]
    never = trial("c", 99.0, FIRST.worst)
    never.metrics |= {"epoch": 0, DIVERGED: why}
    never.metrics_dataframe[DIVERGED] = why
    finish_search(Config(), Results([diverged, never, trial("a", 0.1, 0.2)]), str(tmp_path))
    assert yaml.safe_load((tmp_path / "best.yaml").read_text())["optim"]["lr"] == 0.1
    rows = list(csv.DictReader((tmp_path / "trials.csv").open()))
    assert [(row["trial"], row["best P"], row["last P"]) for row in rows] == [
        ("a", "0.2000", "0.2000"), ("b", "0.9000", "0.9000"), ("c", "nan", "nan")
    ]  # fmt: skip
    assert [row["end"] for row in rows] == ["stopped early", "diverged", "diverged"]
    assert f"b, c: {why}" in capsys.readouterr().out


def test_a_search_without_any_score_says_every_reason_in_full(tmp_path):
    long = "x" * 500
    results = Results([Result({"trial_id": name}, None, error, "", None) for name, error in [
        ("a", RayTaskError("run_trial", "Traceback ...", InputError(f"one\n{long}"))), ("b", ActorDiedError()),
        ("c", RayTaskError("run_trial", "Traceback ...", InputError(f"one\n{long}"))),
        ("d", RayTaskError("run_trial", "Traceback ...", RunFailed("run d failed"))),
    ]])  # fmt: skip
    with pytest.raises(InputError) as raised:
        finish_search(Config(), results, str(tmp_path))
    assert f"a, c: one\n{long}\n" in str(raised.value)
    assert "b: ActorDiedError: The actor died" in str(raised.value)
    assert "d: run d failed" in str(raised.value).splitlines()


def test_a_search_begun_before_a_setting_existed_continues(tmp_path):
    config, search, space, data = Config(), SearchConfig(), {"optim.lr": {"choice": [0.1]}}, {"validation set": "0a"}
    check_same_search(str(tmp_path), config, search, space, data=data)
    path = tmp_path / "search.json"
    stored = json.loads(path.read_text())
    for unknown_then in ("search.metric", "checkpoint.best_of", "optim.nesterov", "validation set", "sha256"):
        del stored[unknown_then]
    path.write_text(json.dumps(stored))
    check_same_search(str(tmp_path), config, search, space, data=data)
    with pytest.raises(InputError, match=r"was begun with search\.trials 20, not 7"):
        check_same_search(str(tmp_path), config, SearchConfig(trials=7), space, data=data)
    with pytest.raises(InputError, match="was begun with validation set '0a', not '0b'; give this one another"):
        check_same_search(str(tmp_path), config, search, space, data={"validation set": "0b"})  # made anew meanwhile
    path.write_bytes(path.read_bytes().replace(b"0.001", b"0.003"))
    with pytest.raises(InputError, match=r"search\.json is damaged \(its checksum"):
        check_same_search(str(tmp_path), config, search, space, data=data)
    path.write_text("{")
    with pytest.raises(InputError, match=r"search\.json is damaged"):
        check_same_search(str(tmp_path), config, search, space, data=data)


def test_the_command_to_train_with_what_was_found_is_whole(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    data = {part: f"{shards}/cropped/{part}" for part in ("train", "val")}
    layer = {"data": data, "run": {"storage": f"{tmp_path}/my runs"}, "ray": {"num_ranks": [1, 2], "autoscaling": True}}
    config = build_config(load_preset("small"), layer)
    finish_search(config, Results([trial("a", 0.1, 0.2)]), f"{tmp_path}/my runs/weights")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train with it: python -m "))
    done = run_here(*shlex.split(line.removeprefix("train with it: python -m ")), "--dry-run")
    assert done.returncode == 0, done.stderr
    for words in (
        f"run     {tmp_path}/my runs/weights-best, begins",
        "over 1 to 2 ranks",
        "lr: 0.1",
        "autoscaling: true",
    ):
        assert words in done.stdout


def test_the_loggers_of_ray_that_are_kept_quiet_are_those_it_has():
    from ray.train.v2._internal.execution import context
    from ray.train.v2._internal.execution.controller import placement_group_cleaner

    assert quiet_loggers().keys() == {context.logger.name, placement_group_cleaner.logger.name}
