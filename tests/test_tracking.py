"""What a run tells while it trains: its lines, and records that every reader of JSON reads."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from mtl_dist import storage
from mtl_dist.errors import InputError
from mtl_dist.training import growing
from mtl_dist.training.sinks.tensorboard import TensorBoard
from mtl_dist.training.tracking import METRICS, Tracker, read_records


def test_the_speed_of_a_single_last_step_counts_its_time_and_a_run_that_goes_on_has_a_checkpoint(tmp_path, capsys):
    tracker = Tracker(str(tmp_path), resumed_at=8, num_ranks=1)
    for step in (9, 10):  # told of at once, as the last two of an epoch are
        tracker.step(
            step, 10, 0, 0.1, {"total": 1.0}, weights={}, gradients={}, images=16, took_s=1.6, waited_s=0.4,
            saved_step=None,
        )  # fmt: skip
    assert "10 frames/s  waiting for data 25%  checkpoint 8  1 rank  0 s left" in capsys.readouterr().out


def test_what_a_teacher_told_of_a_step_is_on_the_line_and_in_its_record_and_nothing_without_one(tmp_path, capsys):
    tracker, shares = open_tracker(tmp_path), {"va": 0.25, "au": 0.0}
    for step, taught in ((2, {}), (2, shares)):  # the last of two is told of at once
        tracker.step(
            step, 2, 0, 0.1, {"total": 1.0}, weights={}, gradients={}, taught=taught, images=8, took_s=1.0,
            waited_s=0.0, saved_step=None,
        )  # fmt: skip
    without, with_teacher = capsys.readouterr().out.splitlines()
    assert "taught" not in without
    assert "total 1.000  taught va 25% au 0%  " in with_teacher
    files = tracker.files()
    records = [json.loads(line) for line in b"".join(files[METRICS]).splitlines()]
    assert [record.get("taught") for record in records] == [None, shares]
    (board,) = (b"".join(pieces) for name, pieces in files.items() if name != METRICS)
    assert b"taught/va" in board


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def take_step(tracker: Tracker, step: int, loss: float) -> None:
    tracker.step(
        step, 9, 0, 0.1, {"total": loss}, weights={}, gradients={}, images=8, took_s=1.0, waited_s=0.0, saved_step=None
    )


def test_records_are_strict_json_also_where_an_older_run_wrote_nan(tmp_path):
    older = [{"kind": "step", "step": 1, "loss": {"total": math.nan}}, {"kind": "step", "step": 9, "loss": {}}]
    (tmp_path / METRICS).write_text("".join(json.dumps(record) + "\n" for record in older))
    tracker = Tracker(str(tmp_path), resumed_at=5, num_ranks=1)
    take_step(tracker, 6, 1.5)
    with pytest.raises(ValueError, match="not JSON compliant"):
        take_step(tracker, 7, math.nan)
    (tmp_path / METRICS).write_bytes(b"".join(tracker.files()[METRICS]))
    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [(line["step"], line["loss"]["total"]) for line in lines] == [(1, None), (6, 1.5)]
    assert read_records(str(tmp_path)) == lines


def open_tracker(run: Path, resumed_at: int = 0) -> Tracker:
    board = TensorBoard(purge_step=resumed_at + 1)
    return Tracker(str(run), resumed_at=resumed_at, num_ranks=1, sinks=[board])


def take_steps(tracker: Tracker, first: int, last: int, *, total: int = 10**6) -> None:
    for step in range(first, last + 1):
        losses = {"va": 1 / step, "total": 2 / step}
        tracker.step(
            step, total, 0, 0.1, losses, weights={}, gradients={}, images=8, took_s=1.0, waited_s=0.0, saved_step=None
        )


def store(tracker: Tracker, run: Path) -> int:
    """Write what a save writes; return its bytes."""
    files = {name: b"".join(pieces) for name, pieces in tracker.files().items()}
    for name, data in files.items():
        storage.write_bytes(f"{run}/{name}", data)
    return sum(map(len, files.values()))


def steps_of(run: Path) -> list[int]:
    return [record["step"] for record in read_records(str(run))]


def read_events(run: Path) -> list[tuple[str, Event]]:
    """Every event with the name of its file, in TensorBoard's order."""
    found = []
    for path in sorted((run / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append((path.name, Event.FromString(data[12 : 12 + length])))
            data = data[16 + length :]
    return found


def test_the_records_of_many_saves_cost_what_is_new_and_read_as_one(tmp_path, monkeypatch):
    """A save every 10 steps: the second thousand steps write as many bytes as the first."""
    monkeypatch.setattr(growing, "PART_BYTES", 5000)
    tracker, written = open_tracker(tmp_path), []
    for half in (0, 1000):
        written.append(0)
        for first in range(half + 1, half + 1001, 10):
            take_steps(tracker, first, first + 9)
            written[-1] += store(tracker, tmp_path)
    assert written[1] < 1.1 * written[0]
    assert steps_of(tmp_path) == list(range(1, 2001))
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) < sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) / 5000 + 2
    assert not tracker.files(), "nothing is new"
    events = read_events(tmp_path)
    assert [event.step for _, event in events if event.HasField("summary")] == list(range(1, 2001))
    assert len({name for name, _ in events}) > 10


def test_what_tensorboard_shows_has_the_last_scores(tmp_path):
    """They are told of right before the last save."""
    tracker = open_tracker(tmp_path)
    take_steps(tracker, 1, 50)
    names = ("p", "va", "expr", "au", "ccc_v", "ccc_a")
    tracker.evaluated(50, 0, dict.fromkeys(names, 0.5), {"p": 0.1})
    store(tracker, tmp_path)
    *_, (_, last) = read_events(tmp_path)
    assert {value.tag: value.simple_value for value in last.summary.value} == {f"score/{name}": 0.5 for name in names}


@pytest.mark.parametrize("resumed_at", [0, 3, 25, 60, 99, 100])
def test_a_run_that_goes_on_drops_the_later_steps_in_every_part(resumed_at, tmp_path, monkeypatch):
    monkeypatch.setattr(growing, "PART_BYTES", 1500)
    tracker = open_tracker(tmp_path)
    take_steps(tracker, 1, 100)
    store(tracker, tmp_path)
    assert len(list((tmp_path / "metrics").iterdir())) > 5
    again = open_tracker(tmp_path, resumed_at)
    take_steps(again, resumed_at + 1, resumed_at + 9)
    store(again, tmp_path)
    assert steps_of(tmp_path) == list(range(1, resumed_at + 10))
    third = open_tracker(tmp_path, resumed_at + 9)
    take_steps(third, resumed_at + 10, 200)
    store(third, tmp_path)
    assert steps_of(tmp_path) == list(range(1, 201))


def test_a_run_from_before_there_were_parts_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(growing, "PART_BYTES", 1500)
    old = [{"kind": "step", "step": step, "epoch": 0, "lr": 0.1, "loss": {"total": 1.0}} for step in range(1, 51)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in old))
    tracker = open_tracker(tmp_path, 40)
    take_steps(tracker, 41, 60)
    store(tracker, tmp_path)
    assert read_records(str(tmp_path))[:40] == old[:40]
    assert steps_of(tmp_path) == list(range(1, 61))


@pytest.mark.parametrize("text", ["{", "[1]", "1", '{"kind": "step"}', '{"step": 1}', "[" * 10**5])
@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics/000001.jsonl"])
def test_a_damaged_part_is_one_message_and_without_it_the_others_are_read(name, text, tmp_path, monkeypatch):
    monkeypatch.setattr(growing, "PART_BYTES", 1500)
    tracker = open_tracker(tmp_path)
    take_steps(tracker, 1, 60)
    store(tracker, tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name} is damaged .*delete it: only its records of the run are lost"):
        open_tracker(tmp_path, 60)
    (tmp_path / name).unlink()
    kept = steps_of(tmp_path)
    assert 0 < len(kept) < 60
    open_tracker(tmp_path, 60)
