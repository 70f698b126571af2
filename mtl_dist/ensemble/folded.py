"""Runs that each held out a fold of the same videos: together one member, which predicts every row out of fold."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mtl_dist.config import Config
from mtl_dist.errors import InputError
from mtl_dist.objective.affect import PredictedRows
from mtl_dist.predicting.members import Member, unique_names
from mtl_dist.predicting.predictions import PredictionTable
from mtl_dist.settings import Varies, flatten, parse_fold, varying

# What the runs of a member need not have alike, beside what never changes a result; the second may begin with runs of
# its fold each.
OWN = frozenset({"run.name", "data.fold"})
BEGINNINGS = frozenset({"run.start", "model.weights"})
MAX_LISTED = 5  # settings in one message

Groups = dict[str, tuple[str, ...]]  # members by name, each with the names of its runs, by fold where there are several


def group_members(runs: Mapping[str, Member], *, taken: tuple[str, ...]) -> Groups:
    """Put the runs of folds 1/N to N/N of the same sets together that differ in nothing else; other runs stand alone.

    Runs that began with different ones are put together where no others would do. Raises `InputError` for a fold that
    is missing, or that two runs have.
    """
    folded = [name for name, member in runs.items() if member.fold]  # all or none, as `check_members` sees to
    if not folded:
        return {name: (name,) for name in runs}
    found, left = [], folded
    for free in (OWN, OWN | BEGINNINGS):
        groups = _alike(left, key=lambda name, free=free: _kind(runs[name], free))
        whole = [group for group in groups if _is_whole(group, runs)]
        found += whole
        left = [name for group in groups if group not in whole for name in group]
    if left:
        raise _not_whole(_alike(left, key=lambda name: _kind(runs[name], OWN | BEGINNINGS)), runs)
    by_fold = [tuple(sorted(group, key=lambda name: parse_fold(runs[name].fold))) for group in found]
    by_fold.sort(key=lambda group: min(map(folded.index, group)))  # in the order in which they were given
    return dict(zip(unique_names([_stem(group) for group in by_fold], taken=taken), by_fold))


def join_tables(tables: Sequence[PredictionTable], *, rows: int) -> PredictionTable:
    """Put what runs predicted of their folds together, rows in ascending order; one table stays as it is.

    Raises `InputError` unless these are as many `rows`, each once.
    """
    if len(tables) == 1:
        return tables[0]
    numbers = np.concatenate([table.predicted.rows for table in tables])
    if len(np.unique(numbers)) != len(numbers) or len(numbers) != rows:
        raise InputError(
            f"the folds hold {len(numbers)} rows, {len(np.unique(numbers))} different ones, and their sets {rows}: "
            "they do not part the sets; train the runs again on sets that are the same"
        )
    order = np.argsort(numbers)
    predictions, targets = (
        type(parts[0])(*(np.concatenate(columns)[order] for columns in zip(*parts)))
        for parts in zip(*((table.predicted.predictions, table.predicted.targets) for table in tables))
    )
    images, videos = ([name for table in tables for name in getattr(table, kind)] for kind in ("images", "videos"))
    return PredictionTable(
        PredictedRows(numbers[order], predictions, targets),
        [images[place] for place in order],
        [videos[place] for place in order],
    )


def _stem(names: Sequence[str]) -> str:
    """Return what names begin with alike; the first of them where that is nothing."""
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names))
    return "".join(letters[0] for letters in alike).rstrip("-_.") or names[0]


def _alike(names: Iterable[str], *, key: Callable[[str], Any]) -> list[list[str]]:
    groups: list[tuple[Any, list[str]]] = []
    for name in names:
        own = key(name)
        for known, group in groups:
            if known == own:
                group.append(name)
                break
        else:
            groups.append((own, [name]))
    return [group for _, group in groups]


def _kind(member: Member, free: frozenset[str]) -> tuple[Any, ...]:
    """Return what must be equal for runs to be of one member."""
    return member.num_folds, member.val.view, member.val.whole.origin, _settings(member, free)


def _settings(member: Member, free: frozenset[str]) -> dict[str, Any]:
    free |= varying(Config, Varies.BY_PART)
    return {name: value for name, value in flatten(member.weights.config).items() if name not in free}


def _is_whole(group: list[str], runs: Mapping[str, Member]) -> bool:
    """Whether these are runs of all folds, one each."""
    return sorted(parse_fold(runs[name].fold)[0] for name in group) == [*range(1, runs[group[0]].num_folds + 1)]


def _not_whole(groups: list[list[str]], runs: Mapping[str, Member]) -> InputError:
    """Say what is wrong with the first group, and what tells another run from it that is of the fold that it lacks."""
    group, *others = groups
    first, uris = runs[group[0]], {name: runs[name].run_uri for name in group}
    of_fold: dict[str, list[str]] = {}
    for name in group:
        of_fold.setdefault(runs[name].fold, []).append(uris[name])
    told = ", ".join(f"{uri} of {runs[name].fold}" for name, uri in uris.items())
    if doubled := next((fold for fold, names in of_fold.items() if len(names) > 1), None):
        return InputError(
            f"{' and '.join(of_fold[doubled])} are all of fold {doubled} of {first.val.whole}, with the same settings: "
            "its rows would be predicted more than once; name one of them"
        )
    missing = [f for n in range(1, first.num_folds + 1) if (f := f"{n}/{first.num_folds}") not in of_fold]
    for name in (name for other in others for name in other):
        if runs[name].fold in missing:
            return InputError(
                f"{told}, and {runs[name].run_uri} of {runs[name].fold}, are not of one member: "
                f"{_differences(first, runs[name])}; give runs of all folds that differ in nothing but the fold"
            )
    return InputError(
        f"{told}: there is no run of fold {' and '.join(missing)} of {first.val.whole}, so its rows are not predicted; "
        "name the runs of all folds in --runs"
    )


def _differences(one: Member, other: Member) -> str:
    """Say in what two runs of folds differ."""
    if one.val.view != other.val.view:
        return f"they are of {one.val.view} and {other.val.view}"
    if one.val.whole.origin != other.val.whole.origin:
        return f"they were trained on {one.val.whole} and on {other.val.whole}"
    mine, theirs = (_settings(member, OWN | BEGINNINGS) for member in (one, other))
    unlike = [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
    told = [f"{key} is {mine.get(key)!r} and {theirs.get(key)!r}" for key in unlike[:MAX_LISTED]]
    return ", ".join(told)
