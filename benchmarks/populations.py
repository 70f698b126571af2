"""Does a population of runs end ahead of as many runs with settings drawn at random? On rendered faces.

    python -m benchmarks.populations [--dir populations] [--seeds 3] [--members 4] [--epochs 8] [--out FILE]

Both have the same members, which begin with the same draws of the learning rate and the loss weights, and are trained
for as many epochs: `tune.population` in four generations, and in one, which is random search. Members compete on half
of the validation videos by their last scores. Scores are those of the best checkpoint of each seed's best run, on the
other half: random search has the choice of all evaluations of a run, a population of its last generation's. Intervals
are of differences between means over seeds, bootstrapped over these videos. Two at a time on two cores; interrupted, it
continues.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

import torch

from benchmarks.comparators import read_spent, run_all, timed
from benchmarks.leads import Predicted, compare, print_comparison
from benchmarks.loader import write_results
from benchmarks.winning import KEYS, SIZE, VIEW, create_sets, half_of, render
from mtl_dist.data.index import read_sets
from mtl_dist.errors import run_command
from mtl_dist.predicting.members import Member, predict_member, row_names
from mtl_dist.report.intervals import number_videos
from mtl_dist.runs.weights import open_best

NUM_TRAIN, NUM_VAL = 1000, 1600
GENERATIONS = 4
POPULATION, RANDOM = "population", "random search"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("populations"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    with timed(args.dir / "spent.json", of=[args.seeds, args.members, args.epochs]):
        make_sets(args.dir)
        searches = {
            method: [search(args, method, generations, seed) for seed in range(args.seeds)]
            for method, generations in ((POPULATION, GENERATIONS), (RANDOM, 1))
        }
        run_all("searching", [each for of_method in searches.values() for each in of_method], args.dir / "logs")
    best = {method: [best_run(args.dir, name) for name, _ in of_method] for method, of_method in searches.items()}
    said = {method: [predict_other_half(args.dir, run) for run in runs] for method, runs in best.items()}
    found = compare(said, [(POPULATION, RANDOM)], KEYS)
    found["best"] = {method: [run.name for run in runs] for method, runs in best.items()}
    spent = read_spent(args.dir / "spent.json")
    print_comparison("scores of the other half", found)
    print(f"\nin {spent['seconds'] / 60:.0f} min; lineages: {args.dir}/searches/population-*/lineage.png")
    if args.out:
        about = {"rows": [NUM_TRAIN, NUM_VAL], "members": args.members, "generations": GENERATIONS}
        write_results(args.out, about | {"epochs": args.epochs, "seconds": round(spent["seconds"])} | found)


def make_sets(root: Path) -> None:
    """Render faces; make one set of the training videos, and of every half of the validation videos."""
    rows = render(root, NUM_TRAIN, NUM_VAL, "val")
    create_sets(root, "val", {"first": half_of(rows, 0), "other": half_of(rows, 1)})


def search(args: argparse.Namespace, method: str, generations: int, seed: int) -> tuple[str, list[str]]:
    """Return the name of a search and its command."""
    name, data = f"{method.replace(' ', '-')}-{seed}", args.dir / "sets/first" / VIEW
    flags = {
        "--preset": "small", "--run.storage": args.dir / "searches", "--run.seed": seed, "--population.name": name,
        "--population.members": args.members, "--population.generations": generations, "--train.epochs": args.epochs,
        "--data.train": data / "train", "--data.val": data / "val", "--data.image-size": SIZE, "--engine.threads": 1,
    }  # fmt: skip
    return name, ["tune.population", "--local", *(str(part) for pair in flags.items() for part in pair)]


def best_run(root: Path, name: str) -> Path:
    """Return the run of the last generation with the highest score."""
    with (root / "searches" / name / "lineage.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = [row for row in rows if row["generation"] == rows[-1]["generation"] and math.isfinite(float(row["p"]))]
    return root / "searches" / name / "runs" / max(last, key=lambda row: float(row["p"]))["run"]


def predict_other_half(root: Path, run: Path) -> Predicted:
    """Return what a run's best checkpoint says of the videos that no run competed on."""
    member = Member(str(run), open_best(str(run)), read_sets([str(root / "sets/other" / VIEW / "val")]))
    return Predicted(predict_member(member, device=torch.device("cpu")), number_videos(row_names(member).videos))


if __name__ == "__main__":
    run_command(main)
