"""`--check`: what it finds in good order, and that each thing that is not is named, with all others beside it."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtl_dist.config import Config, build_config
from mtl_dist.errors import InputError
from mtl_dist.presets import load_preset
from mtl_dist.training.health import (
    MAX_SKEW_S,
    Finding,
    clock_skew,
    compare_versions,
    describe_cache,
    describe_clock,
    describe_device,
    describe_versions,
    look,
)
from tests.conftest import assert_one_message, run_here, run_module

ALL = ("storage", "clock", "data", "cache", "versions", "device")


def flags(shards: Path, storage: Path | str, *more: str) -> list[str]:
    data = [f"--data.{key}={shards}/cropped/{split}" for key, split in (("train", "train"), ("val", "val"))]
    return ["--check", "--preset", "small", "--engine.device", "cpu", "--run.storage", str(storage), *data, *more]


def check(*args: str):
    return run_here("mtl_dist.train", "--local", *args)


def rows(printed: str) -> dict[str, str]:
    """{what: its mark} of the table; wrapped lines begin with neither."""
    words = [line.split() for line in printed.splitlines()]
    return {line[1]: line[0] for line in words if line and line[0] in ("ok", "FAILED")}


def config_of(**sections: dict) -> Config:
    return build_config(load_preset("small"), sections)


def test_what_is_in_order_is_told_and_nothing_is_left_or_begun(shards, tmp_path):
    done = check(*flags(shards, tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout) == dict.fromkeys(ALL, "ok")
    assert "40 rows to train, 20 to validate" in " ".join(done.stdout.split())
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_is_a_file_is_named_and_all_else_is_looked_at(shards, tmp_path):
    (tmp_path / "runs").write_text("no directory")
    done = check(*flags(shards, tmp_path / "runs"))
    assert_one_message(done, "1 of 5 checks failed", "storage on", str(tmp_path / "runs"), "which is a file")
    assert rows(done.stdout) == {what: "ok" for what in ALL if what != "clock"} | {"storage": "FAILED"}
    assert (tmp_path / "runs").read_text() == "no directory"


def test_data_that_is_not_there_and_a_shard_that_is_gone_are_named(shards, tmp_path):
    assert_one_message(check(*flags(tmp_path / "none", tmp_path)), "1 of 6", "data on", "index.json does not exist")
    shutil.copytree(shards, tmp_path / "shards")
    next((tmp_path / "shards/cropped/train").glob("*.tar")).unlink()
    assert_one_message(
        check(*flags(tmp_path / "shards", tmp_path / "runs")), "1 of 6", "is gone, but the index lists it"
    )


def test_a_device_that_is_not_there_is_named(shards, tmp_path):
    done = check(*flags(shards, tmp_path), "--engine.device", "cuda")
    assert_one_message(done, "1 of 6", "device on", "engine.device is cuda")


@pytest.mark.parametrize(("skew", "words"), [(3600, "3600 s ahead of"), (-3600, "3600 s behind")])
def test_a_clock_that_is_an_hour_off_is_refused(tmp_path, skew, words):
    with pytest.raises(InputError, match="set it by NTP") as refused:
        describe_clock(str(tmp_path), clock=lambda: time.time() + skew)
    assert words in str(refused.value).replace("3599", "3600").replace("3598", "3600")
    assert list(tmp_path.iterdir()) == []


def test_a_clock_that_is_a_little_off_is_told(tmp_path):
    assert describe_clock(str(tmp_path)) == "as the store's"
    assert "s behind the store's" in describe_clock(str(tmp_path), clock=lambda: time.time() - MAX_SKEW_S / 2)


spans = st.floats(0, 30)


@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(-1e5, 1e5), spans, spans)
def test_the_skew_is_never_more_than_it_is_and_at_most_the_requests_time_and_a_second_less(
    second, part, skew, way, back
):
    """A store whose clock is right and tells whole seconds, and a request that takes its time either way."""
    began = second + part
    told = clock_skew(began + skew, float(math.floor(began + way)), began + way + back + skew)
    slack = 1e-4  # of numbers of 2^31
    assert min(skew, 0) - slack <= told <= max(skew, 0) + slack
    assert abs(told) >= abs(skew) - way - back - 1 - slack


def test_a_cache_without_room_is_refused_and_what_it_holds_counts(tmp_path, monkeypatch):
    sets = {"train": "s3://bucket/train", "val": "s3://bucket/val", "cache_dir": str(tmp_path)}
    config = config_of(data=sets | {"cache_gib": 1e6})
    with pytest.raises(InputError, match=r"1000000\.0 are needed \(data.cache_gib 1e\+06\)"):
        describe_cache(config, num_bytes=None)
    assert "0.0 are needed" in describe_cache(config, num_bytes=1)  # the sets are smaller than the bound

    (tmp_path / ("a" * 40)).write_bytes(bytes(5))
    (tmp_path / "somebody's").write_bytes(bytes(1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    describe_cache(config, num_bytes=15)
    with pytest.raises(InputError, match=r"lower --data\.cache-gib"):
        describe_cache(config, num_bytes=16)
    assert describe_cache(config_of(data={"train": "a", "val": "b"}), num_bytes=0).startswith("not needed")


def test_versions_that_differ_from_those_of_most_nodes_are_named():
    own = describe_versions()
    assert own.startswith("python 3.")
    same = [Finding("versions", own, host) for host in "abc"]
    assert compare_versions(same) == same
    one, *others = compare_versions([same[0]._replace(says="python 2.7"), *same[1:], Finding("data", "", "d")])
    assert one.is_bad
    assert one.says == f"python 2.7; most nodes have {own}: install the same on all"
    assert not any(other.is_bad for other in others)


def test_gpus_that_ray_counts_and_torch_does_not_see_are_named():
    config = config_of(engine={"device": "cpu"})
    found = look("device", lambda: describe_device(config, num_gpus=2), where="10.0.0.1")
    assert found.is_bad == (not torch.cuda.is_available())
    assert "CPU(s)" in describe_device(config, num_gpus=0)


@pytest.mark.whole
def test_a_real_store_and_a_bucket_that_is_not_there(shards, s3, tmp_path):
    done = check(*flags(shards, "s3://mtl/checked"))
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout)["storage"] == rows(done.stdout)["clock"] == "ok"
    assert_one_message(check(*flags(shards, "s3://no-such-bucket/checked")), "storage on", "does not exist")


@pytest.mark.whole
@pytest.mark.parametrize("is_well", [True, False])
def test_ranks_of_torchrun_meet_and_only_the_first_tells(shards, tmp_path, is_well):
    if not is_well:
        (tmp_path / "runs").write_text("no directory")
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mtl_dist.train"]
    done = run_module(*torchrun, *flags(shards, tmp_path / "runs"))
    assert ("2 ranks met" in done.stdout, done.returncode) == (True, 0 if is_well else 1), done.stderr
    assert done.stdout.count("same disk") == 1
    assert ("1 of 8 checks failed" in done.stderr) != is_well
    assert [path.name for path in tmp_path.iterdir()] == ([] if is_well else ["runs"])
