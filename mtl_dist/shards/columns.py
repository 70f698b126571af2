"""What the columns and codes of a table mean: `--columns.*`, `--table-format`, `--expressions`."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Literal, NamedTuple

from mtl_dist.errors import InputError, nearest
from mtl_dist.settings import Section
from mtl_dist.tasks import AUS, EXPRESSIONS, MISSING_EXPR, MISSING_VA

MAX_LISTED_CHARS = 600  # of column names in one message
UNLABELLED = "-"  # in `--expressions NAME=-`
NEAR = 0.8  # likeness of two names (difflib) from which one is probably meant by the other


class Columns(Section):
    """Columns by their names in the table's header. A column that is named and not there is an error; '' is none.

    None looks for the usual name, in upper or lower case; for AU1, also AU01 or au_1. Another spelling is taken where
    only one column has it, and a note says so.
    """

    image: str | None = None
    """Path of the image below --images. None: image (affectnet: subDirectory_filePath)."""
    valence: str | None = None
    """None: valence, where there is one."""
    arousal: str | None = None
    """None: arousal, where there is one."""
    expression: str | None = None
    """Codes 0 to 7 in our order, or names. None: expression, where there is one."""
    au: str | None = None
    """Pattern of the action units' columns, such as AU{:02}_c. None: AU{}, where there are some."""
    video: str | None = None
    """Rows of one video stay on one side of --val-fraction. None: video, else the image's directory."""
    person: str | None = None
    """Rows of one person stay on one side of --val-fraction. None: person, where there is one."""
    split: str | None = None
    """train or val; rows of other splits are left out. None: split, where there is one."""


class TableOptions(Section):
    """How a table is read: its columns, and what its values mean."""

    table_format: Literal["plain", "affectnet"] = "plain"
    """affectnet: the columns of AffectNet's lists (a list without a header is read by position), its expression codes
    (mapped by name), VA of -2 missing."""
    images: Path | None = None
    """Directory that the table's image paths start from. None: the table's own directory. Of a WebDataset: where its
    pictures are unpacked to, and stay; None: a temporary directory."""
    val_table: str | None = None
    """A second table of the same columns, or the tars of one: the validation part."""
    name_by_tar: bool = False
    """Of a WebDataset whose keys repeat: put the tar's name in front of them."""
    unlabelled: bool = False
    """SOURCE is a directory of pictures, of one view: each below it, at any depth, is a row without labels. A tenth
    goes to val, whole directories, unless --val-fraction says another share."""
    expressions: tuple[str, ...] = ()
    """What further names or codes of expressions mean, as NAME=CLASS: Contempt=Other; NAME=- is no label."""
    columns: Columns = Columns()


NO_OPTIONS = TableOptions()


class TableFormat(NamedTuple):
    """What is known of one format of tables."""

    columns: dict[str, str]  # by role; "au" is a pattern
    codes: tuple[str, ...]  # names of the expression codes 0, 1, ...
    unlabelled: tuple[str, ...]  # names that are none of our classes, and no error
    missing_va: tuple[float, ...]
    layout: tuple[str, ...] = ()  # columns of a CSV without a header; nothing where it must have one
    texts: tuple[str, ...] = ()  # those of the layout that do not hold numbers

    def is_row(self, cells: list[str]) -> bool:
        """Whether a line is a row of the layout: as many cells, and numbers where numbers belong."""
        return len(cells) == len(self.layout) > 0 and all(
            bool(cell.strip()) if name in self.texts else _is_number(cell) for name, cell in zip(self.layout, cells)
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_PLAIN = {name: name for name in ("image", "valence", "arousal", "expression", "video", "person", "split")}
FORMATS = {
    "plain": TableFormat({**_PLAIN, "au": "AU{}"}, EXPRESSIONS, (), (MISSING_VA,)),
    "affectnet": TableFormat(
        {**_PLAIN, "image": "subDirectory_filePath", "au": ""},
        ("Neutral", "Happy", "Sad", "Surprise", "Fear", "Disgust", "Anger", "Contempt", "None", "Uncertain", "No-Face"),
        ("Contempt", "None", "Uncertain", "No-Face"),
        (-2.0, MISSING_VA),
        layout=(
            *("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height", "facial_landmarks"),
            *("expression", "valence", "arousal"),
        ),
        texts=("subDirectory_filePath", "facial_landmarks"),
    ),
}
SYNONYMS = {
    "Angry": "Anger",
    "Disgusted": "Disgust",
    "Fearful": "Fear",
    "Happy": "Happiness",
    "Sad": "Sadness",
    "Surprised": "Surprise",
}
_CLASS_OF = {name.casefold(): name for name in EXPRESSIONS} | {key.casefold(): name for key, name in SYNONYMS.items()}


class FoundColumns(NamedTuple):
    """The columns of one table, by their names in its header; None (or nothing) where it has none."""

    image: str
    valence: str | None
    arousal: str | None
    expression: str | None
    video: str | None
    person: str | None
    split: str | None
    aus: dict[int, str]  # by FACS number

    def names(self) -> list[str]:
        """Every column that is read, once."""
        single = [name for name in self[:-1] if name is not None]
        return list(dict.fromkeys([*single, *self.aus.values()]))


def find_columns(options: TableOptions, available: list[str], path: Path) -> FoundColumns:
    """Return which column of `available` serves what.

    Raises `InputError` for a named one that is not there, and for one that probably was meant and would be dropped.
    """
    usual = FORMATS[options.table_format].columns
    given = options.columns.model_dump()
    found: dict[str, str | None] = {}
    for role, name in given.items():
        if role == "au":
            continue
        if name and name not in available:
            raise InputError(f"{path} has no column '{name}' (--columns.{role}); {_nearest(name, available)}")
        found[role] = name or None if name is not None else _find_alike(usual[role], available, path, role)
    if found["image"] is None:
        other = ", or say --table-format affectnet" if FORMATS["affectnet"].columns["image"] in available else ""
        raise InputError(
            f"{path} has no column '{usual['image']}' in its first line; {_nearest(usual['image'], available)}; name "
            f"the column of image paths with --columns.image{other}"
        )
    columns = FoundColumns(**found, aus=_find_aus(given["au"], usual["au"], available, path))
    _refuse_near_misses(columns, options, available, path)
    if (columns.valence is None) != (columns.arousal is None):
        there, gone = ("valence", "arousal") if columns.valence else ("arousal", "valence")
        raise InputError(
            f"{path} has {there} (column '{found[there]}') and no {gone}; name its column with --columns.{gone}, or "
            f"leave both out with --columns.{there} ''"
        )
    if columns.valence is None and columns.expression is None and not columns.aus:
        raise InputError(
            f"{path} has no labels: no column valence, arousal, expression or AU1, AU2, ...; "
            f"{_nearest('', available)}; name them with --columns.valence, --columns.expression, --columns.au ..."
        )
    return columns


def _find_aus(given: str | None, usual: str, available: list[str], path: Path) -> dict[int, str]:
    pattern = usual if given is None else given
    if not pattern:
        return {}
    try:
        names = {number: pattern.format(number) for number in AUS}
    except (ValueError, IndexError, KeyError):
        names = {}
    if len(set(names.values())) < len(AUS):
        raise InputError(f"--columns.au is '{pattern}'; expected a pattern with {{}} for the number, such as AU{{}}")
    found = {number: name for number, name in names.items() if name in available}
    if given and not found:
        raise InputError(
            f"{path} has no column '{names[1]}', '{names[2]}', ... (--columns.au {given}); "
            f"{_nearest(names[1], available)}"
        )
    if given is None:
        alike = {number: _find_alike(name, available, path, "au") for number, name in names.items()}
        found = {number: name for number, name in alike.items() if name}
    left = {number: name for number, name in names.items() if number not in found}
    missed = [
        name
        for name in available
        if (_au_number(name) in left if given is None else _plain(name) in map(_plain, left.values()))
    ]
    if missed:
        raise InputError(
            f"{path} has the column(s) {_listed(missed)}, which '{pattern}' does not name, so these labels would be "
            "dropped; name them with --columns.au, such as AU{:02} for AU01 or AU{:02}_c for AU01_c, or leave out what "
            f"is not named so with --columns.au '{usual}' (all action units: '')"
        )
    return found


def _au_number(name: str) -> int | None:
    """Return the number of a column that looks like an action unit's (AU01, au_1, AU01_c), else None."""
    found = re.match(r"au[\s_-]*0*(\d+)(?!\d)", name.casefold())
    return int(found[1]) if found else None


def _find_alike(name: str, available: list[str], path: Path, role: str) -> str | None:
    """Return the column of this name, or the only one whose name differs in case, padding or separators alone."""
    if not name or name in available:
        return name or None
    alike = [other for other in available if _plain(other) == _plain(name)]
    if len(alike) > 1:
        raise InputError(
            f"{path} has the columns {_listed(alike)}, each as much '{name}' as the other; say which with "
            f"--columns.{role}"
        )
    return alike[0] if alike else None


def _plain(name: str) -> str:
    return re.sub(r"(?<!\d)0+(?=\d)", "", re.sub(r"[\s_-]", "", name.casefold()))


def _refuse_near_misses(columns: FoundColumns, options: TableOptions, available: list[str], path: Path) -> None:
    """Raise where a column that nothing reads has nearly the name of one that is not there."""
    unread = [name for name in available if name not in columns.names()]
    usual = FORMATS[options.table_format].columns
    for role, given in options.columns.model_dump().items():
        if role == "au" or given is not None or getattr(columns, role) is not None:
            continue
        near = [name for name in unread if _likeness(name, usual[role]) >= NEAR]
        if near:
            raise InputError(
                f"{path} has no column '{usual[role]}', and a column '{near[0]}', which would be dropped; if it is the "
                f"{role}, say --columns.{role} '{near[0]}', if not --columns.{role} ''"
            )


def _likeness(name: str, other: str) -> float:
    return difflib.SequenceMatcher(None, _plain(name), _plain(other)).ratio()


def describe_columns(columns: FoundColumns, options: TableOptions, available: list[str]) -> str:
    """Say which columns are read as what, and which are not."""
    usual = FORMATS[options.table_format].columns
    read = {role: getattr(columns, role) for role in usual if role != "au"}
    read |= {f"AU{number}": name for number, name in columns.aus.items()}
    same = [name for role, name in read.items() if name and name in (role, usual.get(role))]
    other = [f"'{name}' as {role}" for role, name in read.items() if name and name not in (role, usual.get(role))]
    unread = [name or "''" for name in available if name not in columns.names()]
    return f"columns: {', '.join([*same, *other])}" + (f"; not read: {_cut(', '.join(unread))}" if unread else "")


def _listed(names: list[str]) -> str:
    return _cut(", ".join(f"'{name}'" for name in names))


def _nearest(name: str, available: list[str]) -> str:
    return _cut(nearest(name, available))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LISTED_CHARS else f"{text[:MAX_LISTED_CHARS]} ..."  # some tables have 700 columns


class ExpressionCodes:
    """What an expression in a table means. Built from `--table-format` and `--expressions`; raises `InputError`."""

    def __init__(self, options: TableOptions):
        self.format = FORMATS[options.table_format]
        self.given: dict[str, str] = {}
        for pair in options.expressions:
            name, separator, target = (part.strip() for part in pair.rpartition("="))
            known = UNLABELLED if target == UNLABELLED else _CLASS_OF.get(target.casefold())
            if not separator or not name or known is None:
                raise InputError(
                    f"--expressions has '{pair}'; expected NAME=CLASS with a class of {', '.join(EXPRESSIONS)}, or "
                    f"NAME={UNLABELLED} for no label"
                )
            self.given[name.casefold()] = known

    def parse(self, text: str) -> tuple[int, str | None]:
        """Return (class 0 to 7 or -1, why a value that is there is no label). Raises ValueError: what was expected."""
        name = self._name(text)
        if name is None:
            return MISSING_EXPR, None
        given = self.given.get(text.casefold()) or self.given.get(name.casefold())
        if given == UNLABELLED or (given is None and name in self.format.unlabelled):
            return MISSING_EXPR, name if name == text else f"{name} ({text})"
        known = given or _CLASS_OF.get(name.casefold())
        if known is None:
            codes = f"0 to {len(self.format.codes) - 1}, or {MISSING_EXPR} or nothing where it is missing"
            raise ValueError(
                f"{', '.join(EXPRESSIONS)}, or {codes}; say what it means with --expressions '{text}=Other', or "
                f"'{text}={UNLABELLED}' for no label"
            )
        return EXPRESSIONS.index(known), None

    def _name(self, text: str) -> str | None:
        """Return a code's name, None for the code of a missing one, and other text as it is (formats' spelling)."""
        try:
            code = float(text)
        except ValueError:
            same = (name for name in self.format.unlabelled if name.casefold() == text.casefold())
            return next(same, text)
        if code == MISSING_EXPR:
            return None
        return self.format.codes[int(code)] if code in range(len(self.format.codes)) else text
