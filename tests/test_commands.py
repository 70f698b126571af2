"""What is installed beside the package: console scripts that call themselves by their names, a version, a licence."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import EntryPoint

import pytest
import yaml

import mtl_dist
from mtl_dist.errors import run_command
from mtl_dist.training.launch import typed_command
from tests.conftest import REPO

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
SCRIPTS = PROJECT["scripts"]
every_script = pytest.mark.parametrize("name", SCRIPTS)


def start(name: str, *args: str, monkeypatch) -> None:
    """Start a console script as its wrapper in bin/ does."""
    monkeypatch.setattr(sys, "argv", [f"/somewhere/bin/{name}", *args])
    EntryPoint(name, SCRIPTS[name], "console_scripts").load()()


def test_every_command_is_a_script_named_after_its_module():
    files = [*(REPO / "mtl_dist").glob("*/__main__.py"), REPO / "mtl_dist/train.py", *(REPO / "tune").glob("*.py")]
    commands = {path for path in files if "run_command(main" in path.read_text()}
    assert len(commands) == len(SCRIPTS)
    for name, value in SCRIPTS.items():
        module, function = value.split(":")
        assert REPO / f"{module.replace('.', '/')}.py" in commands
        assert name == f"mtl-{module.removesuffix('.__main__').rpartition('.')[2]}"
        assert function == "script"


@every_script
def test_help_names_the_script_that_was_started(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        start(name, "--help", monkeypatch=monkeypatch)
    assert ended.value.code == 0
    usage = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).split()
    assert usage[:2] == ["usage:", name]


@every_script
def test_what_is_refused_points_to_the_scripts_own_help(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        start(name, "--no-such-flag", monkeypatch=monkeypatch)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "python -m" not in said.partition("\n")[0]


@every_script
def test_every_script_tells_its_version(name, monkeypatch, capsys):
    start(name, "--version", monkeypatch=monkeypatch)
    assert capsys.readouterr().out == f"mtl_dist {mtl_dist.__version__}\n"


def test_the_version_is_that_of_a_command_only_in_the_place_of_all_flags(monkeypatch, capsys):
    """What `cluster.local exec 0 -- tool --version` starts has a version of its own."""
    monkeypatch.setattr(sys, "argv", ["local", "exec", "0", "--", "tool", "--version"])
    run_command(lambda: print("ran"))
    assert capsys.readouterr().out == "ran\n"


def test_a_runs_record_of_its_command_is_what_was_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/mtl-train", "--run.name", "a b"])
    assert typed_command() == "mtl-train --run.name 'a b'"
    monkeypatch.setattr(sys, "argv", ["/somewhere/mtl_dist/train.py"])
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "-m", "mtl_dist.train", "--local"])
    assert typed_command() == "python -m mtl_dist.train --local"


def test_version_and_licence_are_the_same_everywhere():
    cited = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert mtl_dist.__version__ == PROJECT["version"] == cited["version"]
    assert f"## [{mtl_dist.__version__}]" in (REPO / "CHANGELOG.md").read_text()
    assert PROJECT["license"] == cited["license"] == "Apache-2.0"
    text = (REPO / PROJECT["license-files"][0]).read_text()
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_citation_has_what_its_format_asks_for():
    """Required keys of Citation File Format 1.2.0, of the file and of what it refers to."""
    cited = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    assert cited["cff-version"] == "1.2.0"
    for reference in cited["references"]:
        assert {"type", "title", "authors"} <= reference.keys()
