"""The final job: ensemble the best checkpoint of each view on the validation split and write the challenge score.

Examples:
    python -m mtl_dist.ensemble --runs runs/cropped runs/cropped_aligned --out runs/ensemble
    ray job submit -- python -m mtl_dist.ensemble --runs s3://bucket/runs/cropped s3://bucket/runs/cropped_aligned
        --out s3://bucket/runs/ensemble

Writes to --out: score.json, predictions.csv (a line a row), table.txt.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from mtl_dist import storage
from mtl_dist.errors import InputError, run_command
from mtl_dist.tasks import AUS, EXPRESSIONS

if TYPE_CHECKING:
    from mtl_dist.runtime.evaluate import Predicted
    from mtl_dist.runtime.members import Member


@dataclass(frozen=True)
class EnsembleCommand:
    runs: tuple[str, ...]
    """Runs to ensemble, one of each view: <storage>/<name> of each, as training printed it."""
    out: str
    """Directory or s3:// prefix to write to."""
    val: tuple[str, ...] = ()
    """Validation sets in the order of --runs, where they have moved since training."""
    batch: int = 64
    """Images per forward pass."""
    workers: int = 1
    """Loader threads."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cache_dir: Path | None = None
    """Per-node cache of shards; None: $MTL_CACHE_DIR or ~/.cache/mtl_dist/shards."""


def main(args: list[str] | None = None) -> None:
    command = tyro.cli(EnsembleCommand, args=args, prog="python -m mtl_dist.ensemble", description=__doc__)
    from mtl_dist.objective.metrics import constant_scores, metric_sums, scores
    from mtl_dist.progress import progress_bar
    from mtl_dist.runtime.device import named_device
    from mtl_dist.runtime.members import image_names, open_member, predict_member
    from mtl_dist.runtime.tracking import print_scores, render_scores

    if len(command.runs) < 2:
        raise InputError(f"--runs names {len(command.runs)} run; expected two, one of each view")
    if command.val and len(command.val) != len(command.runs):
        raise InputError(f"--val names {len(command.val)} sets for {len(command.runs)} runs; expected one each")
    members = [open_member(run, *command.val[place : place + 1]) for place, run in enumerate(command.runs)]
    _check_members(members)
    storage.check_writable(command.out)
    options = {"batch": command.batch, "workers": command.workers, "cache_dir": command.cache_dir}
    device = named_device(command.device)
    predicted = []
    for member in members:
        with progress_bar(f"predicting {member.val.view}", member.val.rows) as advance:
            predicted.append(predict_member(member, device=device, progress=advance, **options))
    ensemble = combine(predicted)

    val = members[0].val
    results = {"constant predictor": constant_scores(val.labels)}
    for member, own in zip(members, predicted):
        results[member.val.view] = scores(metric_sums(own.predictions, own.targets))
    results["ensemble"] = scores(metric_sums(ensemble.predictions, ensemble.targets))
    names = image_names(members[0], command.cache_dir)
    storage.write_bytes(storage.join(command.out, "predictions.csv"), _predictions_csv(ensemble, names))
    storage.write_bytes(storage.join(command.out, "table.txt"), render_scores(results).encode())
    report = {
        "p": results["ensemble"]["p"],
        "covers": results["ensemble"]["covers"],
        "scores": results,
        "members": [_about(member) for member in members],
        "rows": val.rows,
    }
    storage.write_bytes(storage.join(command.out, "score.json"), json.dumps(report, indent=1).encode())
    print_scores(results, title=f"{val.rows} validation rows")
    print(f"challenge score P {report['p']:.4f} of {len(report['covers'])} task(s): {', '.join(report['covers'])}")
    print(
        "wrote " + ", ".join(storage.join(command.out, name) for name in ("score.json", "predictions.csv", "table.txt"))
    )


def combine(members: list[Predicted]) -> Predicted:
    """Average probabilities and VA of members, row by row. Raises `InputError` where rows or labels do not pair."""
    import numpy as np

    first = members[0]
    for other in members[1:]:
        if not np.array_equal(first.rows, other.rows):
            odd = np.setxor1d(first.rows, other.rows)[:5].tolist()
            raise InputError(
                f"the views do not hold the same validation rows (such as {odd}); make both from one source"
            )
        for name, mine, theirs in zip(first.targets._fields, first.targets, other.targets):
            if not np.array_equal(mine, theirs):
                raise InputError(f"the views' labels differ ({name}) for one row; make both from one source")
    columns = zip(*(member.predictions for member in members))
    return first._replace(predictions=type(first.predictions)(*(np.mean(column, axis=0) for column in columns)))


def _check_members(members: list[Member]) -> None:
    views = [member.val.view for member in members]
    for view in views:
        if views.count(view) > 1:
            same = ", ".join(member.run_uri for member in members if member.val.view == view)
            raise InputError(f"{same} are all of view '{view}'; expected one run of each view")
    sources = {member.val.source_sha256 for member in members}
    if len(sources) > 1:
        raise InputError(
            "the runs' validation sets come from different sources, or from other choices of rows; make both "
            "views from one source with the same options"
        )


def _about(member: Member) -> dict[str, Any]:
    return {
        "run": member.run_uri,
        "view": member.val.view,
        "checkpoint": member.checkpoint.uri,
        "step": member.checkpoint.step,
        "p_in_training": member.checkpoint.score,
        "validation_set": {"uri": member.val_uri, "sha256": member.val.sha256},
    }


def _predictions_csv(predicted: Predicted, names: list[str]) -> bytes:
    """One line a row: row, image, VA, class and its probabilities, AUs and their probabilities."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    aus = [f"AU{number}" for number in AUS]
    writer.writerow(
        ["row", "image", "valence", "arousal", "expression", *(f"p_{name}" for name in (*EXPRESSIONS, *aus))]
    )
    for row, name, va, expr, au in zip(predicted.rows, names, *predicted.predictions):
        numbers = [f"{value:.4f}" for value in (*va.clip(-1, 1), *expr, *au)]
        writer.writerow([row, name, *numbers[:2], EXPRESSIONS[expr.argmax()], *numbers[2:]])
    return text.getvalue().encode()


if __name__ == "__main__":
    run_command(main)
