"""What a report is about: every input checked, every run predicted, and all of it scored on draws of the videos."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from mtl_dist import storage
from mtl_dist.label_counts import LabelCounts
from mtl_dist.predicting.members import Member, check_apart, row_names, unique_names
from mtl_dist.progress import progress_bar
from mtl_dist.report.intervals import Bootstrap, bootstrap, number_videos
from mtl_dist.report.options import ReportCommand
from mtl_dist.report.results import (
    Method,
    Result,
    check_same_data,
    check_same_rows,
    constant_result,
    find_run,
    group_methods,
    label_ensembles,
    label_runs,
    open_ensemble,
    predict_run,
    run_result,
    stale_members,
)
from mtl_dist.report.tables import reference_method

SEED = 0  # of the bootstrap: the same results give the same intervals


class Evidence(NamedTuple):
    """All that a report shows, before it is drawn."""

    methods: list[Method]
    labels: LabelCounts
    images: list[str]  # of the validation rows
    video: np.ndarray  # (n,) of every row, from 0
    drawn: Bootstrap
    warnings: list[str]  # what a reader has to know of the runs

    @property
    def best(self) -> Method:
        """The method that the page is about, whose errors are shown."""
        return reference_method(self.methods) or self.methods[-1]


def gather(command: ReportCommand, members: list[Member], device: torch.device) -> Evidence:
    """Check all inputs, then predict every run; `members` are those of the command."""
    check_same_data(members)
    images, videos = row_names(members[0], command.cache_dir)
    labels = label_runs(members)
    opened = [
        [result._replace(name=name) for result in open_ensemble(uri, members, images)]
        for uri, name in zip(command.ensemble, unique_names(list(command.ensemble)))
    ]
    ensembles = label_ensembles(opened, members, labels)
    check_apart(command.out, command.runs)
    storage.check_writable(command.out, flag="--out")
    names = unique_names(list(command.runs))
    runs = []
    for member, name, label in zip(members, names, labels):
        with progress_bar(f"predicting {name}", member.val.rows) as advance:
            predicted = predict_run(
                member, name, data_uri=storage.join(command.out, "data"), device=device, batch=command.batch,
                workers=command.workers, cache_dir=command.cache_dir, progress=advance)  # fmt: skip
        runs.append(run_result(member, name, label, predicted))
    check_same_rows([*runs, *ensembles])
    counts = members[0].val.labels
    methods = group_methods(constant_result(runs[0].predicted, counts), runs, ensembles)
    video = number_videos(videos)
    drawn = bootstrap(methods, video, num_draws=command.draws, seed=SEED)
    warnings = _warnings(runs, opened) + _taken_for_one(ensembles, members)
    return Evidence(methods, counts, images, video, drawn, warnings)


def _taken_for_one(ensembles: list[Result], members: list[Member]) -> list[str]:
    """Say which ensembles are shown as one method although it is not known what their runs are."""
    blind: dict[str, list[str]] = {}
    for result in ensembles:
        if result.score_file and any(not find_run(of.get("run"), members) for of in result.score_file["members"]):
            blind.setdefault(result.method, []).append(result.uri)
    return [
        f"Ensembles {', '.join(uris)} are shown as one method, as if only seeds told them apart: of their runs that "
        "are not reported here no more than the view is known. Report these runs too."
        for uris in blind.values()
        if len(uris) > 1
    ]


def _warnings(runs: list[Result], ensembles: list[list[Result]]) -> list[str]:
    """Say which runs are not at their end, and which ensembles are of earlier checkpoints."""
    unfinished = [
        f"{run.name} (step {run.member.weights.newest_step:,} of {run.member.weights.total_steps:,})"
        for run in runs
        if not run.member.weights.is_finished
    ]
    warnings = [f"Not trained to the end: {', '.join(unfinished)}."] if unfinished else []
    for plain, *_ in ensembles:
        if stale := stale_members(plain.score_file, [run.member for run in runs]):
            warnings.append(
                f"Ensemble {plain.uri} was made of other checkpoints than are best now, of {', '.join(stale)}: make it "
                "again."
            )
    return warnings
