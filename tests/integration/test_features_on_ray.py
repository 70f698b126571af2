"""Shards of features as tasks of a real Ray: the same bytes, whoever makes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mtl_dist.data.index import FEATURES, read_index
from mtl_dist.features.__main__ import main
from tests.integration.test_members_on_ray import ray_address as ray_address
from tests.test_features import SIZE, save_backbone, sets_of
from tests.test_shards import read_tree

pytestmark = pytest.mark.integration


@pytest.mark.usefixtures("ray_address")
def test_features_made_on_the_cluster_are_byte_for_byte_those_made_here(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mtl_dist.features.plan.MIB", 8 << 10)  # several shards
    weights = save_backbone(tmp_path / "net.safetensors")
    flags = ["--data", *map(str, sets_of(shards)), "--runs", str(weights), "--backbone", "vgg_small", "--image-size"]
    flags += [str(SIZE), "--shard-mib", "1", "--batch", "4"]
    main(["create", f"{tmp_path}/there", *flags])
    assert "making 5 shard(s) over the cluster" in capsys.readouterr().out
    assert len(read_index(f"{tmp_path}/there/cropped/train", formats=(FEATURES,)).shards) == 3
    threads = torch.get_num_threads()
    main(["create", f"{tmp_path}/here", *flags, "--local", "--jobs", "1"])
    torch.set_num_threads(threads)
    assert read_tree(tmp_path / "there") == read_tree(tmp_path / "here")
    lost = Path(tmp_path / "there/cropped/train/shard-000001.safetensors")
    lost.unlink()
    main(["create", f"{tmp_path}/there", *flags])
    assert "making 1 shard(s) over the cluster" in capsys.readouterr().out
    main(["create", f"{tmp_path}/there", *flags])
    assert "nothing is left to do" in capsys.readouterr().out
    assert read_tree(tmp_path / "there") == read_tree(tmp_path / "here")
