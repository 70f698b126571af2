"""What one method has over another: differences of means over seeds, bootstrapped over the validation videos.

A lead of an error, such as RMSE, is good where it is negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtl_dist.objective.affect import PredictedRows
from mtl_dist.objective.metrics import metric_sums
from mtl_dist.objective.scores import scores
from mtl_dist.predicting.predictions import read_predictions
from mtl_dist.report.intervals import bootstrap, number_videos
from mtl_dist.report.results import Method, Result

DRAWS, SEED = 2000, 0


class Predicted(NamedTuple):
    """What a method says of the validation rows, and their videos."""

    rows: PredictedRows
    videos: np.ndarray  # (n,) numbered from 0


def read_page(page: Path, runs: Sequence[str]) -> list[Predicted]:
    """Return what `mtl_dist.report` wrote beside a page: the predictions of the best checkpoints of its runs."""
    tables = [read_predictions(str(page / "data" / f"{run}.parquet")) for run in runs]
    return [Predicted(table.predicted, number_videos(table.videos)) for table in tables]


def compare(
    methods: dict[str, list[Predicted]], pairs: Sequence[tuple[str, str]], keys: Sequence[str] = ("p",)
) -> dict[str, Any]:
    """Return the scores of every seed of every method, and for every (method, reference) the lead with its interval.

    A draw of videos is the same for all methods and seeds; a lead is one of means over seeds. How much seeds differ is
    not in the interval: see the scores of every seed.
    """
    found, video = [], next(iter(methods.values()))[0].videos
    for name, seeds in methods.items():
        results = [
            Result(f"{name}-{seed}", "", name, one.rows, scores(metric_sums(one.rows.predictions, one.rows.targets)))
            for seed, one in enumerate(seeds)
        ]
        found.append(Method(name, tuple(results)))
    drawn = bootstrap(found, video, num_draws=DRAWS, seed=SEED)
    of_seeds = {method.label: {key: method.values(key) for key in keys} for method in found}
    leads = {}
    for name, reference in pairs:
        ends = {key: drawn.difference(name, reference, key) for key in keys}
        means = {key: np.mean(of_seeds[name][key]) - np.mean(of_seeds[reference][key]) for key in keys}
        leads[f"{name} over {reference}"] = {key: [float(means[key]), *(ends[key] or ())] for key in keys}
    return {"scores": of_seeds, "leads": leads, "videos": drawn.num_videos}


def print_comparison(what: str, found: dict[str, Any]) -> None:
    """Print the means over seeds with the seeds' scores, then the leads with their intervals."""
    print(f"\n{what}, {found['videos']} validation videos")
    for name, by_key in found["scores"].items():
        for key, values in by_key.items():
            print(f"  {name:33} {key:8}{np.mean(values):8.4f}   {' '.join(f'{value:.4f}' for value in values)}")
    for name, by_key in found["leads"].items():
        for key, (lead, *ends) in by_key.items():
            interval = f"{ends[0]:+.4f} to {ends[1]:+.4f}" if ends else ""
            print(f"  {name:33} {key:8}{lead:+8.4f}   {interval}")
