from __future__ import annotations

import pytest

from cluster.local import LocalCluster
from tests.conftest import run_module


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, dataset):
    """A cluster with shards of `dataset` in its store."""
    with LocalCluster(tmp_path_factory.mktemp("cluster"), hosts=2, cpus_per_host=3) as state:
        args = ("mtl_dist.shards", "create", str(dataset), "s3://mtl/faces", "--frames-per-shard", "7")
        done = run_module(*args, env=state.client_env())
        assert done.returncode == 0, done.stderr
        yield state
