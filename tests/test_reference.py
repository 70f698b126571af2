"""`make docs`: a page for every public module, which opens offline."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.conftest import REPO


@pytest.mark.slow
def test_every_public_module_has_a_page_that_opens_offline(tmp_path):
    pytest.importorskip("pdoc", reason="pdoc comes with make install")
    done = subprocess.run(
        [sys.executable, "docs/reference.py", str(tmp_path)], cwd=REPO, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    modules = {
        path.relative_to(REPO).with_suffix("")
        for package in ("mtl_dist", "tune")
        for path in (REPO / package).rglob("*.py")
        if not path.stem.startswith("_")
    }
    assert len(modules) > 100
    pages = {module: tmp_path / module.with_suffix(".html") for module in modules}
    assert [module for module, page in pages.items() if not page.exists()] == []
    for page in [*pages.values(), tmp_path / "index.html", tmp_path / "mtl_dist.html"]:
        loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="([^"]*)"', page.read_text())
        assert not [address for address in loaded if address.startswith(("http", "//"))], page
    assert "Write a whole object atomically." in (tmp_path / "mtl_dist/storage.html").read_text()
    assert 'href="mtl_dist/storage.html"' in (tmp_path / "mtl_dist.html").read_text()
