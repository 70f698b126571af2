"""JSON and YAML of anyone's: what takes a few bytes and asks for much is an error."""

from __future__ import annotations

import json
from typing import Any

import yaml

from mtl_dist.errors import Damaged

MAX_YAML_BYTES, MAX_YAML_NODES = 1 << 20, 10_000
MAX_KEY = 100  # characters in a message


def parse_json(data: bytes | str) -> Any:
    """Parse JSON, of anyone's. Raises `Damaged` for what is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # of nesting a thousand deep
        raise Damaged(f"not JSON: {error}") from None


def parse_object(data: bytes | str) -> dict[str, Any]:
    """Parse an object of JSON, of anyone's. Raises `Damaged` for what is none."""
    content = parse_json(data)
    if not isinstance(content, dict):
        raise Damaged(f"a JSON {type(content).__name__}, not an object")
    return content


def parse_yaml(data: bytes | str) -> Any:
    """Parse YAML of anyone's. Raises yaml.YAMLError, also for what takes a few bytes and asks for much."""
    try:
        if (count := _count_nodes(yaml.compose(data, yaml.SafeLoader), {})) > MAX_YAML_NODES:
            raise yaml.YAMLError(f"it stands for {count} values, its aliases written out; expected {MAX_YAML_NODES}")
        return yaml.safe_load(data)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep, or holds itself") from None
    except ValueError as error:  # a date, or a number, that is none
        raise yaml.YAMLError(str(error)) from None


def _count_nodes(node: yaml.Node | None, counted: dict[int, int]) -> int:
    """Count values, those behind an alias as often as it is there; one that holds itself is a RecursionError."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counted:
        _check_keys(node)
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        counted[id(node)] = 1 + sum(_count_nodes(part, counted) for part in parts)
    return counted[id(node)]


def _check_keys(node: yaml.CollectionNode) -> None:
    """Raise for a mapping that has a key twice: of two sections of one name, the first would be lost without a word."""
    seen: set[str] = set()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1} has the key '{key.value[:MAX_KEY]}' again")
            seen.add(key.value)
