"""What the cluster of this machine and the demo on it say where they fail. Clusters that start are in integration/."""

from __future__ import annotations

import inspect
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import local
from cluster.demo import StepFailed, begin
from cluster.local import up
from cluster.parts import wait_until
from cluster.processes import ClusterError
from cluster.state import plan_state
from mtl_dist.errors import InputError, choose_command


def test_a_busy_machine_is_told_with_its_load_and_a_remedy_and_without_a_page_of_addresses(tmp_path):
    state = plan_state(tmp_path, 2, 4, network="loopback", subnet="127.0.0")
    (tmp_path / "logs").mkdir()
    page = ["Local node IP: 127.0.0.2", "ray start --address='127.0.0.2:12000'", "RuntimeError: no room"]
    (tmp_path / "logs" / "host-1.log").write_text("\n".join(page))
    sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with pytest.raises(ClusterError) as error:
            wait_until(lambda: False, state, {"host-1": sleeping}, "host-1", time.monotonic() - 1)
    finally:
        sleeping.kill()
        sleeping.wait()
    for words in (
        "host-1 did not answer in time",
        "a load of",
        "free memory",
        "--timeout 300",
        "RuntimeError: no room",
    ):
        assert words in str(error.value)
    assert "127.0.0.2" not in str(error.value)


def test_a_cluster_that_does_not_start_leaves_no_directory(tmp_path, monkeypatch):
    """Its S3 server is not installed."""
    monkeypatch.setattr(local.parts.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="no rclone on this machine"):
        up(tmp_path / "cluster", network="loopback")
    assert list(tmp_path.iterdir()) == []


def test_what_a_host_is_told_to_run_keeps_its_own_flags():
    args = ["exec", "--dir", "one", "2", "--", "sh", "-c", "echo $0", "--", "--dir", "other"]
    chosen = choose_command(local.COMMANDS, args, prog=local.PROG, description="")
    told = inspect.signature(local.run_exec).bind(*chosen.args, **chosen.keywords).arguments
    command = {"command": "sh", "arguments": ("-c", "echo $0", "--", "--dir", "other")}
    assert told == {"host": 2, "dir": Path("one"), **command}


def test_a_demo_of_other_data_of_the_same_name_leaves_results_alone(tmp_path):
    demo = tmp_path / "demo" / "faces"
    begin(demo, of="/one/faces")
    (demo / "results").mkdir()
    (demo / "results" / "score.json").write_text("{}")
    with pytest.raises(InputError, match=f"{demo} holds the demo of /one/faces, and this one is of /two/faces: move"):
        begin(demo, of="/two/faces")
    assert (demo / "results" / "score.json").exists()
    begin(demo, of="/one/faces")  # a finished one starts anew
    assert not (demo / "results").exists()


def test_a_demo_that_fails_says_what_failed_and_where_its_output_is(tmp_path):
    log = tmp_path / "5-training-cropped.log"
    lines = [
        "(RayTrainWorker pid=7, ip=127.0.0.2) step 4",
        "(TrainController pid=6) ray.exceptions.OutOfMemoryError: Task was killed due to low memory.",
        "Job 'raysubmit_x' failed",
        "Status message: Job entrypoint command failed with exit code 1, last available logs:",
    ]
    log.write_text("\n".join(lines))
    assert str(StepFailed("training cropped", 1, log)) == (
        "'training cropped' failed with exit code 1 (ray.exceptions.OutOfMemoryError: Task was killed due to low "
        f"memory.); its output is in {log}"
    )
    log.write_text("all is well so far\n")
    assert str(StepFailed("searching", 137, log)) == f"'searching' failed with exit code 137; its output is in {log}"
