"""What a report compares: runs, ensembles and the constant predictor, each with its predictions of one validation set.

Runs that differ in nothing but their seed are one method. They may have begun with runs that differ in theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mtl_dist import storage
from mtl_dist.config import Config
from mtl_dist.data.index import Index
from mtl_dist.errors import Damaged, InputError, StorageError
from mtl_dist.families import FAMILIES
from mtl_dist.label_counts import LabelCounts
from mtl_dist.objective.affect import PredictedRows
from mtl_dist.objective.metrics import AU_THRESHOLD, MetricSums, Predictions, Targets, metric_sums
from mtl_dist.objective.scores import FIRST, constant_scores, scores
from mtl_dist.predicting.members import Member, predict_member, row_names, unique_names
from mtl_dist.predicting.predictions import check_finite, prediction_table, read_key, read_predictions, write_parquet
from mtl_dist.runs.checkpoint import DIRECTORY, MODEL
from mtl_dist.runs.same_run import NAMING_WEIGHTS
from mtl_dist.runs.weights import Weights, open_weights
from mtl_dist.sealed import unseal
from mtl_dist.sections import EMA
from mtl_dist.settings import Varies, flatten, varying
from mtl_dist.tasks import AUS, NUM_AUS, NUM_EXPRESSIONS

CONSTANT, ENSEMBLE, CALIBRATED = "constant predictor", "ensemble", "ensemble, calibrated"
TOLERANCE = 1e-3  # of P: tables hold float32
CACHE_FORMAT = "mtl_dist-report-1"
ALL = slice(None)
# Of score.json, before it was sealed.
SCORE_KEYS = ("p", "p_calibrated", "covers", "scores", "steps", "calibration", "members", "rows", "test", "options")
TRAINING_SET = "training set"  # what settings call the checksum of its index
# Options of an ensemble that make it another method, and what those had that were made before there was the option.
COMBINING = {"steps": None, "calibrate": "all", "folds": None, "half_windows": None}


class Result(NamedTuple):
    """Something that predicts the validation set: a run's best checkpoint, an ensemble, the constant predictor."""

    name: str
    uri: str
    method: str
    predicted: PredictedRows
    scores: dict[str, Any]
    member: Member | None = None  # of a run
    score_file: dict[str, Any] | None = None  # of an ensemble
    decided: np.ndarray | None = None  # (n, 12) bool: AUs as the ensemble's fitted thresholds decide; None: above 0.5

    @property
    def seed(self) -> int | None:
        """The run's seed; None for what is no single run."""
        return self.member.weights.config.run.seed if self.member else None

    @property
    def au_on(self) -> np.ndarray:
        """(n, 12) bool: which AUs are predicted."""
        return self.predicted.predictions.au > AU_THRESHOLD if self.decided is None else self.decided

    def sums(self, rows: np.ndarray | slice = ALL) -> MetricSums:
        """The metric sums over rows, by default all."""
        predictions, targets = (type(part)(*(a[rows] for a in part)) for part in self.predicted[1:])
        return metric_sums(predictions._replace(au=self.au_on[rows].astype(np.float64)), targets)


class Method(NamedTuple):
    """A row of the tables: one result, or one a seed."""

    label: str
    results: tuple[Result, ...]

    @property
    def shown(self) -> Result:
        """The result of the median P: what figures of one result show."""
        ranked = sorted(self.results, key=lambda result: FIRST.sign * result.scores[FIRST.key])
        return ranked[(len(self.results) - 1) // 2]

    @property
    def kind(self) -> str | None:
        """CONSTANT, ENSEMBLE or CALIBRATED, whatever name is added to it; None of runs."""
        kinds = (CONSTANT, ENSEMBLE, CALIBRATED)
        return next((kind for kind in kinds if self.label == kind or self.label.startswith(f"{kind} ")), None)

    def values(self, key: str) -> list[float]:
        """A score of every result that has it; empty where there are no labels."""
        return [result.scores[key] for result in self.results if result.scores.get(key) is not None]


def check_same_data(members: list[Member]) -> None:
    """Raise `InputError` unless all runs were scored on the same rows of one source."""
    first = members[0]
    for other in members[1:]:
        if other.val.source_sha256 != first.val.source_sha256:
            raise _other_data(first, other, "come from different sources, or from other choices of rows")
    for place, member in enumerate(members):
        same_view = next(known for known in members[: place + 1] if known.val.view == member.val.view)
        if member.val.origin != same_view.val.origin:
            raise _other_data(same_view, member, "have different checksums")


def _other_data(one: Member, other: Member, how: str) -> InputError:
    return InputError(
        f"runs {one.run_uri} ({one.val}, sha256 {one.val.sha256[:12]}) and {other.run_uri} ({other.val}, "
        f"sha256 {other.val.sha256[:12]}) cannot be compared: their validation sets {how}; report them apart"
    )


def label_runs(members: list[Member]) -> list[str]:
    """Name the method of every run: its model, its view where that tells methods apart, and its name where settings do.

    Runs with equal labels learnt from the same set, and differ in their seed only, or that of the run they began with.
    """
    views: dict[str, set[str]] = {}
    for member in members:
        views.setdefault(member.weights.config.model.name, set()).add(member.val.view)
    plain = []
    for member in members:
        name, view = member.weights.config.model.name, member.val.view
        label = FAMILIES[name].title
        plain.append(f"{label} {view.replace('_', ' ')}" if name == "a" or len(views[name]) > 1 else label)
    settings = [_settings(member.weights) for member in members]
    names = unique_names([member.run_uri for member in members])
    seeds = [member.weights.config.run.seed for member in members]
    labels = []
    for place, label in enumerate(plain):
        alike = [other for other, known in enumerate(plain) if known == label]
        same = [other for other in alike if settings[other] == settings[place]]
        are_seeds = len({seeds[other] for other in same}) == len(same)
        if len(same) < len(alike) and are_seeds:  # other settings: the group is named after its first run
            label = f"{label}, {names[same[0]]}"
        elif not are_seeds:
            label = f"{label}, {names[place]}"
        labels.append(label)
    return labels


def _settings(weights: Weights) -> dict[str, Any]:
    """Return what makes runs one method: settings but for name and seed, and likewise those of where they began."""
    config = flatten(weights.config)
    free = {*varying(Config, Varies.BY_PART), "run.name", "run.seed"}
    own = {key: _origin(value) if key in NAMING_WEIGHTS else value for key, value in config.items() if key not in free}
    return own | {TRAINING_SET: weights.train_sha256, "epochs": weights.config.last_epoch}


def _origin(uri: str) -> Any:
    """Return the settings of the run that another began with; its URI where it is no whole run, or gone."""
    if uri in ("", "none", "imagenet", EMA) or DIRECTORY.fullmatch(uri.rstrip("/").rpartition("/")[2]):
        return uri
    try:
        weights = open_weights(uri)
    except (InputError, StorageError):
        return uri
    return _settings(weights) if weights.state else uri  # an export does not say how it was trained


def predict_run(
    member: Member,
    name: str,
    *,
    data_uri: str,
    device: torch.device,
    batch: int,
    workers: int,
    cache_dir: Path | None,
    progress: Callable[[int], None],
) -> PredictedRows:
    """Predict a run's validation set, or read `data_uri`/<name>.parquet where its key says that it holds just that."""
    where = storage.join(data_uri, f"{name}.parquet")
    key = f"{CACHE_FORMAT} weights {member.weights.checkpoint.files[MODEL]['sha256']} rows {member.val.sha256}"
    if read_key(where) == key:
        progress(member.val.rows)
        return read_predictions(where).predicted
    predicted = predict_member(
        member, device=device, batch=batch, workers=workers, cache_dir=cache_dir, progress=progress
    )
    names = row_names(member, cache_dir)
    check_finite(predicted.predictions, names.images, source=member.weights.uri)
    table = prediction_table(predicted, names.images, labels=True, videos=names.videos)
    write_parquet(where, table, key=key)
    return read_predictions(where).predicted  # as the next report will read it


def run_result(member: Member, name: str, label: str, predicted: PredictedRows) -> Result:
    """Score a run's predictions."""
    return Result(name, member.run_uri, label, predicted, _scores(predicted), member=member)


def open_ensemble(uri: str, members: list[Member], images: list[str]) -> list[Result]:
    """Read what `mtl_dist.ensemble` wrote: the plain mean and, where steps were fitted, the calibrated out of fold.

    Raises `InputError` where it is of another validation set than the runs.
    """
    where = storage.join(uri, "score.json")
    try:
        about = unseal(storage.read_bytes(where), unsealed=SCORE_KEYS)
        shas = {(m["view"], m["validation_set"]["sha256"]) for m in about["members"]}
        plain, steps = about["scores"][ENSEMBLE], about.get("steps") or {}
    except FileNotFoundError:
        raise InputError(f"no ensemble at '{uri}': score.json does not exist; run mtl_dist.ensemble first") from None
    except (Damaged, KeyError, TypeError) as error:
        raise InputError(f"{where} is not what mtl_dist.ensemble writes ({error!r}); run it again") from None
    known = {member.val.view: member for member in members}
    for view, sha256 in sorted(shas):
        if view in known and known[view].val.sha256 != sha256:
            raise InputError(
                f"ensemble {uri} was scored on another {view} validation set (sha256 {sha256[:12]}) than run "
                f"{known[view].run_uri} (sha256 {known[view].val.sha256[:12]}); report them apart"
            )
    found = [_read_ensemble(uri, "predictions.parquet", ENSEMBLE, plain, about=about)]
    if steps:
        found.append(_read_ensemble(uri, "calibrated.parquet", CALIBRATED, list(steps.values())[-1]))
    for result, names in found:
        if names != images or _counts(result.predicted.targets) != _comparable(members[0].val):
            raise InputError(
                f"ensemble {uri} holds other rows or labels than the validation set of run {members[0].run_uri} "
                f"({len(names)} and {len(images)} rows); report them apart"
            )
    return [result for result, _ in found]


def label_ensembles(ensembles: list[list[Result]], members: list[Member], labels: list[str]) -> list[Result]:
    """Name the methods of ensembles: those are one that combine members of the same methods in the same way.

    Where there are several, each is named after its first. `labels` are those of the reported runs, `members`; of runs
    that are not reported the view is all that is known.
    """
    by_uri = {member.run_uri: label for member, label in zip(members, labels)}
    settings = [_combination(parts[0].score_file, members, by_uri) for parts in ensembles]
    if all(own == settings[0] for own in settings):
        return [result for parts in ensembles for result in parts]
    firsts = [ensembles[settings.index(own)][0].name for own in settings]
    return [r._replace(method=f"{r.method} {first}") for parts, first in zip(ensembles, firsts) for r in parts]


def _combination(about: dict[str, Any], members: list[Member], labels: dict[str, str]) -> tuple:
    runs = [(taken["view"], find_run(taken.get("run"), members)) for taken in about["members"]]
    options = about.get("options") or {}
    combined = sorted((view, labels[run.run_uri] if run else "") for view, run in runs)
    return combined, list(about.get("steps") or ()), [options.get(name, before) for name, before in COMBINING.items()]


def find_run(uri: str | None, members: list[Member]) -> Member | None:
    """Return the reported run of a URI or, where the storage was moved since, the only one of its name."""
    if not uri:
        return None
    where = storage.join(storage.absolute(uri))
    same = [member for member in members if storage.join(storage.absolute(member.run_uri)) == where]
    found = same or [member for member in members if _last_part(member.run_uri) == _last_part(where)]
    return found[0] if len(found) == 1 else None


def stale_members(about: dict[str, Any], members: list[Member]) -> list[str]:
    """Return the reported runs of which an ensemble took another checkpoint than the best of now."""
    taken = [(find_run(of.get("run"), members), of.get("checkpoint")) for of in about["members"]]
    return [
        member.run_uri for member, uri in taken if member and uri and _last_part(uri) != _last_part(member.weights.uri)
    ]


def _last_part(uri: str) -> str:
    return storage.join(uri).rpartition("/")[2]


def _read_ensemble(
    uri: str, file: str, method: str, reported: dict[str, Any], *, about: dict[str, Any] | None = None
) -> tuple[Result, list[str]]:
    where = storage.join(uri, file)
    table = read_predictions(where)
    result = Result(uri, uri, method, table.predicted, {}, score_file=about)
    if method == CALIBRATED:
        result = result._replace(decided=read_decisions(where))
    own = scores(result.sums())
    if not abs(own["p"] - reported["p"]) <= TOLERANCE:  # NaN neither
        raise InputError(
            f"{where} scores P {own['p']:.4f}, but score.json beside it says {reported['p']:.4f}: they are of "
            "different ensembles; run mtl_dist.ensemble again"
        )
    return result._replace(scores=own | reported), table.images


def read_decisions(uri: str) -> np.ndarray:
    """Return the columns AU1 ... AU26, on or off, of a table of calibrated predictions: (n, 12) bool."""
    table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
    try:
        return np.column_stack([table[f"AU{number}"].to_numpy() for number in AUS]).astype(bool)
    except KeyError as error:
        raise InputError(f"{uri} has no decisions of action units ({error}); run mtl_dist.ensemble again") from None


def check_same_rows(results: list[Result]) -> None:
    """Raise `InputError` unless all results hold the same rows with the same labels."""
    first = results[0].predicted
    for other in results[1:]:
        pairs = [(first.rows, other.predicted.rows), *zip(first.targets, other.predicted.targets)]
        if not all(np.array_equal(mine, theirs) for mine, theirs in pairs):
            raise InputError(
                f"{results[0].uri} and {other.uri} cannot be compared: their validation rows or labels differ; make "
                "both views from one source"
            )


def constant_result(predicted: PredictedRows, counts: LabelCounts) -> Result:
    """The best constant predictor: mean VA, the commonest expression, every action unit on (or, of its accuracy, each
    as it mostly is)."""
    n, targets = len(predicted.rows), predicted.targets
    expr, va = np.zeros((n, NUM_EXPRESSIONS)), np.zeros((n, 2))
    expr[:, int(np.argmax(counts.expr_classes))] = 1
    if targets.va_mask.any():
        va += targets.va[targets.va_mask].mean(0)
    constant = predicted._replace(predictions=Predictions(va, expr, np.ones((n, NUM_AUS))))
    sums = metric_sums(constant.predictions, targets)
    return Result(CONSTANT, "", CONSTANT, constant, constant_scores(sums))


def group_methods(constant: Result, runs: list[Result], ensembles: list[Result]) -> list[Method]:
    """Put results into methods, in the order of the paper's tables."""
    labels = list(dict.fromkeys(run.method for run in runs))
    labels.sort(key=lambda label: (_place(label), label))
    methods = [Method(CONSTANT, (constant,))]
    methods += [Method(label, tuple(run for run in runs if run.method == label)) for label in labels]
    for label in dict.fromkeys(result.method for result in sorted(ensembles, key=_is_calibrated)):
        if alike := tuple(result for result in ensembles if result.method == label):
            methods.append(Method(label, alike))
    return methods


def _is_calibrated(result: Result) -> bool:
    return result.method.startswith(CALIBRATED)


def _place(label: str) -> int:
    """Where a label's family stands among all, whatever view or name is added to it."""
    titles = [family.title for family in FAMILIES.values()]
    fits = (
        place for place, title in enumerate(titles) if label == title or label.startswith((f"{title} ", f"{title},"))
    )
    return next(fits, len(titles))


def _scores(predicted: PredictedRows) -> dict[str, Any]:
    return scores(metric_sums(predicted.predictions, predicted.targets))


def _counts(targets: Targets) -> tuple:
    classes = np.bincount(targets.expr[targets.expr_mask], minlength=NUM_EXPRESSIONS)
    on = (targets.au * targets.au_mask).sum(0)
    return int(targets.va_mask.sum()), classes.tolist(), targets.au_mask.sum(0).tolist(), on.astype(int).tolist()


def _comparable(val: Index) -> tuple:
    return val.labels.va, val.labels.expr_classes, val.labels.au, val.labels.au_positives
