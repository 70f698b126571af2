"""Every failure of `benchmarks.survival` on a real cluster of three hosts: nothing lost, nothing twice, in time."""

from __future__ import annotations

import pytest

from benchmarks.survival import FAILURES, survive

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3600)]

SECONDS = {"rank 0 killed": 30, "rank 1 killed": 30, "host cut off the network, returns": 60}


def test_no_failure_loses_a_row_or_reads_one_twice(tmp_path):
    outcomes = survive(tmp_path, list(FAILURES))
    assert [outcome.failure for outcome in outcomes] == list(FAILURES)
    for outcome in outcomes:
        assert (outcome.rows_lost, outcome.rows_twice) == (0, 0), outcome
        assert outcome.loss_difference < 0.05, outcome
        assert outcome.seconds < SECONDS.get(outcome.failure, 240), outcome


def test_features_made_over_the_hosts_and_trained_on_lose_no_window_either(tmp_path):
    """A rank is killed, a host is cut off: every window of videos once, and the loss of the undisturbed run."""
    names = ["rank 1 killed", "host cut off the network, returns"]
    for outcome in survive(tmp_path, names, of="features"):
        assert (outcome.rows_lost, outcome.rows_twice) == (0, 0), outcome
        assert outcome.loss_difference < 0.05, outcome
        assert outcome.seconds < SECONDS[outcome.failure], outcome
