"""What a run tells while it trains."""

from __future__ import annotations

from mtl_dist.runtime.tracking import Tracker


def test_the_speed_of_a_single_last_step_counts_its_time_and_a_run_that_goes_on_has_a_checkpoint(tmp_path, capsys):
    tracker = Tracker(str(tmp_path), resumed_at=8, num_ranks=1)
    for step in (9, 10):  # told of at once, as the last two of an epoch are
        tracker.step(
            step, 10, 0, 0.1, {"total": 1.0}, weights={}, images=16, took_s=1.6, waited_s=0.4, saved_step=None
        )  # fmt: skip
    tracker.close()
    assert "10 images/s  waiting for data 25%  checkpoint 8  1 rank  0 s left" in capsys.readouterr().out
