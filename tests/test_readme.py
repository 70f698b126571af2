"""What the documentation says exists: every command of it has its module and its flags, every link its file."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import REPO, run_here

PAGES = (
    "README.md",
    "cluster/README.md",
    "shards/README.md",
    "shards/FEATURES.md",
    "docs/winning.md",
    "docs/cluster.md",
)


def commands(page: str) -> list[tuple[str, list[str]]]:
    """Return (module, flags) of every `python -m` command of ours on a page."""
    text = (REPO / page).read_text().replace("\\\n", " ")
    found = re.findall(r"python -m ((?:mtl_dist|tune|cluster)\.[a-z]+)([^\n`#]*)", text)
    return [(module, re.findall(r"--[a-z][a-z.-]+", rest)) for module, rest in found]


@cache
def help_of(module: str) -> str:
    commands = {
        "mtl_dist.shards": ("create", "verify", "inspect", "synth"),
        "mtl_dist.features": ("create", "verify", "inspect", "folds"),
        "cluster.local": ("up", "down", "status"),
    }
    return " ".join(
        run_here(module, *verb, "--help").stdout for verb in [(v,) for v in commands.get(module, ())] or [()]
    )


@pytest.mark.parametrize("page", PAGES)
def test_every_command_on_the_page_has_its_flags(page):
    for module, flags in commands(page):
        for flag in flags:
            assert flag in help_of(module), (page, module, flag)
    assert commands(page)


@pytest.mark.parametrize("page", [*PAGES, "benchmarks/README.md"])
def test_every_link_and_file_on_the_page_exists(page):
    text = (REPO / page).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((REPO / page).parent / target).exists(), (page, target)


def test_the_file_map_names_every_module():
    text = (REPO / "README.md").read_text().split("## File map")[1]
    for path in [*(REPO / "mtl_dist").rglob("*.py"), *(REPO / "tune").glob("*.py"), *(REPO / "cluster").glob("*.py")]:
        if path.name != "__init__.py":
            assert Path(path).stem in text, path


def test_every_target_of_the_makefile_that_the_readme_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z]+)\b", (REPO / "README.md").read_text())) - {"is"} <= targets


# What README starts, and the package that brings it; the rest is a shell's, or python -m.
PROGRAMS = {"torchrun": "torch", "ray": "ray", "tensorboard": "tensorboard"}
OF_A_MACHINE = {"python", "make", "for", "done", "export", "source"}


def test_every_program_that_the_readme_starts_comes_with_make_install():
    blocks = re.findall(r"^```\w*\n(.*?)^```", (REPO / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    started = {match[1] for line in lines if (match := re.match(r" *([a-z]+) [^ ]", line)) and " -" in line}
    assert PROGRAMS.keys() <= started
    assert started <= PROGRAMS.keys() | OF_A_MACHINE
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    installed = {re.match(r"[\w-]+", package)[0] for package in needed}
    pinned = {line.split("==")[0] for line in (REPO / "constraints.txt").read_text().splitlines()}
    assert set(PROGRAMS.values()) <= installed & pinned
