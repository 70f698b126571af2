"""Videos as tasks of a real Ray: the same faces, whoever finds them."""

from __future__ import annotations

import pytest

from mtl_dist.prepare.__main__ import main
from tests.integration.test_members_on_ray import ray_address as ray_address
from tests.test_prepare import made as made
from tests.test_prepare import tree

pytestmark = pytest.mark.integration


@pytest.mark.usefixtures("ray_address")
def test_faces_found_on_the_cluster_are_byte_for_byte_those_found_here(made, tmp_path, monkeypatch, capsys):
    source, out = made
    monkeypatch.chdir(source.parent)
    main(["in", str(tmp_path / "out")])
    assert "finding faces in 3 video(s) or parts of photographs over the cluster" in capsys.readouterr().out
    assert tree(tmp_path / "out") == tree(out)
    (tmp_path / "out/parts/party.parquet").unlink()
    main(["in", str(tmp_path / "out")])
    assert "finding faces in 1 video(s)" in capsys.readouterr().out
    assert tree(tmp_path / "out") == tree(out)
