"""What a run tells while it trains: its lines, and records that every reader of JSON reads."""

from __future__ import annotations

import json
import math

import pytest

from mtl_dist.runtime.tracking import METRICS, Tracker, read_records


def test_the_speed_of_a_single_last_step_counts_its_time_and_a_run_that_goes_on_has_a_checkpoint(tmp_path, capsys):
    tracker = Tracker(str(tmp_path), resumed_at=8, num_ranks=1)
    for step in (9, 10):  # told of at once, as the last two of an epoch are
        tracker.step(
            step, 10, 0, 0.1, {"total": 1.0}, weights={}, images=16, took_s=1.6, waited_s=0.4, saved_step=None
        )  # fmt: skip
    tracker.close()
    assert "10 images/s  waiting for data 25%  checkpoint 8  1 rank  0 s left" in capsys.readouterr().out


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def take_step(tracker: Tracker, step: int, loss: float) -> None:
    tracker.step(step, 9, 0, 0.1, {"total": loss}, weights={}, images=8, took_s=1.0, waited_s=0.0, saved_step=None)


def test_records_are_strict_json_also_where_an_older_run_wrote_nan(tmp_path):
    older = [{"kind": "step", "step": 1, "loss": {"total": math.nan}}, {"kind": "step", "step": 9, "loss": {}}]
    (tmp_path / METRICS).write_text("".join(json.dumps(record) + "\n" for record in older))
    tracker = Tracker(str(tmp_path), resumed_at=5, num_ranks=1)
    try:
        take_step(tracker, 6, 1.5)
        with pytest.raises(ValueError, match="not JSON compliant"):
            take_step(tracker, 7, math.nan)
        (tmp_path / METRICS).write_bytes(b"".join(tracker.files()[METRICS]))
    finally:
        tracker.close()
    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [(line["step"], line["loss"]["total"]) for line in lines] == [(1, None), (6, 1.5)]
    assert read_records(str(tmp_path)) == lines
