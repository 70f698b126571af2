"""What a process may use of its machine: CPUs by affinity and cgroups, and open files."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from mtl_dist.data.balanced import build_balanced_order
from mtl_dist.data.cache import Cache
from mtl_dist.data.classes import Classes
from mtl_dist.data.index import read_index
from mtl_dist.data.loader import FETCH_AHEAD_STEPS
from mtl_dist.data.order import Order
from mtl_dist.data.reader import ShardReader
from mtl_dist.data.task_orders import build_task_orders
from mtl_dist.machine import num_cpus
from tests.conftest import REPO


def run_python(code: str, *before: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*before, sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)


def test_cpus_are_those_that_the_affinity_allows():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import mtl_dist.machine as m"
    assert run_python(f"{code}; print(m.num_cpus())").stdout == "1\n"
    assert run_python(f"{code}; from mtl_dist.shards.__main__ import CORES; print(CORES)").stdout == "1\n"


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        ("0::/", {"cpu.max": "100000 100000"}, 1),
        ("0::/", {"cpu.max": "50000 100000"}, 1),  # less than one
        ("0::/job/step", {"job/cpu.max": "100000 100000", "job/step/cpu.max": "max 100000"}, 1),  # of the one above
        ("0::/of/the/host", {"cpu.max": "100000 100000"}, 1),  # what a container sees of its own
        ("4:cpu,cpuacct:/j", {"cpu/j/cpu.cfs_quota_us": "100000", "cpu/j/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "6400000 100000"}, None),  # more than there are
        ("4:cpuset:/", {"cpu.max": "nonsense"}, None),
    ],
)  # fmt: skip
def test_cpus_are_no_more_than_a_cgroup_has_time_for(tmp_path, line, files, expected):
    (tmp_path / "cgroup").write_text(f"7:memory:/x\n{line}\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    found = num_cpus(cgroup_file=tmp_path / "cgroup", cgroup_dir=tmp_path)
    assert found == (expected or len(os.sched_getaffinity(0)))


def test_the_limit_of_open_files_is_raised_to_what_shards_need_or_refused_in_words():
    code = (
        "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, ({soft}, {hard})); import mtl_dist.machine as m; "
        "m.allow_open_files(1000); print(r.getrlimit(r.RLIMIT_NOFILE))"
    )
    assert run_python(code.format(soft=256, hard=4096)).stdout == "(1512, 4096)\n"
    assert run_python(code.format(soft=2000, hard=4096)).stdout == "(2000, 4096)\n"
    assert "InputError: 1000 shards are in hand at a time" in run_python(code.format(soft=256, hard=1024)).stderr


class CountingCache(Cache):
    """A cache that counts how often it is asked for what."""

    def __init__(self):
        super().__init__()
        self.opened: list[str] = []

    def open(self, uri: str, **about):
        self.opened.append(uri)
        return super().open(uri, **about)


@pytest.mark.parametrize("sampling", ["masked", "per_task", "balanced"])
def test_shards_in_hand_are_kept_open_however_many_they_are(dataset, tmp_path, sampling, monkeypatch):
    """40 shards of a row, of which an epoch opens each once; it opened them again and again beyond a fixed number."""
    from mtl_dist.shards.__main__ import create

    create(str(dataset), str(tmp_path), views=("cropped",), frames_per_shard=1, jobs=1)
    uri = str(tmp_path / "cropped" / "train")
    index, cache = read_index(uri), CountingCache()
    monkeypatch.setattr("mtl_dist.data.mapped.OPEN_SHARDS", 4)
    reader = ShardReader(uri, index, cache)
    order = Order(index.shard_rows, 8, 8, 2, seed=0)
    if sampling == "balanced":
        order = build_balanced_order(Classes(np.arange(40), np.arange(40) % 7 // 5, 2), order, power=1)
    if sampling == "per_task":
        labelled = {"va": np.arange(40), "au": np.arange(0, 40, 2)}
        order = build_task_orders(
            labelled, index.shard_rows, global_batch=8, streams=8, block_shards=2, seed=0, epoch_steps=2
        )
    reader.keep_open(order.shards_in_hand(1, num_steps=2 * FETCH_AHEAD_STEPS))
    plan = order.plan(epoch=0, rank=0, num_ranks=1)
    reader.warm(plan.shards_ahead(0, order.num_steps))
    for samples in plan.samples_of(0, order.num_steps):
        reader.read_batch(samples, 32)
    sidecars = [uri for uri in cache.opened if uri.endswith(".safetensors")]
    assert len(sidecars) == len(set(sidecars))


@pytest.mark.whole
@pytest.mark.parametrize(("typed", "expected"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_torchs_threads_sleep_where_nobody_asked_them_to_spin(typed, expected, monkeypatch):
    """As OpenMP itself tells; also in processes that Ray starts, which import torch before anything of ours."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if typed:
        monkeypatch.setenv("OMP_WAIT_POLICY", typed)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "true")
    code = "import mtl_dist.device; from mtl_dist.joining import runtime_env; print(runtime_env())"
    done = run_python(code)
    assert f"OMP_WAIT_POLICY = '{expected}'" in done.stderr
    assert f"'OMP_WAIT_POLICY': '{expected.lower()}'" in done.stdout
