"""Checkpoints prove themselves: what is not committed, whole and of this run is no checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from mtl_dist import storage
from mtl_dist.config import Config, build_config
from mtl_dist.errors import Damaged, InputError
from mtl_dist.label_counts import LabelCounts
from mtl_dist.objective.scores import constant_scores, label_sums
from mtl_dist.runs import CONFIG_NAME
from mtl_dist.runs.checkpoint import (
    FORMAT,
    MODEL,
    Checkpoint,
    best,
    choose_newest,
    committed,
    find_damage,
    newness,
    read_state,
    read_tensors,
)
from mtl_dist.runs.lives import read_lives
from mtl_dist.runs.same_run import check_same_run
from mtl_dist.runs.weights import Weights, load_weights, open_weights
from mtl_dist.sealed import seal
from mtl_dist.sections import CheckpointConfig
from mtl_dist.settings import dump_yaml, flatten
from mtl_dist.training.plan import plan_run
from mtl_dist.training.saving import HOUR_S, plan_retention
from mtl_dist.training.status import print_status
from mtl_dist.training.tracking import METRICS, Tracker

COUNTS = LabelCounts(rows=4, va=4, expr=4, au=[4] * 12, expr_classes=[4] + [0] * 7, au_positives=[1] * 12, unlabelled=0)
IDENTITY = {"training set": "a" * 64, "validation set": "b" * 64}
STATE = {"config": flatten(Config()), "identity": IDENTITY, "step": 5, "scores": {}}


def write_checkpoint(
    run: Path, step: int, score: float | None = None, *, life: str = "00000000", state: dict | None = None
) -> Path:
    """Write the files of a checkpoint as `saving.py` laid them out before COMMITs were sealed."""
    directory = run / "checkpoints" / f"step_{step:09d}_{life}"
    files = {}
    state = {"step": step, "scores": {}} | (state or {})
    contents = {"state.json": json.dumps(state).encode(), "train.safetensors": bytes(100), "model.safetensors": b""}
    for name, data in contents.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    scores = {} if score is None else {"p": score}
    commit = {"format": FORMAT, "step": step, "scores": scores, "saved_at": float(step), "files": files}
    (directory / "COMMIT.json").write_text(json.dumps(commit))
    return directory


def test_committed_checkpoints_are_listed_oldest_first(tmp_path):
    for step in (10, 5, 1000000):
        write_checkpoint(tmp_path, step)
    found, skipped = committed(str(tmp_path))
    assert [checkpoint.step for checkpoint in found] == [5, 10, 1000000]
    assert not skipped
    assert read_state(found[0]) == {"step": 5, "scores": {}}


@pytest.mark.parametrize("name", ["best", "step_000000005_00000000.bak"])
def test_a_copy_of_a_checkpoint_beside_it_under_another_name_is_passed_over(name, tmp_path):
    shutil.copytree(write_checkpoint(tmp_path, 5), tmp_path / "checkpoints" / name)
    found, (skipped,) = committed(str(tmp_path))
    assert [checkpoint.step for checkpoint in found] == [5]
    assert f"checkpoints/{name}: not named step_<step>_<start>" in skipped


def test_a_run_that_does_not_exist_has_none(tmp_path):
    assert committed(str(tmp_path / "nothing")) == ([], [])


@pytest.mark.parametrize(
    ("total_steps", "words"), [(20, "step 10 of 20 (epoch 1.00 of 2)"), (None, "step 10; of how many its data tells")]
)
def test_the_status_of_a_run_is_told_where_its_data_is_not_to_be_read(total_steps, words, tmp_path, capsys):
    data = {"train": str(tmp_path / "gone"), "val": str(tmp_path / "gone")}
    config = build_config({"data": data, "train": {"epochs": 2}})
    storage.write_bytes(str(tmp_path / CONFIG_NAME), dump_yaml(config).encode())
    write_checkpoint(tmp_path, 10, 1.25, state={"total_steps": total_steps})
    tracker = Tracker(str(tmp_path), resumed_at=10, num_ranks=1)
    tracker.evaluated(10, 0, constant := constant_scores(label_sums(COUNTS)), constant)
    storage.write_bytes(str(tmp_path / METRICS), b"".join(tracker.files()[METRICS]))
    print_status(str(tmp_path))
    told = " ".join(capsys.readouterr().out.split())
    for expected in (words, "1.2500 best", "constant predictor", "epoch 1"):
        assert expected in told, expected
    records = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    for record in records:  # as of before this was recorded
        del record["constant"]
    (tmp_path / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    print_status(str(tmp_path))
    assert "without the constant predictor's row: no shard set at" in " ".join(capsys.readouterr().out.split())


def flips(data: bytes) -> Iterator[bytes]:
    """Every way to flip one bit."""
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        yield bytes(flipped)


@pytest.mark.whole
def test_every_flipped_bit_of_a_commit_is_found_or_changes_nothing(tmp_path):
    commit = write_checkpoint(tmp_path, 5, 0.699) / "COMMIT.json"
    commit.write_bytes(seal(json.loads(commit.read_text())))
    (whole,), _ = committed(str(tmp_path))
    assert whole.scores == {"p": 0.699}
    num_found = 0
    for data in flips(commit.read_bytes()):
        commit.write_bytes(data)
        found, skipped = committed(str(tmp_path))
        if found:
            assert found == [whole], data
        else:
            assert skipped[0].startswith(f"{commit.parent}: damaged COMMIT.json ("), skipped
            num_found += 1
    assert num_found > 4000


@pytest.mark.whole
def test_a_flipped_bit_of_a_commit_without_checksum_ends_in_no_traceback(tmp_path):
    """Of before COMMITs were sealed: those flips cannot all be found, but what opens can be read."""
    commit, num_found = write_checkpoint(tmp_path, 5, 0.699) / "COMMIT.json", 0
    for data in flips(commit.read_bytes()):
        commit.write_bytes(data)
        found, skipped = committed(str(tmp_path))
        assert len(found) + len(skipped) == 1, data
        for checkpoint in found:
            assert checkpoint.step == 5, data
            assert isinstance(find_damage(checkpoint), str | None), data
            assert best([checkpoint]) in (checkpoint, None), data
        num_found += len(skipped)
    assert num_found > 2000


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: (d / "COMMIT.json").unlink(), "no COMMIT.json"),
        (lambda d: (d / "COMMIT.json").write_text("{"), "damaged COMMIT.json"),
        (lambda d: (d / "COMMIT.json").write_text("[]"), "damaged COMMIT.json"),
        (lambda d: (d / "COMMIT.json").write_text('{"format": "other"}'), "format 'other'"),
        (lambda d: (d / "COMMIT.json").write_text("[" * 5000), "damaged COMMIT.json"),
        (lambda d: (d / "COMMIT.json").write_bytes(bytes(2 << 20)), "more than 1048576 bytes"),
        (lambda d: (d / "train.safetensors").unlink(), "train.safetensors is missing"),
        (lambda d: (d / "train.safetensors").write_bytes(bytes(99)), "another size"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(damage, reason, tmp_path):
    write_checkpoint(tmp_path, 5)
    damage(write_checkpoint(tmp_path, 10))
    found, skipped = committed(str(tmp_path))
    assert [checkpoint.step for checkpoint in found] == [5]
    assert len(skipped) == 1
    assert reason in skipped[0]
    assert "step_000000010" in skipped[0]


def test_a_flipped_bit_is_found_when_the_file_is_read(tmp_path):
    directory = write_checkpoint(tmp_path, 5)
    state = directory / "state.json"
    state.write_bytes(state.read_bytes().replace(b"5", b"6"))
    (checkpoint,), _ = committed(str(tmp_path))
    with pytest.raises(Damaged, match=r"state\.json is damaged"):
        read_state(checkpoint)


def test_weights_that_are_a_pickle_are_not_loaded(tmp_path):
    """A COMMIT proves that bytes are those that were saved, not that they are harmless."""
    directory = write_checkpoint(tmp_path, 5)
    data = b"\x80\x04cos\nsystem\n(S'touch /tmp/owned'\ntR."
    (directory / "model.safetensors").write_bytes(data)
    commit = json.loads((directory / "COMMIT.json").read_text())
    commit["files"]["model.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / "COMMIT.json").write_text(json.dumps(commit))
    (checkpoint,), _ = committed(str(tmp_path))
    with pytest.raises(Damaged, match=r"model\.safetensors"):
        read_tensors(checkpoint, MODEL)
    assert not Path("/tmp/owned").exists()


def test_the_best_is_the_highest_score_and_the_later_of_equals(tmp_path):
    for step, score in ((1, 0.5), (2, 0.9), (3, 0.9), (4, None), (5, 0.1)):
        write_checkpoint(tmp_path, step, score)
    assert best(committed(str(tmp_path))[0]).step == 3
    assert best([]) is None


def test_a_score_that_is_not_a_number_is_neither_the_best_nor_kept_for_it(tmp_path):
    nan = float("nan")
    saved = [Checkpoint(f"run/{n}", n, {"p": p}, float(n), {}) for n, p in enumerate((0.9, 0.5, 0.6, nan, 0.1))]
    kept = [c for c in saved if c not in plan_retention(saved, retention(keep_last=1, keep_best=1))]
    assert [c.step for c in kept] == [0, 4]
    assert best(saved[3:4]) is None
    assert best([saved[3], saved[1]]).step == best([saved[1], saved[3]]).step == 1
    for step, score in ((1, nan), (2, 1.9), (3, nan)):  # as written before evaluations refused them
        write_checkpoint(tmp_path, step, score)
    found, skipped = committed(str(tmp_path))
    assert ([c.score for c in found], skipped) == ([None, 1.9, None], [])
    assert best(found).step == 2


BEST_OF = CheckpointConfig().best_of


@st.composite
def saved_checkpoints(draw) -> list[Checkpoint]:
    """Checkpoints of several lives, some of the same step, each with some of the scores or none."""
    steps = draw(st.lists(st.integers(0, 30), max_size=20))
    scores = st.dictionaries(st.sampled_from((*BEST_OF, "rmse_v")), st.floats(-1, 3), max_size=4)
    hours, starts = st.floats(0, 100), st.integers(0, 3)
    return [
        Checkpoint(f"run/{place}", step, draw(scores), draw(hours) * HOUR_S, {}, draw(starts))
        for place, step in enumerate(steps)
    ]


def test_a_score_to_keep_the_best_of_that_there_is_not_is_refused():
    with pytest.raises(InputError, match=r"checkpoint.best_of is 'rmse': did you mean 'rmse_"):
        plan_run(build_config({"checkpoint": {"best_of": ["p", "rmse"]}}))


def retention(**settings) -> CheckpointConfig:
    return CheckpointConfig(**settings)


@given(saved_checkpoints(), st.integers(1, 4), st.integers(1, 4), st.sampled_from((BEST_OF, ("rmse_v", "va"), ())))
def test_retention_keeps_the_last_and_the_best_of_each_score_and_no_more(saved, keep_last, keep_best, best_of):
    deleted = plan_retention(saved, retention(keep_last=keep_last, keep_best=keep_best, best_of=best_of))
    kept = [checkpoint for checkpoint in saved if checkpoint not in deleted]
    steps = sorted({checkpoint.step for checkpoint in saved})
    assert {checkpoint.step for checkpoint in kept} >= set(steps[-keep_last:])
    assert len({checkpoint.step for checkpoint in kept}) == len(kept), "two of one step"
    # Of one step, start and moment it is the one that comes later in the list.
    latest = [max((c for c in reversed(saved) if c.step == step), key=newness) for step in steps]
    for name in {"p", *best_of}:
        sign = -1 if name == "rmse_v" else 1
        scored = [c for c in latest if name in c.scores]
        scored.sort(key=lambda c: (sign * c.scores[name], c.step), reverse=True)
        assert {c.uri for c in scored[:keep_best]} <= {c.uri for c in kept}
    assert len(kept) <= keep_last + keep_best * len({"p", *best_of})


@given(st.lists(st.floats(0.1, 5), min_size=1, max_size=40), st.floats(0.5, 10))
def test_retention_keeps_one_of_every_so_many_hours_for_good(gaps, every):
    """Saved one after the other by a clock, each time with retention applied, as a run does it."""
    kept, now, milestones = [], 0.0, []
    for step, gap in enumerate(gaps):
        now += gap * HOUR_S
        kept.append(Checkpoint(f"run/{step}", step, {}, now, {}))
        if not milestones or now - milestones[-1] >= every * HOUR_S:
            milestones.append(now)
        deleted = plan_retention(kept, retention(keep_last=1, keep_every_hours=every))
        kept = [checkpoint for checkpoint in kept if checkpoint not in deleted]
        assert {c.saved_at for c in kept} == {*milestones, now}


def test_retention_by_the_hour_survives_a_clock_that_is_set_back():
    """Kept for good: also what was saved before, and a start on a host that is behind begins its own hours."""
    hours = [0, 1, 12, 13, 2, 3, 13, 25]
    saved = [Checkpoint(f"run/{step}", step, {}, hour * HOUR_S, {}) for step, hour in enumerate(hours)]
    deleted = plan_retention(saved, retention(keep_last=1, keep_every_hours=10))
    assert [hours[c.step] for c in saved if c not in deleted] == [0, 12, 2, 13, 25]


def test_a_checkpoint_fits_its_own_configuration_and_free_settings_may_change():
    check_same_run(STATE, Config(), IDENTITY, "here")
    moved = build_config({"data": {"workers": 7, "cache_gib": 1.0}, "ray": {"num_ranks": 8}, "engine": {"threads": 3}})
    check_same_run(STATE, moved, IDENTITY, "here")


def test_a_whole_checkpoint_whose_state_is_none_is_passed_over_for_the_one_before(tmp_path, capsys):
    write_checkpoint(tmp_path, 5, state=STATE)
    write_checkpoint(tmp_path, 10, state=STATE | {"scores": []})
    chosen, _ = choose_newest(str(tmp_path))
    assert chosen.step == 5
    assert "passed over" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"order": 3}, "order 3"),
        ({"config": None}, "no config"),
        ({"step": None}, "no step; delete somewhere"),
        ({"scores": None}, "no scores"),
        ({"config": flatten(Config()) | {"model.weights": 3}}, r"model\.weights 3 .*--run\.name"),
    ],
)
def test_a_checkpoint_of_another_version_is_refused_in_words(change, words):
    state = STATE | {"order": 2} | change
    with pytest.raises(InputError, match=words):
        check_same_run(state, Config(), IDENTITY, "somewhere")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("optim", "lr", 0.5), ("model", "name", "b"), ("run", "seed", 3), ("train", "epochs", 9)],
)
def test_another_configuration_is_refused_naming_the_field(section, key, value):
    with pytest.raises(InputError, match=rf"{section}\.{key}.*--run.name"):
        check_same_run(STATE, build_config({section: {key: value}}), IDENTITY, "here")
    with pytest.raises(InputError, match="another validation set"):
        check_same_run(STATE, Config(), {**IDENTITY, "validation set": "c" * 64}, "here")


def test_a_setting_newer_than_a_checkpoint_has_its_default_there():
    state = STATE | {"config": flatten(Config())}
    del state["config"]["model.freeze_backbone"]
    check_same_run(state, Config(), IDENTITY, "here")
    with pytest.raises(InputError, match="freeze_backbone"):
        check_same_run(state, build_config({"model": {"freeze_backbone": True}}), IDENTITY, "here")


@pytest.mark.parametrize("model", [{"name": "baseline", "hidden": 65536}, {"backbone": "torchvision:regnet_y_128gf"}])
def test_a_configuration_of_more_parameters_than_its_weights_is_refused_before_they_take_memory(model, tmp_path):
    directory = write_checkpoint(tmp_path, 5)
    data = save({"x": torch.zeros(1)})
    (directory / "model.safetensors").write_bytes(data)
    commit = json.loads((directory / "COMMIT.json").read_text())
    commit["files"]["model.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / "COMMIT.json").write_text(json.dumps(commit))
    (checkpoint,), _ = committed(str(tmp_path))
    with pytest.raises(InputError, match="asks for a network of more than 200000002 parameters"):
        load_weights(Weights(checkpoint, build_config({"model": model}), {"step": 5}, None, 5))


@pytest.mark.parametrize("text", ["[" * 10**5, "[]", '{"scores": []}', '{"step": 5, "config": []}'])
def test_a_state_of_anothers_that_is_none_is_refused(text, tmp_path):
    directory = write_checkpoint(tmp_path, 5, 1.0)
    (directory / "state.json").write_text(text)
    commit = json.loads((directory / "COMMIT.json").read_text())
    commit["files"]["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (directory / "COMMIT.json").write_text(json.dumps(commit))
    for uri in (tmp_path, directory):
        with pytest.raises(InputError, match=r"not JSON|not an object|has the scores|state\.json is not what"):
            open_weights(str(uri))


def test_every_flipped_bit_of_the_list_of_starts_is_found_or_changes_nothing(tmp_path):
    start = {"life": "1f3a9c2e", "started": "2026-11-29T12:00:00Z", "step": 3, "num_ranks": 2}
    starts = [start | {"host": "a", "command": "c", "typed": "python"}]
    where = tmp_path / "lives.json"
    for whole in (json.dumps(starts).encode(), seal({"starts": starts})):  # the first: of before it was sealed
        where.write_bytes(whole)
        assert read_lives(str(tmp_path)) == starts
    for data in flips(seal({"starts": starts})):
        where.write_bytes(data)
        with contextlib.suppress(InputError):
            assert read_lives(str(tmp_path)) == starts, data
