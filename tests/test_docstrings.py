"""Public names of the package say what they are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.conftest import REPO

LEAST_SHARE = 0.95
SHAPES = re.compile(r"\([A-Z][A-Za-z]*, ?[^()]*\)")  # such as (N, 3, H, W) in the docstring of a model
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Class(NamedTuple):
    node: ast.ClassDef
    bases: tuple[str, ...]  # names, without their modules
    methods: dict[str, str | None]  # docstrings, with those of properties
    fields: set[str]  # names with a type in the class's body


def test_public_names_have_docstrings():
    """At least 95% of these have one: modules with code, public classes and functions, public methods of such classes.

    A name without a leading underscore is public. Fields and dunder methods are not counted. Nor is what has its
    docstring elsewhere:
    - a method that a base class of the package documents, or a Protocol whose methods the class all has;
    - a property that stands for a field of such a Protocol;
    - `forward`, where the class's docstring tells shapes.
    """
    trees = {path: ast.parse(path.read_text()) for path in sorted((REPO / "mtl_dist").rglob("*.py"))}
    classes = {node.name: read_class(node) for tree in trees.values() for node in public_nodes(tree, ast.ClassDef)}
    names = [name for path, tree in trees.items() for name in counted_names(path, tree, classes)]
    missing = [name for name, docstring in names if not docstring]
    share = 1 - len(missing) / len(names)
    assert len(names) > 500
    assert share >= LEAST_SHARE, f"{share:.1%} of {len(names)} have a docstring; not these:\n" + "\n".join(missing)


def counted_names(path: Path, tree: ast.Module, classes: dict[str, Class]) -> Iterator[tuple[str, str | None]]:
    """Yield (place and name, docstring) of what the rule counts in a module."""
    where = path.relative_to(REPO)
    if tree.body:
        yield f"{where}:1 the module", ast.get_docstring(tree)
    for node in public_nodes(tree, (ast.ClassDef, *FUNCTIONS)):
        yield f"{where}:{node.lineno} {node.name}", ast.get_docstring(node)
    for node in public_nodes(tree, ast.ClassDef):
        for method in public_nodes(node, FUNCTIONS):
            if not is_documented_elsewhere(method.name, read_class(node), classes):
                yield f"{where}:{method.lineno} {node.name}.{method.name}", ast.get_docstring(method)


def is_documented_elsewhere(method: str, owner: Class, classes: dict[str, Class]) -> bool:
    if method == "forward" and SHAPES.search(ast.get_docstring(owner.node) or ""):
        return True
    protocols = [
        other
        for other in classes.values()
        if "Protocol" in other.bases and other.node.name != owner.node.name and set(other.methods) <= set(owner.methods)
    ]
    if any(protocol.methods.get(method) or method in protocol.fields for protocol in protocols):
        return True
    return any(base.methods.get(method) for base in ancestors(owner, classes))


def ancestors(owner: Class, classes: dict[str, Class]) -> Iterator[Class]:
    for name in owner.bases:
        if name in classes:
            yield classes[name]
            yield from ancestors(classes[name], classes)


def read_class(node: ast.ClassDef) -> Class:
    bases = tuple(ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases)
    methods = {method.name: ast.get_docstring(method) for method in public_nodes(node, FUNCTIONS)}
    fields = {entry.target.id for entry in node.body if isinstance(entry, ast.AnnAssign)}
    return Class(node, bases, methods, fields)


def public_nodes(owner: ast.Module | ast.ClassDef, kinds: type | tuple[type, ...]) -> Iterator:
    return (node for node in owner.body if isinstance(node, kinds) and not node.name.startswith("_"))
