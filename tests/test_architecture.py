"""The conventions of the code that a machine can check: who imports whom, how files are called, how long they are."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import REPO

PACKAGES = ("mtl_dist", "tune", "cluster", "benchmarks")
FILES = [path for package in PACKAGES for path in sorted((REPO / package).rglob("*.py"))]

# From the bottom up. A module imports from layers below its own, and from its own package.
LAYERS = [
    {"mtl_dist.tasks", "mtl_dist.errors", "mtl_dist.threads", "mtl_dist.spans"},
    {"mtl_dist.parsing", "mtl_dist.timeline", "mtl_dist.processes", "mtl_dist.label_counts"},
    {"mtl_dist.families", "mtl_dist.s3", "mtl_dist.sealed", "mtl_dist.machine", "mtl_dist.ranks", "mtl_dist.joining"},
    {"mtl_dist.storage", "mtl_dist.progress"},
    {"mtl_dist.settings"},
    {"mtl_dist.model_config"},
    {"mtl_dist.sections"},
    {"mtl_dist.clashes"},
    {"mtl_dist.config"},
    {"mtl_dist.unread"},
    {"mtl_dist.presets", "mtl_dist.device", "mtl_dist.batchnorm", "mtl_dist.transfer", "mtl_dist.constants"},
    {"mtl_dist.data", "mtl_dist.models", "mtl_dist.objective"},
    {"mtl_dist.faces"},
    {"mtl_dist.shards"},
    {"mtl_dist.synthetic"},
    {"mtl_dist.runs"},
    {"mtl_dist.predicting"},
    {"mtl_dist.training"},
    {"mtl_dist.ensemble", "mtl_dist.export", "mtl_dist.report", "mtl_dist.features"},
    {"mtl_dist.train", "mtl_dist.predict", "mtl_dist.prepare", "mtl_dist.soup", "mtl_dist.shards.__main__"},
    {"mtl_dist.api"},
    {"tune", "cluster"},
    {"benchmarks"},
]
LAYER_OF = {unit: number for number, units in enumerate(LAYERS) for unit in units}

# A library and the only places that import it.
ONLY_IMPORTERS = {
    "boto3": ("mtl_dist.s3", "cluster", "benchmarks"),
    "botocore": ("mtl_dist.s3", "cluster", "benchmarks"),
    "deepspeed": ("mtl_dist.training.engine",),
    "ray": (
        "mtl_dist.joining",
        "mtl_dist.training.launch",
        "mtl_dist.training.stopping",
        "mtl_dist.predicting.cluster",
        "tune",
        "cluster",
    ),
    "mlflow": ("mtl_dist.training.sinks.mlflow",),
    "wandb": ("mtl_dist.training.sinks.wandb",),
    "pickle": ("tune.search",),  # for the name of an exception, which Ray's reading of its own state raises
    "concurrent.futures.ProcessPoolExecutor": ("mtl_dist.processes",),  # whose processes end with their parent
    "multiprocessing": ("mtl_dist.processes", "mtl_dist.predicting.spread"),
    "subprocess": ("cluster", "benchmarks"),
}
DRAWERS = {"utils", "util", "common", "helpers", "misc", "core", "base"}
MAX_LINES = 450
LONGER: dict[str, int] = {}  # none, so far


class Import(NamedTuple):
    importer: str
    imported: str
    line: int


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_imports(path: Path) -> list[Import]:
    """Every import of a file, those inside functions and under TYPE_CHECKING too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [Import(module_name(path), name, node.lineno) for name in names]
    return found


IMPORTS = [found for path in FILES for found in read_imports(path)]


def unit_of(name: str) -> str | None:
    """The unit of `LAYERS` a module, or a name in it, belongs to; None for libraries."""
    units = [unit for unit in LAYER_OF if name == unit or name.startswith(f"{unit}.")]
    return max(units, key=len, default=None)


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_there_is_something_to_check():
    assert len(FILES) > 30
    assert any(unit_of(found.imported) == "mtl_dist.data" for found in IMPORTS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPO)))
def test_a_module_has_its_place_in_the_layers(path):
    name = module_name(path)
    assert unit_of(name) or name == "mtl_dist", f"{name}: give it a place in LAYERS"


def test_imports_point_down_only():
    wrong = []
    for found in IMPORTS:
        if found.importer == "mtl_dist" and is_within(found.imported, ("mtl_dist.api",)):
            continue  # the package offers it, once it is asked for
        here, there = unit_of(found.importer), unit_of(found.imported)
        if there and here != there and not (here and LAYER_OF[here] > LAYER_OF[there]):
            wrong.append(f"{found.importer}:{found.line} imports {found.imported}")
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    """Not inside functions and for types alone either: who reads one of the circle has to read them all."""
    modules = {module_name(path) for path in FILES}
    imported: dict[str, set[str]] = {module: set() for module in modules}
    for found in IMPORTS:
        parts = found.imported.split(".")
        names = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
        # A package comes with its modules; to its own modules that is no import.
        imported[found.importer] |= {name for name in modules & names if not is_within(found.importer, (name,))}
    try:
        graphlib.TopologicalSorter(imported).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("library", ONLY_IMPORTERS)
def test_a_library_is_imported_in_its_place_only(library):
    wrong = [
        f"{found.importer}:{found.line}"
        for found in IMPORTS
        if is_within(found.imported, (library,)) and not is_within(found.importer, ONLY_IMPORTERS[library])
    ]
    assert wrong == []


def test_no_command_starts_processes_itself():
    """They could not find its functions: a package's __main__ is not imported again in a process that is spawned."""
    commands = [found for found in IMPORTS if found.imported.startswith("mtl_dist.processes.")]
    assert commands
    assert [found.importer for found in commands if found.importer.endswith("__main__")] == []


def test_no_import_hides_in_a_string():
    """`importlib` and `__import__` would pass by the tests above. The classes of families are named in a table."""
    hidden = ("importlib.import_module", "pkgutil.resolve_name")
    assert {found.importer for found in IMPORTS if is_within(found.imported, hidden)} == {
        "mtl_dist.models",
        "mtl_dist.objective.module",
        "mtl_dist.data.augment",
    }
    for path in FILES:
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not {"__import__", "eval", "exec"} & {call.id for call in calls if isinstance(call, ast.Name)}, path


def test_no_file_is_a_drawer():
    assert [path for path in FILES if path.stem in DRAWERS or path.parent.name in DRAWERS] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPO)))
def test_a_file_has_one_topic(path):
    limit = LONGER.get(str(path.relative_to(REPO)), MAX_LINES)
    assert len(path.read_text().splitlines()) <= limit


def test_exceptions_to_the_length_are_still_needed():
    for name in LONGER:
        assert len((REPO / name).read_text().splitlines()) > MAX_LINES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPO)))
def test_a_file_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body
