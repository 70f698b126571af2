"""From raw photographs to a score: does a model learn as well from faces of `prepare` as from the set's own crops?

    python -m benchmarks.faces_end_to_end --photographs DIR [--dir end-to-end] [--seeds 3] [--epochs 80] [--out FILE]

The photographs are those of `cropped` of a set in the s-Aff-Wild2 layout. Each is pasted into a scene of clutter of its
own, 1280 x 720 (`benchmarks.scenes`): a face of 120 to 400 pixels at a random place, turned by up to 10 degrees, pixels
times 0.8 to 1.2, a JPEG of quality 85 to 95. `mtl_dist.prepare` finds the faces and joins the set's labels to them,
`mtl_dist.shards create` makes sets with the set's own split, in which nobody is on both sides, preset small is trained
on either view, and `mtl_dist.ensemble` takes the plain mean of both.

supplied   the same with the crops that the set comes with
recut      with what `prepare` cuts out of these crops: what its framing alone changes
prepared   with what it cuts out of the scenes

Scores are EXPR F1 of the validation pictures that all ways have, by the checkpoint with the highest P on them, of as
many in each. Intervals are of differences between means over seeds, bootstrapped over people. Two trainings at a time
on two cores; interrupted, it continues.
"""

from __future__ import annotations

import argparse
import csv
import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pyarrow import parquet

from benchmarks.comparators import read_spent, run_all, timed, train_args
from benchmarks.faces import is_same, read_photographs
from benchmarks.leads import Predicted, compare, print_comparison
from benchmarks.loader import write_results
from benchmarks.pretraining import Command, write_once
from benchmarks.scenes import Ranges, box_in, make_scene
from mtl_dist.errors import run_command
from mtl_dist.objective.affect import PredictedRows
from mtl_dist.objective.metrics import Predictions, Targets
from mtl_dist.predicting.predictions import PredictionTable, read_predictions
from mtl_dist.progress import progress_bar
from mtl_dist.report.intervals import number_videos
from mtl_dist.shards.annotations import FILES
from mtl_dist.tasks import AUS, VIEWS

SUPPLIED, RECUT, PREPARED = WAYS = ("supplied", "recut", "prepared")
RANGES = Ranges(size=(120, 400), turn=10.0, brightness=(0.8, 1.2), quality=(85, 95))
SEED = 2026  # of the scenes
LABELS = ("valence", "arousal", "expression", *(f"AU{number}" for number in AUS))
EVALUATIONS = 3  # of a training, beside that at its end
WANTED = 0.02  # of F1, that the prepared may be behind the supplied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="a set in the s-Aff-Wild2 layout")
    parser.add_argument("--dir", type=Path, default=Path("end-to-end"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    with timed(args.dir / "spent.json", of=[args.seeds, args.epochs]):
        make_sets(args.dir, args.photographs)
        train(args)
    spent, found, scores = read_spent(args.dir / "spent.json"), count_faces(args.dir), compare_ways(args)
    print("\n{found} of {photographs} faces are found, and {others} others".format(**found))
    print_comparison("EXPR F1", scores)
    print(f"\nright of {scores['pictures']} pictures, seed by seed")
    for name, numbers in scores["right"].items():
        print(f"  {name:42}{' '.join(map(str, numbers))}")
    print(f"\nin {spent['seconds'] / 60:.0f} min; who was found: {args.dir}/prepared/faces.png")
    if args.out:
        about = {"epochs": args.epochs, "seconds": round(spent["seconds"]), "calls": spent["calls"]}
        write_results(args.out, about | {"scenes": RANGES._asdict(), "wanted": WANTED, "faces": found} | scores)


# ------------------------------------------------------------------------------------------------------------- the data


def make_sets(root: Path, photographs: Path) -> None:
    """Make scenes, cut faces out of them and of the crops that the photographs come with, and make sets of all."""
    write_once(root / "scenes", partial(write_scenes, photographs))
    for way, pictures in ((PREPARED, root / "scenes" / "pictures"), (RECUT, photographs / "cropped")):
        prepare = ["mtl_dist.prepare", str(pictures), str(root / way), "--local"]
        prepare += ["--annotations", str(root / "scenes" / "labels.csv")]
        run_all("finding faces", [(way, prepare)], root / "logs")
    create, size = ["mtl_dist.shards", "create"], ["--frames-per-shard", "128"]
    commands = [("create", [*create, str(photographs), str(root / "sets" / SUPPLIED), *size])]
    for way, view in product((PREPARED, RECUT), VIEWS):
        own = [str(root / way / "faces.csv"), str(root / "sets" / way), "--views", view]
        own += ["--images", str(root / way / view)]
        commands.append((f"create-{way}-{view}", [*create, *own, *size]))
    for command in commands:  # in turn: two that write to one place are not wanted
        run_all("shards", [command], root / "logs")


def write_scenes(photographs: Path, dest: Path) -> None:
    """Write a scene a photograph, where its face is, and the labels of all."""
    found, boxes = read_photographs(photographs), {}
    with progress_bar("scenes", len(found)) as advance:
        for number, photograph in enumerate(found):
            scene = make_scene(found, seed=SEED, number=number, num_faces=1, only=photograph, ranges=RANGES)
            path = dest / "pictures" / photograph.name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene.pixels).save(path, "JPEG", quality=95)  # once more: its quality is that of the first
            boxes[photograph.name] = box_in(scene.faces[0]).tolist()
            advance(1)
    (dest / "boxes.json").write_text(json.dumps(boxes, indent=0))
    with (dest / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "split", *LABELS])
        for split, name in FILES.items():
            rows = (photographs / name).read_text().splitlines()[1:]
            table.writerows([image, split, *labels] for image, *labels in (row.split(",") for row in rows))


def count_faces(root: Path) -> dict[str, int]:
    """Return how many of the photographs' faces were found, and how many were found that are none of these."""
    boxes = json.loads((root / "scenes" / "boxes.json").read_text())
    rows = parquet.read_table(root / "prepared" / "frames.parquet", columns=["source", "box", "image"]).to_pylist()
    cut_out = [row for row in rows if row["image"] is not None]
    found = {row["source"] for row in cut_out if is_same(np.array(row["box"]), np.array(boxes[row["source"]]))}
    return {"photographs": len(boxes), "found": len(found), "others": len(cut_out) - len(found)}


# ------------------------------------------------------------------------------------------------- training and scoring


def train(args: argparse.Namespace) -> None:
    """Train on both views of every way, and take the mean of the views, seed by seed."""
    of_all = list(product(WAYS, range(args.seeds)))
    trainings = [training(args.dir, way, view, seed, args.epochs) for way, seed in of_all for view in VIEWS]
    run_all("training", trainings, args.dir / "logs")
    run_all("ensembles", [ensemble(args.dir, way, seed) for way, seed in of_all], args.dir / "logs")


def training(root: Path, way: str, view: str, seed: int, epochs: int) -> Command:
    name = f"{way}-{view}-{seed}"
    own = ["--run.seed", seed, "--train.epochs", epochs, "--train.eval-every", max(1, epochs // EVALUATIONS)]
    return name, [*train_args(root / "runs", name, "small", root / "sets" / way / view), *map(str, own)]


def ensemble(root: Path, way: str, seed: int) -> Command:
    name, runs = f"ensemble-{way}-{seed}", [str(root / "runs" / f"{way}-{view}-{seed}") for view in VIEWS]
    return name, ["mtl_dist.ensemble", "--runs", *runs, "--local", "--steps", "--out", str(root / name)]


def compare_ways(args: argparse.Namespace) -> dict[str, Any]:
    """Compare the prepared and the recut with the supplied, view by view and in the ensemble."""
    tables: dict[str, list[PredictionTable]] = {}
    for way in WAYS:
        places = [args.dir / f"ensemble-{way}-{seed}" for seed in range(args.seeds)]
        for view in VIEWS:
            files = [place / "members" / f"{way}-{view}-{seed}.parquet" for seed, place in enumerate(places)]
            tables[f"{way} {view}"] = [read_predictions(str(file)) for file in files]
        tables[f"{way} ensemble"] = [read_predictions(str(place / "predictions.parquet")) for place in places]
    common = sorted(set.intersection(*(set(table.images) for of_way in tables.values() for table in of_way)))
    methods = {name: [of_images(table, common) for table in of_way] for name, of_way in tables.items()}
    pairs = [(f"{way} {what}", f"{SUPPLIED} {what}") for way in (PREPARED, RECUT) for what in (*VIEWS, "ensemble")]
    right = {name: [num_right(one) for one in seeds] for name, seeds in methods.items()}
    return compare(methods, pairs, ("expr",)) | {"pictures": len(common), "right": right}


def of_images(table: PredictionTable, images: list[str]) -> Predicted:
    """Return what a table says of these images, in their order."""
    place = {image: number for number, image in enumerate(table.images)}
    order = np.array([place[image] for image in images])
    rows, predictions, targets = table.predicted
    taken = Predictions(*(column[order] for column in predictions)), Targets(*(column[order] for column in targets))
    videos = number_videos([table.videos[number] for number in order])
    return Predicted(PredictedRows(rows[order], *taken), videos)


def num_right(predicted: Predicted) -> int:
    """Return how many pictures have their expression."""
    _, predictions, targets = predicted.rows
    return int((predictions.expr.argmax(-1) == targets.expr)[targets.expr_mask].sum())


if __name__ == "__main__":
    run_command(main)
