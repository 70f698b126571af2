"""What every tree of settings can do: check itself, merge, turn flat and back, and say what may change where.

The tree itself is `config.py`.
"""

from __future__ import annotations

import enum
import json
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, field_validator

from mtl_dist.errors import InputError, nearest

MAX_SHOWN = 200  # characters of a value in a message
MAX_PARTS = 8  # of a dotted key: more are those of no setting
MAX_FOLDS = 1000
ALTERNATIVES = {"literal['auto']", "constrained-int"}  # pydantic's names of what a value may be either of


class Varies(enum.IntEnum):
    """Where a setting may have another value; its field says so. What varies at a level may at those before it, too."""

    BY_RUN = 1  # in a run that begins with everything of another
    BY_PART = 2  # in another part of a run: it moves or times the work, and leaves its result
    BY_RANK = 3  # on another rank of a run: where a node has what it reads, and how it reads


class Section(BaseModel):
    """Settings under one name; unknown ones are refused. Raises `InputError` with a line a fault."""

    # Every number has a least and a most: what is beyond is a slip, and what is no number is compared with nothing.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_boolean(cls, value: Any, about: pydantic.ValidationInfo) -> Any:
        values = value if isinstance(value, list | tuple) else [value]
        if cls.model_fields[about.field_name].annotation is not bool and any(isinstance(v, bool) for v in values):
            raise ValueError("expected no yes or no here")  # pydantic takes true for 1
        return value

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            # One line a fault: pydantic's own text is for programmers, and the command line shows what is raised here.
            raise Faults(find_faults(error)) from None


class Faults(InputError):
    """What is wrong with a section, a line a fault: a section above puts its name before each."""

    def __init__(self, lines: list[str]):
        super().__init__("; ".join(lines))
        self.lines = lines

    def __reduce__(self):
        return Faults, (self.lines,)  # another process makes it anew of these


def _check_name(name: str) -> str:
    if not name or name in (".", "..") or not all(c.isalnum() or c in "-_." for c in name):
        raise ValueError("a name is letters, digits, '-', '_' and '.'")
    return name


Name = Annotated[str, AfterValidator(_check_name)]  # that becomes one part of a path


def parse_fold(fold: str) -> tuple[int, int]:
    """Return the number, from 1, of a fold that is written as K/N, and how many there are. Raises `ValueError`."""
    number, slash, count = fold.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise ValueError("expected K/N, such as 2/5: the second of five folds")
    if not (1 <= int(number) <= int(count) and 2 <= int(count) <= MAX_FOLDS):
        raise ValueError(f"expected K/N with K from 1 to N, and N from 2 to {MAX_FOLDS}")
    return int(number), int(count)


def _check_fold(fold: str) -> str:
    return "{}/{}".format(*parse_fold(fold)) if fold else ""


Fold = Annotated[str, AfterValidator(_check_fold)]  # K/N; empty: none


def explain_validation(error: pydantic.ValidationError) -> str:
    """Write a pydantic error as one line."""
    return "; ".join(find_faults(error))


def find_faults(error: pydantic.ValidationError) -> list[str]:
    """Write a pydantic error as one line a fault: dotted path, value, what was expected."""
    lines: list[str] = []
    expected: dict[str, list[str]] = {}  # what a value may be: one of these
    for fault in error.errors():
        path = ".".join(str(part) for part in fault["loc"] if part not in ALTERNATIVES)
        message = fault["msg"].removeprefix("Value error, ")
        below = fault.get("ctx", {}).get("error")
        if isinstance(below, InputError):  # of a section below: it names its key itself
            lines += [f"{path}.{line}" for line in (below.lines if isinstance(below, Faults) else [str(below)])]
            continue
        shown = repr(fault["input"])[:MAX_SHOWN]
        value = "" if not path or isinstance(fault["input"], dict | BaseModel) else f" is {shown}"
        expected.setdefault(f"{path}{value}: " if path else "", []).append(message)
    return [*lines, *(f"{what}{', or '.join(messages)}" for what, messages in expected.items())]


def check_keys(layer: dict[str, Any], model: type[BaseModel], path: str) -> None:
    """Raise `InputError` for a key of nested dicts that `model` has no setting for, with the nearest that it has."""
    for key, value in layer.items():
        if key not in model.model_fields:
            known = [f"{path}{name}" for name in model.model_fields]
            raise InputError(f"unknown configuration key '{path}{key}': {nearest(f'{path}{key}', known)}")
        annotation = model.model_fields[key].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if not isinstance(value, dict):
                raise InputError(
                    f"configuration section '{path}{key}' is {value!r}; expected a mapping of its settings"
                )
            check_keys(value, annotation, f"{path}{key}.")


def merge(target: dict[str, Any], layer: dict[str, Any]) -> None:
    """Put the values of a nested dict into another, in place."""
    for key, value in layer.items():
        if isinstance(value, dict):
            if not isinstance(target.get(key), dict):  # a section that was given as a plain value: the later one wins
                target[key] = {}
            merge(target[key], value)
        else:
            target[key] = value


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested dicts: {"optim.lr": 1} -> {"optim": {"lr": 1}}."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        if len(parts := str(key).split(".")) > MAX_PARTS:
            raise InputError(f"unknown configuration key '{str(key)[:MAX_SHOWN]}' of {len(parts)} parts")
        for part in reversed(parts):
            value = {part: value}
        merge(nested, value)
    return nested


def flatten(config: Section) -> dict[str, Any]:
    """Return {dotted path: JSON value} of every setting."""
    return _flatten(json.loads(config.model_dump_json()), "")


def _flatten(tree: dict[str, Any], path: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return flat


def dump_yaml(config: Section) -> str:
    """Write the configuration as YAML that `--config` reads."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)


def varying(section: type[BaseModel], level: Varies, path: str = "") -> frozenset[str]:
    """Return the dotted paths of the settings that may have another value at this level."""
    paths: set[str] = set()
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            paths |= varying(field.annotation, level, f"{path}{name}.")
        elif any(isinstance(mark, Varies) and mark >= level for mark in field.metadata):
            paths.add(f"{path}{name}")
    return frozenset(paths)
