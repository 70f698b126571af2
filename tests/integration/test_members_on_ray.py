"""Members of an ensemble as tasks of a real Ray: workers that die, messages that arrive, the same predictions."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from mtl_dist.ensemble.__main__ import main
from mtl_dist.errors import InputError
from mtl_dist.predicting import cluster
from mtl_dist.predicting.cluster import TaskFailed, map_over_cluster

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def ray_address():
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray leaves a token in the home directory
        context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        patch.setenv("RAY_ADDRESS", context.address_info["gcs_address"])
        yield
        ray.shutdown()


def die_once(item: tuple[str, int]) -> int:
    """Kill the worker on the first try."""
    marker, number = Path(item[0]), item[1]
    if number == 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * 10


def fail(item: Path) -> None:
    """Count the try, and fail as the name says."""
    with item.open("a") as file:
        file.write("x")
    raise InputError("what the user can mend") if item.name == "input" else OSError("the disk is gone")


def meet(item: tuple[Path, Path]) -> bool:
    """Say that this task runs, and wait for another: whether they ran at the same time."""
    mine, other = item
    mine.touch()
    deadline = time.monotonic() + 60
    while not other.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return other.exists()


def test_as_many_tasks_run_at_once_as_the_cluster_has_room_for(ray_address, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    found = dict(map_over_cluster(meet, {"a": (here, there), "b": (there, here)}, cpus=1, gpus=0, retries=0))
    assert found == {"a": True, "b": True}


def test_a_task_whose_worker_is_killed_is_run_again(ray_address, tmp_path):
    items = {f"member {number}": (str(tmp_path / "died"), number) for number in (1, 2, 3)}
    found = dict(map_over_cluster(die_once, items, cpus=1, gpus=0, retries=2))
    assert found == {"member 1": 10, "member 2": 20, "member 3": 30}
    assert (tmp_path / "died").exists()


def test_what_the_user_can_mend_is_not_retried_and_other_failures_are_named(ray_address, tmp_path):
    with pytest.raises(InputError, match="what the user can mend"):
        list(map_over_cluster(fail, {"a": tmp_path / "input"}, cpus=1, gpus=0, retries=2))
    assert (tmp_path / "input").read_text() == "x"
    with pytest.raises(TaskFailed, match="b: OSError: the disk is gone"):
        list(map_over_cluster(fail, {"b": tmp_path / "disk"}, cpus=1, gpus=0, retries=2))
    assert (tmp_path / "disk").read_text() == "xxx"
    with pytest.raises(InputError, match="needs 64 CPU and 0 GPU"):
        list(map_over_cluster(fail, {"c": tmp_path / "c"}, cpus=64, gpus=0, retries=2))


def test_tasks_that_no_node_can_run_say_so_while_they_wait(ray_address, tmp_path, monkeypatch):
    def stop(message: str, **options) -> None:
        raise TimeoutError(message)

    monkeypatch.setattr(cluster, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(cluster, "print", stop, raising=False)
    with pytest.raises(TimeoutError, match=r"needs 64 CPU .* none of the cluster's 1 node.* waiting for one"):
        list(map_over_cluster(fail, {"a": tmp_path / "a"}, cpus=64, gpus=0, retries=2, autoscaling=True))
    assert not (tmp_path / "a").exists()


def test_members_predicted_on_the_cluster_are_those_predicted_here(ray_address, run, tmp_path, capsys):
    main(["--runs", str(run), "--out", f"{tmp_path}/there"])
    assert "predicting 1 member(s) over the cluster: cropped" in capsys.readouterr().out
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a task of one CPU has: on some processors sums depend on their number
    try:
        main(["--runs", str(run), "--out", f"{tmp_path}/here", "--local"])
    finally:
        torch.set_num_threads(threads)
    assert "over the cluster" not in capsys.readouterr().out
    for name in ("score.json", "members/cropped.parquet"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_a_bad_test_image_leaves_what_a_task_predicted_before(ray_address, run, dataset, tmp_path):
    shutil.copytree(dataset / "cropped/v0", tmp_path / "cropped/v0")
    (tmp_path / "cropped/v0/00000.jpg").write_bytes(b"no image")
    (tmp_path / "list.txt").write_text("image\nv0/00000.jpg\n")
    args = ["--test-list", f"{tmp_path}/list.txt", "--test-root", str(tmp_path), "--out", f"{tmp_path}/out"]
    with pytest.raises(InputError, match=r"00000.jpg cannot be decoded.* what was predicted is kept"):
        main(["--runs", str(run), *args])
    assert [path.name for path in (tmp_path / "out").rglob("*.parquet")] == ["cropped.parquet"]
