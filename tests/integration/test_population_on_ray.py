"""A population on a real Ray: as many members at a time as there is room for, and it goes on where it was."""

from __future__ import annotations

import csv

import pytest

from tests.integration.test_members_on_ray import ray_address as ray_address
from tests.test_population import args_of
from tune.population import main

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.usefixtures("ray_address")
def test_members_train_on_the_cluster_one_after_the_other_where_there_is_room_for_one(shards, tmp_path, capsys):
    args = [arg for arg in args_of(shards, tmp_path) if arg != "--local"]
    main(args)
    assert "generation 2 of 2, the best first" in capsys.readouterr().out
    with (tmp_path / "few/lineage.csv").open() as file:
        before = list(csv.DictReader(file))
    assert len({row["parent"] for row in before[2:]}) == 1
    main(args)
    with (tmp_path / "few/lineage.csv").open() as file:
        assert list(csv.DictReader(file)) == before
