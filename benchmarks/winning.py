"""Does each option for rare and missing labels help? And two sets of different labels in one run? On rendered faces.

    python -m benchmarks.winning mixture options scarce after [--dir winning] [--seeds 3] [--epochs 6] [--out FILE]

options   preset small on images of 75 pixels, as it is, which is with weights for rare classes and units; without
          these; and beside them with one option at a time: focal loss, logit adjustment, asymmetric loss, a balanced
          sampler
scarce    of each task only the labels of a fifth of the videos: as it is, with pseudo-labels of that run, with an
          average of the weights, and with pseudo-labels of this average
mixture   half of the videos with VA and EXPR alone, the other half with AU alone: trained on either, on both as one
          set, and on both with `data.mix 1 1`, as many steps
after     the mean of the last three checkpoints (`mtl_dist.soup`) of runs three times as long, one an epoch, beside
          their best one; and what each step of calibration gains, out of fold, for an ensemble of each seed's runs of
          `options`: intervals are of one seed

Scores are of validation videos, of the checkpoint with the highest P on them, of as many in every arm. Intervals are
of differences between means over seeds, bootstrapped over these videos. One run a core; interrupted, it continues.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparators import read_spent, run_all, timed, train_args
from benchmarks.leads import Predicted, compare, print_comparison, read_page
from benchmarks.loader import write_results
from mtl_dist.errors import run_command
from mtl_dist.objective.calibration import STEPS
from mtl_dist.predicting.predictions import read_predictions
from mtl_dist.report.intervals import number_videos
from mtl_dist.shards.annotations import FILES
from mtl_dist.tasks import NUM_AUS, TASKS

VIEW, SIZE = "cropped_aligned", 75
NUM_TRAIN, NUM_VAL = 2000, 1200
EVALUATIONS = 3  # of a training
SHARE_KEPT = 0.2  # of the videos that have labels of a task, in `scarce`; drawn for each task
KEYS = ("p", *TASKS)
PARTS = ("mixture", "options", "scarce", "after")
LAST = 3  # checkpoints of a soup
LONGER = 3  # times as many epochs have the runs whose checkpoints make soups
PLAIN = "as it is"
OPTIONS = {
    PLAIN: [],
    "plain weights": ["--loss.expr-weights", "none", "--loss.au-weights", "none"],
    "focal loss": ["--loss.expr-focal", 2, "--loss.au-gamma-pos", 2, "--loss.au-gamma-neg", 2],
    "logit adjustment": ["--loss.expr-prior", 1],
    "asymmetric loss": ["--loss.au-gamma-neg", 4, "--loss.au-margin", 0.05],
    "balanced sampler, EXPR": ["--data.balance", "expr"],
    "balanced sampler, AU": ["--data.balance", "au"],
    "balanced sampler, video": ["--data.balance", "video"],
}
AVERAGE = ["--train.ema", 0.99]  # what a teacher of its own needs; the same run without it is the reference
TAUGHT = {
    "run that teaches": ["--loss.teacher", "{runs}/scarce-as-it-is-{seed}"],
    "average": AVERAGE,
    "average that teaches": [*AVERAGE, "--loss.teacher", "ema"],
}
COLUMNS = {"va": slice(1, 3), "expr": slice(3, 4), "au": slice(4, 4 + NUM_AUS)}  # of the annotation files
MISSING = {"va": "-5.0", "expr": "-1", "au": "-1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=PARTS)
    parser.add_argument("--dir", type=Path, default=Path("winning"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    with timed(args.dir / "spent.json", of=[args.seeds, args.epochs, *map(PARTS.index, args.what)]):
        make_sets(args.dir)
        found = {what: measure(args, what) for what in args.what}
    spent = read_spent(args.dir / "spent.json")
    for what, comparison in found.items():
        print_comparison(what, comparison)
        for step, of_seeds in comparison.get("gains", {}).items():
            print_gains(step, of_seeds)
    print(f"\nin {spent['seconds'] / 60:.0f} min; pages: {args.dir}/report-*/report.html")
    if args.out:
        about = {"rows": [NUM_TRAIN, NUM_VAL], "epochs": args.epochs, "seconds": round(spent["seconds"])}
        write_results(args.out, about | found)


# ------------------------------------------------------------------------------------------------------------- the data


def make_sets(root: Path) -> None:
    """Render faces; make sets of all their labels, of a few, and of the halves that have other labels each."""
    rows = render(root, NUM_TRAIN, NUM_VAL, "train")
    halves = half_of(rows, 0), half_of(rows, 1)
    parts = {
        "all": rows,
        "scarce": keep_few(rows),
        "va-expr": hide(halves[0], ["au"]),
        "au": hide(halves[1], ["va", "expr"]),
    }
    create_sets(root, "train", parts)


def render(root: Path, num_train: int, num_val: int, split: str) -> list[list[str]]:
    """Render faces to `root`/faces; return the rows of a split's annotations, without their header."""
    faces = root / "faces"
    synth = ["mtl_dist.shards", "synth", str(faces), "--num-train", str(num_train), "--num-val", str(num_val)]
    run_all("rendering", [("synth", synth)], root / "logs")
    return [line.split(",") for line in (faces / FILES[split]).read_text().splitlines()[1:]]


def create_sets(root: Path, split: str, parts: dict[str, list[list[str]]]) -> None:
    """Make a set of each part of a split's rows, with the other split as it is, of what was rendered to `root`."""
    faces, (other,) = root / "faces", FILES.keys() - {split}
    header, commands = (faces / FILES[split]).read_text().splitlines()[0], []
    for name, kept in parts.items():
        source = root / "sources" / name
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir(parents=True)
        (source / VIEW).symlink_to((faces / VIEW).absolute())
        shutil.copy(faces / FILES[other], source)
        (source / FILES[split]).write_text("\n".join([header, *map(",".join, kept)]) + "\n")
        create = ["mtl_dist.shards", "create", str(source), str(root / "sets" / name), "--views", VIEW]
        commands.append((f"create-{name}", [*create, "--frames-per-shard", "128"]))
    run_all("shards", commands, root / "logs")


def half_of(rows: list[list[str]], which: int) -> list[list[str]]:
    """Return the rows of every second video."""
    place = {video: number for number, video in enumerate(sorted({video_of(row) for row in rows}))}
    return [row for row in rows if place[video_of(row)] % 2 == which]


def hide(rows: list[list[str]], tasks: list[str]) -> list[list[str]]:
    """Return the rows without the labels of some tasks."""
    hidden = [list(row) for row in rows]
    for row in hidden:
        for task in tasks:
            width = len(row[COLUMNS[task]])
            row[COLUMNS[task]] = [MISSING[task]] * width
    return hidden


def keep_few(rows: list[list[str]]) -> list[list[str]]:
    """Return the rows with each task's labels of a share of the videos; which ones is drawn for each task."""
    videos, kept = sorted({video_of(row) for row in rows}), rows
    for number, task in enumerate(TASKS):
        drawn = np.random.default_rng(number).permutation(videos)
        known = set(drawn[: round(SHARE_KEPT * len(videos))].tolist())
        kept = [row if video_of(row) in known else hide([row], [task])[0] for row in kept]
    return kept


def video_of(row: list[str]) -> str:
    return row[0].split("/")[0]


# ------------------------------------------------------------------------------------------------------------- training


def training(
    args: argparse.Namespace, name: str, seed: int, data: Path, epochs: int, *flags: object, every: int | None = None
) -> tuple:
    """Return a run's name and command; it is evaluated `every` so many epochs."""
    run = f"{name.replace(', ', '-').replace(' ', '-').lower()}-{seed}"
    own = ["--run.seed", seed, "--data.image-size", SIZE, "--train.epochs", epochs, "--checkpoint.keep-last", LAST]
    own += ["--train.eval-every", every or -(-epochs // EVALUATIONS)]
    own += [str(flag).format(runs=args.dir / "runs", seed=seed) for flag in flags]
    return run, [*train_args(args.dir / "runs", run, "small", data / VIEW), *map(str, own)]


def option_runs(args: argparse.Namespace, data: str, of: dict[str, list[Any]]) -> dict[str, list[tuple]]:
    """Return the runs of every option, a seed each."""
    return {
        name: [
            training(args, f"{data} {name}", seed, args.dir / "sets" / data, args.epochs, *flags)
            for seed in range(args.seeds)
        ]
        for name, flags in of.items()
    }


def options(args: argparse.Namespace, data: str, of: dict[str, list[Any]]) -> dict[str, Any]:
    """Train with every option, and compare each with the run without."""
    pairs = [(name, PLAIN) for name in of if name != PLAIN]
    pairs += [("average that teaches", "average")] if TAUGHT.keys() <= of.keys() else []
    return train_and_compare(args, "options" if data == "all" else data, option_runs(args, data, of), pairs)


def measure(args: argparse.Namespace, what: str) -> dict[str, Any]:
    if what == "mixture":
        return mixture(args)
    if what == "after":
        return after(args)
    if what == "options":
        return options(args, "all", OPTIONS)
    teachers = option_runs(args, "scarce", {PLAIN: []})[PLAIN]
    run_all("training, teachers", teachers, args.dir / "logs")
    return options(args, "scarce", {PLAIN: []} | TAUGHT)


def mixture(args: argparse.Namespace) -> dict[str, Any]:
    """Train on sets of different labels, each alone and both, as many steps."""
    first, second = (args.dir / "sets" / name for name in ("va-expr", "au"))
    both = ["--data.train", first / VIEW / "train", second / VIEW / "train"]
    arms = {
        "VA and EXPR alone": (first, 2 * args.epochs, []),
        "AU alone": (second, 2 * args.epochs, []),
        "both as one": (first, args.epochs, both),
        "mixed": (first, args.epochs, [*both, "--data.mix", 1, 1]),
    }
    methods = {
        name: [training(args, name, seed, data, epochs, *flags) for seed in range(args.seeds)]
        for name, (data, epochs, flags) in arms.items()
    }
    return train_and_compare(args, "mixture", methods, [("mixed", name) for name in arms if name != "mixed"])


def train_and_compare(
    args: argparse.Namespace, what: str, methods: dict[str, list[tuple]], pairs: list[tuple[str, str]]
) -> dict[str, Any]:
    """Do the runs of every method, make their page, and compare them."""
    commands = [each for of_method in methods.values() for each in of_method]
    run_all(f"training, {what}", commands, args.dir / "logs")
    names = {method: [name for name, _ in of_method] for method, of_method in methods.items()}
    page, uris = args.dir / f"report-{what}", [str(args.dir / "runs" / name) for name, _ in commands]
    run_all("the page", [(page.name, ["mtl_dist.report", *uris, "--out", str(page)])], args.dir / "logs")
    return compare({method: read_page(page, of_method) for method, of_method in names.items()}, pairs, KEYS)


# ----------------------------------------------------------------------------------------------------- after training


def after(args: argparse.Namespace) -> dict[str, Any]:
    """Average the last checkpoints of longer runs, and calibrate an ensemble of each seed's runs of `options`."""
    methods, epochs = option_runs(args, "all", OPTIONS), LONGER * args.epochs
    longer = [training(args, "all longer", seed, args.dir / "sets/all", epochs, every=1) for seed in range(args.seeds)]
    trainings = [*longer, *(each for of_method in methods.values() for each in of_method)]
    run_all("training, after", trainings, args.dir / "logs")
    of_seeds = [
        [str(args.dir / "runs" / of_method[seed][0]) for of_method in methods.values()] for seed in range(args.seeds)
    ]
    long_runs = [str(args.dir / "runs" / name) for name, _ in longer]
    soups = [
        (f"soup-{seed}", ["mtl_dist.soup", run, "--last", str(LAST), "--out", str(args.dir / f"soups/{seed}")])
        for seed, run in enumerate(long_runs)
    ]
    run_all("soups", soups, args.dir / "logs")
    val, jobs = str(args.dir / "sets/all" / VIEW / "val"), []
    for seed, runs in enumerate(of_seeds):
        soup = str(args.dir / f"soups/{seed}")
        jobs += [
            ensemble(args, f"best-{seed}", [long_runs[seed]], "--steps"),
            ensemble(args, f"last-{seed}", [soup], "--val", val, "--steps"),
            ensemble(args, f"all-{seed}", runs, "--each-task", "--steps", *STEPS),
        ]
    run_all("ensembles", jobs, args.dir / "logs")
    said = {
        name: [read_ensemble(args.dir / f"ensembles/{short}-{seed}") for seed in range(args.seeds)]
        for name, short in (("best checkpoint", "best"), (f"mean of the last {LAST}", "last"))
    }
    found = compare(said, [tuple(reversed(said))], KEYS)
    gains = [
        json.loads((args.dir / f"ensembles/all-{seed}/score.json").read_text())["gains"] for seed in range(args.seeds)
    ]
    return found | {"gains": {step: [of_seed[step] for of_seed in gains] for step in gains[0]}}


def ensemble(args: argparse.Namespace, name: str, runs: list[str], *flags: str) -> tuple[str, list[str]]:
    """Return an ensemble's name and command."""
    own = ["--local", "--out", str(args.dir / "ensembles" / name), *flags]
    return f"ensemble-{name}", ["mtl_dist.ensemble", "--runs", *runs, *own]


def read_ensemble(out: Path) -> Predicted:
    """Return what the plain mean of an ensemble says of the validation rows."""
    table = read_predictions(str(out / "predictions.parquet"))
    return Predicted(table.predicted, number_videos(table.videos))


def print_gains(step: str, of_seeds: list[dict[str, Any]]) -> None:
    """Print what a step gains: the mean over seeds, and of every seed with its interval over videos."""
    for key in of_seeds[0]:
        each = [f"{gain[key]['gain']:+.4f} ({gain[key]['low']:+.4f} to {gain[key]['high']:+.4f})" for gain in of_seeds]
        mean = np.mean([gain[key]["gain"] for gain in of_seeds])
        print(f"  {step:33} {key:8}{mean:+8.4f}   {'  '.join(each)}")


if __name__ == "__main__":
    run_command(main)
