"""Do 2Att-2Mt's parts help? System D on rendered faces, with valence and arousal of a fifth of the videos and of all.

    python -m benchmarks.stages [--dir stages] [--seeds 3] [--epochs 4] [--out FILE]

`small-d` is trained on images of 80 pixels in two stages (half of the epochs categories, then valence and arousal too)
and in one, as many steps; and in two stages with each of its parts switched off. Valence and arousal of a fifth of the
videos that have them are kept, with all other labels; then, for the schedules, all labels. The learning rate has a
warm-up and a cosine for every stage, which may help by itself: "one stage, restarted" learns all tasks in a first half
of the epochs, and from its weights in a second run anew.

Scores are of validation videos, of the checkpoint with the highest P on them. Intervals are of differences between
means over seeds, bootstrapped over these videos. By construction of rendered faces valence and arousal follow from the
expression and its strength: what tells an expression tells much of them. One run a core; interrupted, it continues.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.comparators import read_spent, run_all, timed, train_args
from benchmarks.leads import compare, print_comparison, read_page
from benchmarks.loader import write_results
from mtl_dist.errors import run_command
from mtl_dist.shards.annotations import FILES

VIEW, SIZE = "cropped_aligned", 80
NUM_TRAIN, NUM_VAL = 3000, 1200
SHARE_OF_VA = 0.2  # of the training videos that have any
KEYS = ("p", "va", "expr", "au", *(f"{score}_{of}" for score in ("ccc", "rmse", "pcc", "sagr") for of in "va"))
PARTS = {
    "no position attention": ["--model.two-level.no-position-attention"],
    "no layer attention": ["--model.two-level.no-layer-attention"],
    "no categorical feedback": ["--model.two-level.no-categorical-feedback"],
}
TWO, ONE, RESTARTED = "two stages", "one stage", "one stage, restarted"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("stages"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    if args.epochs < 2:
        parser.error(f"--epochs {args.epochs}: two stages need two at least")
    with timed(args.dir / "spent.json", of=[args.seeds, args.epochs, 3 + len(PARTS)]):
        make_sets(args.dir)
        found = {data: train_and_compare(args, data) for data in ("fifth", "all")}
    spent = read_spent(args.dir / "spent.json")
    for what, comparison in found.items():
        print_comparison(f"valence and arousal of {'all videos' if what == 'all' else 'a fifth'}", comparison)
    print(f"\nin {spent['seconds'] / 60:.0f} min; pages: {args.dir}/report-*/report.html")
    if args.out:
        about = {"rows": [NUM_TRAIN, NUM_VAL], "epochs": args.epochs, "seconds": round(spent["seconds"])}
        about["calls"] = spent["calls"]  # the time of one that was ended from outside is not in the seconds
        write_results(args.out, about | found)


def make_sets(root: Path) -> None:
    """Render faces; make a set of them, and one that knows valence and arousal of a fifth of its training videos."""
    faces, fifth = root / "faces", root / "fifth-faces"
    synth = ["mtl_dist.shards", "synth", str(faces), "--num-train", str(NUM_TRAIN), "--num-val", str(NUM_VAL)]
    run_all("rendering", [("synth", synth)], root / "logs")
    if not (fifth / FILES["train"]).exists():
        shutil.rmtree(fifth, ignore_errors=True)
        fifth.mkdir()
        (fifth / VIEW).symlink_to((faces / VIEW).absolute())
        shutil.copy(faces / FILES["val"], fifth)
        (fifth / FILES["train"]).write_text(hide_va((faces / FILES["train"]).read_text()))
    create = ["mtl_dist.shards", "create"]
    commands = [
        (f"create-{dest}", [*create, str(source), str(root / dest), "--views", VIEW])
        for source, dest in ((faces, "all"), (fifth, "fifth"))
    ]
    run_all("shards", commands, root / "logs")


def hide_va(annotations: str) -> str:
    """Return the annotations with valence and arousal of a fifth of the videos; of the others they are missing."""
    header, *lines = annotations.splitlines()
    rows = [line.split(",") for line in lines]
    videos = sorted({row[0].split("/")[0] for row in rows if float(row[1]) >= -1})
    known = set(np.random.default_rng(0).permutation(videos)[: round(SHARE_OF_VA * len(videos))])
    kept = [row if row[0].split("/")[0] in known else [row[0], "-5.0", "-5.0", *row[3:]] for row in rows]
    return "\n".join([header, *(",".join(row) for row in kept)]) + "\n"


def train_and_compare(args: argparse.Namespace, data: str) -> dict[str, Any]:
    """Train every method on one of the sets, make the page, and compare the methods."""
    runs, seeds, half = args.dir / "runs", range(args.seeds), args.epochs // 2

    def command(method: str, seed: int, epochs: int, *flags: object) -> tuple[str, list[str]]:
        name = f"{data}-{method.replace(' ', '-').replace(',', '')}-{seed}"
        own = ["--run.seed", seed, "--data.image-size", SIZE, "--train.epochs", epochs, *flags]
        return name, [*train_args(runs, name, "small-d", args.dir / data / VIEW), *map(str, own)]

    stages, one = ["--loss.va-after", half], ["--loss.va-after", 0]
    halves = [command("half", seed, half, *one) for seed in seeds]
    run_all(f"training, {data}, first halves", halves, args.dir / "logs")
    methods = {
        TWO: [command(TWO, seed, args.epochs, *stages) for seed in seeds],
        ONE: [command(ONE, seed, args.epochs, *one) for seed in seeds],
        RESTARTED: [
            command(RESTARTED, seed, args.epochs - half, *one, "--run.start", runs / name)
            for seed, (name, _) in zip(seeds, halves)
        ],
    }
    if data == "fifth":
        methods |= {
            part: [command(part, seed, args.epochs, *stages, *flags) for seed in seeds] for part, flags in PARTS.items()
        }
    run_all(f"training, {data}", [each for of_method in methods.values() for each in of_method], args.dir / "logs")
    names = {method: [name for name, _ in of_method] for method, of_method in methods.items()}
    page, uris = args.dir / f"report-{data}", [str(runs / name) for of_method in names.values() for name in of_method]
    run_all("the page", [(page.name, ["mtl_dist.report", *uris, "--out", str(page)])], args.dir / "logs")
    predicted = {method: read_page(page, of_method) for method, of_method in names.items()}
    return compare(predicted, [(TWO, other) for other in methods if other != TWO], KEYS)


if __name__ == "__main__":
    run_command(main)
