"""What the documentation says exists: commands with their modules and flags, links with their files and headings."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import REPO, run_here

MANUAL = ("README.md", *sorted(f"docs/{path.name}" for path in (REPO / "docs").glob("*.md")))
CONTRACTS = tuple(sorted(f"{path.parent.name}/{path.name}" for path in REPO.glob("[cs]*/*.md")))  # cluster, shards
PAGES = (*MANUAL, *CONTRACTS, "benchmarks/README.md")
WITHOUT_COMMANDS = {"docs/files.md", "docs/formats.md"}
VERBS = {
    "mtl_dist.shards": ("create", "verify", "inspect", "synth"),
    "mtl_dist.features": ("create", "verify", "inspect", "folds"),
    "cluster.local": ("up", "down", "status"),
}
FLAG = r"(?<![\w-])--[a-z](?:[\w.-]*\w)?"
MAX_README_BYTES, MAX_PAGE_BYTES, MAX_COLUMNS = 9_000, 25_000, 120


def text_of(page: str) -> str:
    return (REPO / page).read_text()


def prose_of(page: str) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def blocks_of(page: str) -> list[str]:
    """Return the lines of a page's blocks of code, continued ones as one."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def commands(page: str) -> list[tuple[str, str]]:
    """Return (module, what follows it) of every command of ours on a page, under `python`, torchrun or a job of Ray."""
    text = text_of(page).replace("\\\n", " ")
    named = list(re.finditer(r" -m ((?:mtl_dist|tune|cluster|benchmarks)(?:\.[a-z_0-9]+)+)", text))
    ends = [match.start() for match in named[1:]] + [len(text)]
    return [(match[1], re.split(r"[\n`#]", text[match.end() : end])[0]) for match, end in zip(named, ends)]


@cache
def flags_of(module: str, verb: str = "") -> set[str]:
    """Return the flags that a command lists, or that a benchmark's file adds."""
    if module.startswith("benchmarks."):
        return set(re.findall(rf'"({FLAG})"', (REPO / f"{module.replace('.', '/')}.py").read_text()))
    if module in VERBS and not verb:
        return set().union(*(flags_of(module, each) for each in VERBS[module]))
    return set(re.findall(FLAG, run_here(module, *filter(None, [verb]), "--help").stdout))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_on_the_page_has_its_flags(page):
    for module, rest in commands(page):
        verb = next((word for word in rest.split()[:1] if word in VERBS.get(module, ())), "")
        missing = set(re.findall(FLAG, rest)) - flags_of(module, verb)
        assert not missing, (page, module, verb, missing)
    assert commands(page) or page in WITHOUT_COMMANDS


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_on_the_page_exists(page):
    """A flag with a dot in it is ours, wherever it stands: in prose, in tables, behind a scheduler's script."""
    commands = ("mtl_dist.train", "tune.search", "tune.population", "mtl_dist.shards")
    settings = {flag for module in commands for flag in flags_of(module) if "." in flag}
    assert set(re.findall(r"(?<![\w-])--[a-z]+\.[a-z][\w.-]*\w", text_of(page))) <= settings


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)", prose_of(str(page.relative_to(REPO))), re.MULTILINE):
        anchor = re.sub(r"[^\w -]", "", re.sub(r"\]\([^)]*\)", "", heading).lower()).replace(" ", "-")
        found[anchor] = number = found.get(anchor, -1) + 1
        if number:
            found[f"{anchor}-{number}"] = 0
    return set(found)


@pytest.mark.parametrize("page", [*PAGES, "benchmarks/NOTES.md", "CHANGELOG.md"])
def test_every_link_on_the_page_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = ((REPO / page).parent / name).resolve() if name else REPO / page
        assert path.exists(), (page, target)
        assert not anchor or anchor in anchors_of(path), (page, target)


def test_readme_is_read_in_ten_minutes_and_leads_to_every_page():
    assert len(text_of("README.md").encode()) <= MAX_README_BYTES
    for page in MANUAL[1:]:
        assert len(text_of(page).encode()) <= MAX_PAGE_BYTES, f"{page} is too long for one page: split it"
        assert f"({page}" in text_of("README.md"), f"README leads nobody to {page}"


@pytest.mark.parametrize("page", PAGES)
def test_prose_is_no_wider_than_code(page):
    lines = [line for line in prose_of(page).splitlines() if not line.startswith(("|", "!["))]
    assert [line for line in lines if len(line) > MAX_COLUMNS] == []


def test_the_file_map_names_every_module():
    text = text_of("docs/files.md")
    for path in [*(REPO / "mtl_dist").rglob("*.py"), *(REPO / "tune").glob("*.py"), *(REPO / "cluster").glob("*.py")]:
        if path.name != "__init__.py":
            assert Path(path).stem in text, path


def test_readme_names_every_directory():
    text = text_of("README.md")
    packages = {path.parent.name for path in REPO.glob("*/*.py")}
    assert {"mtl_dist", "tune", "cluster", "benchmarks", "docs", "tests"} <= packages
    assert [name for name in sorted({*packages, "shards"}) if f"`{name}/`" not in text] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_target_of_the_makefile_that_the_page_names_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    code = [*blocks_of(page), *re.findall(r"`([^`\n]+)`", prose_of(page))]
    assert {match[1] for line in code if (match := re.match(r"make ([a-z-]+)", line))} <= targets


# What the manual starts, and the package that brings it; the rest is a shell's, a scheduler's, or python -m.
PROGRAMS = {"torchrun": "torch", "ray": "ray", "tensorboard": "tensorboard"}
OF_A_MACHINE = {"python", "make", "for", "done", "export", "source"}
OF_A_SCHEDULER = {"sbatch", "kubectl", "sky"}


def test_every_program_that_the_manual_starts_comes_with_make_install():
    lines = [line for page in MANUAL for line in blocks_of(page)]
    started = {match[1] for line in lines if (match := re.match(r" *([a-z]+) [^ ]", line)) and " -" in line}
    assert PROGRAMS.keys() <= started
    assert started <= PROGRAMS.keys() | OF_A_MACHINE | OF_A_SCHEDULER
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    installed = {re.match(r"[\w-]+", package)[0] for package in needed}
    pinned = {line.split("==")[0] for line in text_of("constraints.txt").splitlines()}
    assert set(PROGRAMS.values()) <= installed & pinned
