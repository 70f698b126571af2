"""The checkpoints that are averaged: found, and known to be of models that are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mtl_dist import storage
from mtl_dist.errors import InputError
from mtl_dist.families import FAMILIES
from mtl_dist.predicting.members import unique_names
from mtl_dist.runs.checkpoint import DIRECTORY, MODEL, newness
from mtl_dist.runs.same_run import differences, weights_name
from mtl_dist.runs.start import BEGAN_FROM
from mtl_dist.runs.weights import Weights, is_export, open_last, open_weights
from mtl_dist.settings import Varies

INPUTS = ("model.", "data.image_size")  # settings that decide what weights mean


class Ingredient(NamedTuple):
    """A checkpoint among those that are averaged."""

    run: str  # that it is of, by a name of its own among the runs of the command
    given: str  # as which it was given
    weights: Weights

    @property
    def name(self) -> str:
        return f"{self.run}, step {self.weights.checkpoint.step}"

    @property
    def sha256(self) -> str:
        """That of its weights."""
        return self.weights.checkpoint.files[MODEL]["sha256"]


def find_ingredients(runs: Sequence[str], last: int | None) -> list[Ingredient]:
    """Find the best checkpoint of every run, or its last ones, oldest first. Raises `InputError` unless all are alike.

    `runs` may hold checkpoints in the place of runs.
    """
    opened = [(uri, weights) for uri in runs for weights in _open(uri, last)]
    run_uris = list(dict.fromkeys(_run_uri(weights) for _, weights in opened))
    names = dict(zip(run_uris, unique_names(run_uris)))
    found = [Ingredient(names[_run_uri(weights)], given, weights) for given, weights in opened]
    for ingredient in found:
        _check_alike(found[0], ingredient)
    for place, ingredient in enumerate(found):
        if same := [other for other in found[:place] if other.sha256 == ingredient.sha256]:
            raise InputError(
                f"{same[0].weights.uri} and {ingredient.weights.uri} are one and the same: their weights have the "
                f"sha256 {ingredient.sha256[:12]}; name them once"
            )
    return found


def newest_of(ingredients: Sequence[Ingredient]) -> Ingredient:
    """Return the ingredient of the highest step, of one step that of the later start: whose configuration counts."""
    return max(ingredients, key=lambda one: (one.weights.checkpoint.step, *newness(one.weights.checkpoint)))


def find_notes(ingredients: Sequence[Ingredient], last: int | None) -> list[str]:
    """Say what speaks against averaging these."""
    trained_on = {one.weights.train_sha256 for one in ingredients}
    notes = [_note_gaps(ingredients, last), _note_starts(ingredients)]
    if len(trained_on) > 1:
        notes.append(
            f"the runs were trained on {len(trained_on)} different training sets; BatchNorm's statistics, if any, are "
            f"those of {newest_of(ingredients).run}'s"
        )
    return [note for note in notes if note]


def _open(uri: str, last: int | None) -> list[Weights]:
    uri = uri.rstrip("/")
    if is_export(uri):
        raise InputError(f"{uri} is an export, which does not say how it was trained; name the run that it came from")
    if last is None:
        return [open_weights(uri)]
    if DIRECTORY.fullmatch(uri.rpartition("/")[2]):
        raise InputError(f"--last is of runs, and {uri} is a checkpoint; name its run, or leave out --last")
    return open_last(uri, last)


def _run_uri(weights: Weights) -> str:
    """Return where the run of a checkpoint is; of one that lies elsewhere, where that is."""
    uri = storage.absolute(weights.uri)
    return uri.rpartition("/checkpoints/")[0] or uri


def _check_alike(first: Ingredient, other: Ingredient) -> None:
    """Raise `InputError` where weights mean something else. Classes were checked when they were opened."""
    mine, theirs = first.weights, other.weights
    if (objective := FAMILIES[theirs.config.model.name].objective) != "affect":
        raise InputError(
            f"{other.given} is {FAMILIES[theirs.config.model.name].what}, trained for {objective}; expected models "
            "that predict labels, which a mean can be scored by"
        )
    remedy = "the mean of their weights is no model; give runs that are alike in this, or python -m mtl_dist.ensemble"
    if mine.view != theirs.view:
        raise InputError(f"{first.given} is of view '{mine.view}', and {other.given} of '{theirs.view}': {remedy}")
    unlike = differences(theirs.state, mine.config, Varies.BY_RUN)
    if unlike := {key: pair for key, pair in unlike.items() if key.startswith(INPUTS)}:
        pairs = "; ".join(f"{key} is {own!r} of {first.given} and {its!r} of {other.given}"
                          for key, (its, own) in unlike.items())  # fmt: skip
        raise InputError(f"{pairs}: {remedy}")
    if [each.identity for each in mine.extractors] != [each.identity for each in theirs.extractors]:
        made_by = [", ".join(each.name for each in one.extractors) or "none" for one in (mine, theirs)]
        raise InputError(
            f"{first.given} was trained on features of {made_by[0]}, and {other.given} of {made_by[1]}: {remedy}"
        )
    if mine.identity.get("validation set") != theirs.identity.get("validation set"):
        raise InputError(
            f"{first.given} and {other.given} were scored on different validation sets (sha256 "
            f"{mine.identity.get('validation set')} and {theirs.identity.get('validation set')}): what one was scored "
            "on, the other may have been trained on; give runs of one data.val"
        )


def _note_gaps(ingredients: Sequence[Ingredient], last: int | None) -> str:
    """Say where the last checkpoints that are kept are not the last that were saved."""
    newest = newest_of(ingredients)
    if last is None or last <= (kept := newest.weights.config.checkpoint.keep_last):
        return ""
    steps = ", ".join(str(one.weights.checkpoint.step) for one in ingredients if one.run == newest.run)
    return (
        f"{newest.run} kept its last {kept}, and older checkpoints for a score they were best at: the last {last} are "
        f"of steps {steps}, with gaps between; train with --checkpoint.keep-last {last} to keep all"
    )


def _note_starts(ingredients: Sequence[Ingredient]) -> str:
    """Say where runs did not begin with the same weights, as far as their checkpoints tell."""
    starts = {one.run: _start_of(one.weights) for one in ingredients}
    backbones, heads = (set(column) for column in zip(*starts.values()))
    told = "; ".join(f"{run} with {backbone}" + (f", heads of {head}" if head != backbone else "")
                     for run, (backbone, head) in starts.items())  # fmt: skip
    if len(backbones) > 1:
        return (
            f"the runs did not begin with the same weights ({told}): averaging weights of runs from different "
            "initialisations usually does not work; look whether the score falls"
        )
    if len(heads) > 1:
        return (
            f"the runs began with one backbone, but with other random heads ({told}): averaging works best where all "
            "weights began alike, as with one --run.seed or --run.start-with model; look whether the score falls"
        )
    return ""


def _start_of(weights: Weights) -> tuple[str, str]:
    """Return what a run's backbone began with, and its heads."""
    config, note = weights.config, weights.state.get(BEGAN_FROM)
    seed = f"random weights of seed {config.run.seed}"
    if not note:
        given = config.model.weights
        return (seed, seed) if given == "none" else (weights_name(given), seed)
    began = f"weights of sha256 {note['sha256'][:12]}" if note.get("sha256") else weights_name(note["uri"])
    return began, seed if note["with"] == "backbone" else began
