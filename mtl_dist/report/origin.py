"""Where results come from: runs with their checkpoints, starts, configurations and commands; ensembles with theirs."""

from __future__ import annotations

import json
import shlex

from markupsafe import Markup

from mtl_dist import storage
from mtl_dist.objective.scores import FIRST
from mtl_dist.report.page import html
from mtl_dist.report.results import Result
from mtl_dist.report.tables import Table, number, text
from mtl_dist.runs import CONFIG_NAME
from mtl_dist.runs.checkpoint import MODEL
from mtl_dist.runs.lives import read_lives
from mtl_dist.runs.weights import Weights
from mtl_dist.settings import dump_yaml


def run_block(result: Result) -> Markup:
    """A run: its checkpoint, how it was started, its configuration."""
    val = result.member.val
    validation = f"{val} ({val.view}, {val.rows:,} rows, sha256 {val.sha256})"
    return weights_block(result.name, result.uri, result.method, result.member.weights, validation=validation)


def weights_block(name: str, uri: str, method: str, weights: Weights, *, validation: str) -> Markup:
    """The run of some weights; `validation` says what it is scored on."""
    checkpoint, data = weights.checkpoint, weights.config.data
    trained_on = f"{f'all but fold {data.fold} of ' if data.fold else ''}{' and '.join(data.train)}"
    scored = [(f"{FIRST.title} in training", f"{checkpoint.score:.4f}")] if checkpoint.score is not None else []
    about = [
        ("run", uri),
        ("method", method),
        ("checkpoint", checkpoint.uri),
        ("weights, sha256", checkpoint.files[MODEL]["sha256"]),
        ("step", f"{checkpoint.step:,}"),
        *scored,
        ("training set", f"{trained_on} (sha256 {weights.train_sha256})"),
        ("validation set", validation),
    ]
    lives = read_lives(uri)
    command_line = lives[-1].get("typed") if lives else None  # runs of before it was recorded have none
    command = command_line or shlex.join(["python", "-m", "mtl_dist.train", "--config", storage.join(uri, CONFIG_NAME)])
    rows = [
        [text(life["started"]), number(life["step"]), number(life["num_ranks"]), text(life["host"])] for life in lives
    ]
    starts = Table("starts", f"Starts of {name}", ("started", "from step", "ranks", "rank 0 on"), rows)
    return html.folded(
        f"{name}: {method}",
        html.definitions(about),
        html.paragraph(
            "The command that trained it (under torchrun or a Ray job: what these started); with another --run.name "
            "it is repeated:"
            if command_line
            else "The command that trains it, given what launches it (--local, torchrun or a Ray job):"
        ),
        html.preformatted(command),
        html.table(starts, sortable=False) if rows else html.paragraph("Its starts were not recorded."),
        html.folded("configuration", html.preformatted(dump_yaml(weights.config))),
    )


def ensemble_block(result: Result) -> Markup:
    """An ensemble: its members and what score.json says of how they were combined."""
    about = result.score_file
    runs = [member["run"] for member in about["members"]]
    command = ["python", "-m", "mtl_dist.ensemble", "--runs", *runs, "--out", result.uri]
    for name, value in about.get("options", {}).items():
        flag, values = f"--{name.replace('_', '-')}", value if isinstance(value, list) else [value]
        if value is True:
            command.append(flag)
        elif value is not None and value is not False and (values or name == "steps"):
            command += [flag, *map(str, values)]
    rest = {key: value for key, value in about.items() if key not in ("scores", "rows", "covers", "p", "options")}
    return html.folded(
        f"{result.name}: ensemble of {len(runs)}",
        html.paragraph("The command that makes it:"),
        html.preformatted(shlex.join(command)),
        html.folded(
            "members and calibration, as in score.json", html.preformatted(json.dumps(rest, indent=1, allow_nan=False))
        ),
    )
