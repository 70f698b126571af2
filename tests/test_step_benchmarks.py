"""The benchmarks of steps start, and find something to say, on a CPU and at sizes of no meaning."""

import json
import sys

import pytest

from benchmarks import gpu, step

pytestmark = pytest.mark.whole


def test_the_table_of_a_gpu_is_made_on_a_cpu_too(tmp_path, capsys):
    gpu.main(["--device", "cpu", "--toy", "--out", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    speeds = found["speed"]["speeds"]
    assert {(speed["preset"], speed["kind"]) for speed in speeds} == {
        (p, k) for p in ["a", "b", "mae", "c"] for k in gpu.KINDS
    }
    assert all(speed["images_per_s"] > 0 and speed["mfu"] is None for speed in speeds)
    assert len(found["learn"]["losses"]["cpu"]) == 3
    assert 0 <= found["learn"]["waiting_for_data"] <= 1
    assert found["predict"]["pictures"] == 36
    assert "images/s" in capsys.readouterr().out


def test_a_part_that_fails_is_named_and_the_others_are_made(tmp_path, capsys, monkeypatch):
    for part in ("bench_learning", "bench_predicting"):
        monkeypatch.setattr(gpu, part, lambda *args, **how: {"made": True})
    monkeypatch.setattr(gpu, "measure", lambda *args, **how: 1 / 0)
    with pytest.raises(SystemExit, match="failed: speed"):
        gpu.main(["--device", "cpu", "--toy", "--out", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["learn"] == found["predict"] == {"made": True}
    assert "ZeroDivisionError" in found["speed"]["failed"]


def test_a_step_is_measured_beside_a_bare_loop_and_three_forwards(tmp_path, capsys, monkeypatch):
    out = tmp_path / "step.json"
    args = ["--sizes", "80", "--batch", "2", "--rounds", "1", "--backbone", "small", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmarks/step.py", *args])
    step.main()
    found = json.loads(out.read_text())["sizes"]["80"]
    assert found.keys() == {"ours", "bare", "three"}
    assert found["bare"]["times_bare"] == 1
    assert all(of["images_per_s"] > 0 for of in found.values())
