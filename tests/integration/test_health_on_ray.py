"""`--check` as tasks of a real Ray: every node answers, also where all its CPUs are taken."""

from __future__ import annotations

import os
import signal

import pytest

from mtl_dist.predicting.cluster import ask_every_node
from tests.conftest import assert_one_message, run_here
from tests.integration.test_members_on_ray import ray_address as ray_address
from tests.test_health import ALL, flags, rows

pytestmark = pytest.mark.integration


def die(item: str, num_gpus: float) -> None:
    """Be a node that does not answer."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("ray_address")
def test_every_node_is_looked_at_while_its_cpus_are_taken(shards, tmp_path):
    import ray

    @ray.remote(num_cpus=2)
    class Busy:
        def there(self) -> bool:
            return True

    busy = Busy.remote()
    assert ray.get(busy.there.remote())
    done = run_here("mtl_dist.train", *flags(shards, tmp_path / "runs"))
    ray.kill(busy)
    assert done.returncode == 0, done.stderr
    assert rows(done.stdout) == dict.fromkeys(
        ("room", *(what for what in ALL if what != "clock"), "clock", "same"), "ok"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("ray_address")
def test_a_cluster_that_is_too_small_and_a_node_without_an_answer_are_named(shards, tmp_path):
    done = run_here("mtl_dist.train", *flags(shards, tmp_path / "runs"), "--ray.num-ranks", "5", "5")
    assert_one_message(done, "1 of 8 checks failed", "room on the cluster: ray.num_ranks 5")
    ((address, answer),) = ask_every_node(die, "", timeout_s=60)
    assert address
    assert isinstance(answer, Exception)
