"""Do encoders of sequences help, where videos have time in them and where they have none?

    python -m benchmarks.sequences [--dir sequences] [--seeds 3] [--out FILE]

Rendered faces: videos that have dynamics (`shards synth --dynamics`), and those without. Features are of networks that
were trained on other people: two CNNs with labels, and a masked autoencoder's encoder without. On these, small-c:

frame           no row knows of another, of about as many parameters: what the others are compared with
frame, smoothed the same, with every task's predictions smoothed over the rows of a video; how far is chosen for every
                fold of videos on the others
gru both ways, gru, transformer, tcn
permuted        gru both ways on videos whose rows were permuted within each 48, in training and validation: what it
                has over frame is context (who it is, what else the video shows), and what it lacks is time
vgg, mae, cnn + vgg, cnn + mae
                gru both ways on the other networks' features, and on two side by side
share bottom ... frameworks of tasks, of equal width and of about equal parameters

Scores are of validation videos, by the checkpoint with the highest P on them, of as many in every arm. Intervals are of
differences between means over seeds, bootstrapped over these videos. One run a core; interrupted, it continues.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.comparators import read_spent, run_all, timed
from benchmarks.leads import Predicted, compare, print_comparison
from benchmarks.loader import write_results
from mtl_dist.errors import run_command
from mtl_dist.objective.affect import PredictedRows
from mtl_dist.objective.crossfit import make_folds
from mtl_dist.objective.metrics import Predictions, Targets, metric_sums
from mtl_dist.objective.scores import scores
from mtl_dist.objective.smoothing import smooth
from mtl_dist.predicting.predictions import PredictionTable, read_predictions
from mtl_dist.report.drawing import COLOURS, INK, canvas, save_png
from mtl_dist.report.intervals import number_videos
from mtl_dist.shards.annotations import FILES
from mtl_dist.tasks import TASKS
from mtl_dist.timeline import Timeline, make_timeline

VIEW, SIZE, WINDOW = "cropped_aligned", 64, 48
# Rows of training and validation, and the seed of the people.
FACES = {"dynamic": (5760, 2880, 1), "static": (3000, 1200, 1), "others": (4800, 480, 100)}
PERMUTED = {"dynamic": "permuted", "static": "static-permuted"}
HALF_WINDOWS = (0, 1, 2, 3, 5, 8, 12)  # rows either way that smoothing chooses from
NUM_FOLDS = 5
NUM_FACES = 8  # in the picture of a video
EPOCHS = {"cnn": 8, "vgg": 8, "mae": 15}  # of the networks that make features
NETS = tuple(EPOCHS)
TRAIN_EPOCHS = 30
SHORT = ["--model.sequence.window", "16"]  # a video without dynamics has 24 rows
GRU = ["--model.sequence.no-bidirectional"]


class Arm(NamedTuple):
    """A way to train on features."""

    flags: list[str]
    sets: tuple[str, ...] = ("cnn",)
    faces: str = "dynamic"


def encoder(name: str) -> list[str]:
    return ["--model.sequence.encoder", name, "--model.sequence.no-bidirectional"]


FRAME = [*encoder("frame"), "--model.sequence.hidden", "432"]
BOTTOM = ["--model.sequence.framework", "share_bottom"]
FEEDBACK = ["--model.sequence.feed-source", "v", "au", "--model.sequence.feed-target", "a"]
ARMS = {
    "frame": Arm(FRAME),
    "gru both ways": Arm([]),
    "gru": Arm(GRU),
    "transformer": Arm(encoder("transformer")),
    "tcn": Arm(encoder("tcn")),
    "permuted": Arm([], faces="permuted"),
    "vgg": Arm([], ("vgg",)),
    "mae": Arm([], ("mae",)),
    "cnn + vgg": Arm([], ("cnn", "vgg")),
    "cnn + mae": Arm([], ("cnn", "mae")),
    "share bottom": Arm(BOTTOM),
    "share bottom, narrow": Arm([*BOTTOM, "--model.sequence.hidden", "80"]),
    "feedback": Arm([*BOTTOM, *FEEDBACK]),
    "feedback, narrow": Arm([*BOTTOM, *FEEDBACK, "--model.sequence.hidden", "72"]),
    "static, frame": Arm([*FRAME, *SHORT], faces="static"),
    "static, gru both ways": Arm(SHORT, faces="static"),
    "static, permuted": Arm(SHORT, faces="static-permuted"),
}
LEADS = [
    ("gru both ways", "frame"),
    ("gru both ways", "frame, smoothed"),
    ("frame, smoothed", "frame"),
    ("gru", "frame"),
    ("transformer", "frame"),
    ("tcn", "frame"),
    ("permuted", "frame"),
    ("gru both ways", "permuted"),
    ("cnn + vgg", "gru both ways"),
    ("cnn + mae", "gru both ways"),
    ("vgg", "gru both ways"),
    ("mae", "gru both ways"),
    ("share bottom", "gru both ways"),
    ("share bottom, narrow", "gru both ways"),
    ("feedback", "share bottom"),
    ("feedback, narrow", "share bottom, narrow"),
]


STATIC_LEADS = [
    ("gru both ways", "frame"),
    ("permuted", "frame"),
    ("gru both ways", "permuted"),
    ("frame, smoothed", "frame"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("sequences"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    with timed(args.dir / "spent.json", of=[args.seeds]):
        make_sets(args.dir)
        make_features(args.dir)
        train(args)
        make_pages(args)
    found = {"dynamic": compare_dynamic(args), "static": compare_static(args)}
    for what, comparison in found.items():
        print_comparison(what, comparison)
    draw_video(args)
    spent = read_spent(args.dir / "spent.json")
    print(f"\nin {spent['seconds'] / 60:.0f} min; pages: {args.dir}/report-*/report.html, {args.dir}/video.png")
    if args.out:
        about = {
            "faces": FACES,
            "epochs": EPOCHS | {"sequences": TRAIN_EPOCHS},
            "window": WINDOW,
            "seconds": round(spent["seconds"]),
        }
        write_results(args.out, about | {"parameters": count_parameters(args)} | found)


# ------------------------------------------------------------------------------------------------------------- the data


def make_sets(root: Path) -> None:
    """Render faces, permute the rows of a copy, and make shards of all."""
    logs = root / "logs"
    for name, (num_train, num_val, seed) in FACES.items():
        synth = ["mtl_dist.shards", "synth", str(root / "faces" / name), "--seed", str(seed)]
        synth += ["--num-train", str(num_train), "--num-val", str(num_val)]
        dynamics = [] if name == "static" else ["--dynamics"]
        run_all(f"rendering {name}", [(f"render-{name}", [*synth, *dynamics])], logs)
    for source, name in PERMUTED.items():
        permuted = root / "faces" / name
        if not permuted.exists():
            unfinished = permuted.with_name(f"{name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            permute_rows(root / "faces" / source, unfinished)
            unfinished.rename(permuted)
    create = ["mtl_dist.shards", "create"]
    commands = [
        (f"create-{name}", [*create, str(root / "faces" / name), str(root / "shards" / name), "--views", VIEW])
        for name in (*FACES, *PERMUTED.values())
    ]
    pictures = [str(root / "faces" / "others" / VIEW), str(root / "unlabelled"), "--views", VIEW, "--unlabelled"]
    commands.append(("create-unlabelled", [*create, *pictures]))
    run_all("shards", commands, logs)


def permute_rows(source: Path, dest: Path) -> None:
    """Lay out a set whose rows are permuted within every `WINDOW` of a video; labels go with their pictures.

    The frames keep their numbers, and each has another one's picture.
    """
    rng = np.random.default_rng(0)
    dest.mkdir()
    for name in FILES.values():
        header, *lines = (source / name).read_text().splitlines()
        images, labels = zip(*(line.split(",", 1) for line in lines))
        videos = number_videos([image.split("/")[0] for image in images])
        written = [header]
        for block in blocks(videos):
            for place, taken in zip(block, rng.permutation(block)):
                path = dest / VIEW / images[place].split("/")[0] / f"{place:08d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to((source / VIEW / images[taken]).absolute())
                written.append(f"{path.parent.name}/{path.name},{labels[taken]}")
        (dest / name).write_text("\n".join(written) + "\n")


def blocks(videos: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the rows of every video, `WINDOW` at a time; a video's rows stand together."""
    for rows in np.split(np.arange(len(videos)), np.flatnonzero(np.diff(videos)) + 1):
        yield from np.split(rows, range(WINDOW, len(rows), WINDOW))


def make_features(root: Path) -> None:
    """Train the networks on other people, and describe all pictures with them."""
    runs, logs, others = root / "runs", root / "logs", root / "shards" / "others" / VIEW
    size = ["--data.image-size", str(SIZE), "--engine.threads", "1"]
    commands = []
    for name, preset, data in (
        ("cnn", "small", others),
        ("vgg", "small", others),
        ("mae", "small-mae", root / "unlabelled" / VIEW),
    ):
        own = ["mtl_dist.train", "--local", "--preset", preset, "--run.storage", str(runs), "--run.name", name, *size]
        own += ["--data.train", str(data / "train"), "--data.val", str(data / "val")]
        own += {"cnn": ["--model.image-size", "80"], "vgg": ["--model.backbone", "vgg_small"], "mae": []}[name]
        commands.append((name, [*own, "--train.epochs", str(EPOCHS[name])]))
    run_all("training what makes features", commands, logs)
    create = ["mtl_dist.features", "create"]
    commands = []
    for name in ("dynamic", "static", *PERMUTED.values()):
        data = [str(root / "shards" / name / VIEW / split) for split in ("train", "val")]
        made = [*create, str(root / "features" / name), "--data", *data, "--runs", *(str(runs / net) for net in NETS)]
        commands.append((f"features-{name}", [*made, "--names", *NETS, "--local", "--jobs", "1"]))
    run_all("features", commands, logs)


# ------------------------------------------------------------------------------------------------------------- training


def run_name(arm: str, seed: int) -> str:
    return f"{arm.replace(',', '').replace(' + ', '-').replace(' ', '-')}-{seed}"


def train(args: argparse.Namespace) -> None:
    commands = []
    for seed in range(args.seeds):
        for name, arm in ARMS.items():
            sets = {
                split: [str(args.dir / "features" / arm.faces / one / VIEW / split) for one in arm.sets]
                for split in ("train", "val")
            }
            run = run_name(name, seed)
            command = ["mtl_dist.train", "--local", "--preset", "small-c", "--run.storage", str(args.dir / "runs")]
            command += ["--run.name", run, "--run.seed", str(seed), "--engine.threads", "1", *arm.flags]
            command += ["--train.epochs", str(TRAIN_EPOCHS), "--train.eval-every", "2"]
            commands.append((run, [*command, "--data.train", *sets["train"], "--data.val", *sets["val"]]))
    run_all("training", commands, args.dir / "logs")


def make_pages(args: argparse.Namespace) -> None:
    """Make a page of every set of faces: what is on one is compared on the same rows."""
    commands = []
    for faces in dict.fromkeys(arm.faces for arm in ARMS.values()):
        names = [run_name(name, seed) for name, arm in ARMS.items() if arm.faces == faces for seed in range(args.seeds)]
        runs = [str(args.dir / "runs" / name) for name in names]
        page = args.dir / f"report-{faces}"
        commands.append((page.name, ["mtl_dist.report", *runs, "--out", str(page)]))
    run_all("the pages", commands, args.dir / "logs")


# -------------------------------------------------------------------------------------------------------------- scoring


def read_arm(args: argparse.Namespace, name: str) -> list[PredictionTable]:
    """Return what every seed of an arm says of the validation rows."""
    page = args.dir / f"report-{ARMS[name].faces}"
    return [read_predictions(str(page / "data" / f"{run_name(name, seed)}.parquet")) for seed in range(args.seeds)]


def predicted(table: PredictionTable) -> Predicted:
    return Predicted(table.predicted, number_videos(table.videos))


def compare_dynamic(args: argparse.Namespace) -> dict[str, Any]:
    found = {
        name: list(map(predicted, read_arm(args, name)))
        for name, arm in ARMS.items()
        if not arm.faces.startswith("static")
    }
    found["frame, smoothed"] = list(map(smooth_best, read_arm(args, "frame")))
    return compare(found, LEADS, ("p", *TASKS))


def compare_static(args: argparse.Namespace) -> dict[str, Any]:
    found = {
        name: list(map(predicted, read_arm(args, name))) for name, arm in ARMS.items() if arm.faces.startswith("static")
    }
    found["static, frame, smoothed"] = list(map(smooth_best, read_arm(args, "static, frame")))
    pairs = [(f"static, {name}", f"static, {reference}") for name, reference in STATIC_LEADS]
    return compare(found, pairs, ("p", *TASKS))


def smooth_best(table: PredictionTable) -> Predicted:
    """Smooth every task as far as is best on the videos of the other folds."""
    one, timeline = predicted(table), make_timeline(table.images, table.videos)
    order = np.lexsort((timeline.frame, timeline.video))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order)) - np.searchsorted(timeline.video[order], timeline.video[order])
    rows = Timeline(timeline.video, place)
    told, targets, folds = one.rows.predictions, one.rows.targets, make_folds(one.videos, NUM_FOLDS, seed=0)
    smoothed = {
        half: Predictions(*(smooth(values, rows, np.full(values.shape[1], half)) for values in told))
        for half in HALF_WINDOWS
    }
    best = Predictions(*(np.array(values, np.float64) for values in told))
    for fold in range(folds.max() + 1):
        others, own = folds != fold, folds == fold
        known = {half: score_rows(values, targets, others) for half, values in smoothed.items()}
        for task in TASKS:
            half = max(known, key=lambda half: known[half][task])
            getattr(best, task)[own] = getattr(smoothed[half], task)[own]
    return Predicted(PredictedRows(one.rows.rows, best, targets), one.videos)


def score_rows(told: Predictions, targets: Targets, rows: np.ndarray) -> dict[str, Any]:
    return scores(metric_sums(Predictions(*(v[rows] for v in told)), Targets(*(v[rows] for v in targets))))


def draw_video(args: argparse.Namespace) -> None:
    """Draw what two arms say of valence and arousal over one video, beside the labels, with some of its faces."""
    tables = {name: read_arm(args, name)[0] for name in ("frame", "gru both ways")}
    first, *_ = tables.values()
    videos, labelled = np.array(first.videos), first.predicted.targets.va_mask
    video = max(sorted(set(first.videos)), key=lambda name: labelled[videos == name].sum())
    rows = np.flatnonzero(videos == video)
    rows = rows[np.argsort([first.images[row] for row in rows])]
    with canvas(9.6, 5.2) as figure:
        grid = figure.add_gridspec(3, NUM_FACES, height_ratios=[1, 1.4, 1.4])
        for column, place in enumerate(np.linspace(0, len(rows) - 1, NUM_FACES).astype(int)):
            axes = figure.add_subplot(grid[0, column])
            axes.imshow(Image.open(args.dir / "faces" / "dynamic" / VIEW / first.images[rows[place]]))
            axes.set_title(f"row {place}", fontsize=8, fontweight="normal")
            axes.axis("off")
        for line, what in enumerate(("valence", "arousal")):
            axes = figure.add_subplot(grid[line + 1, :])
            axes.plot(first.predicted.targets.va[rows, line], color=INK, linewidth=2.2, label="label")
            for (name, table), colour in zip(tables.items(), COLOURS):
                axes.plot(table.predicted.predictions.va[rows, line], color=colour, linewidth=1.2, label=name)
            axes.set_ylabel(what)
            axes.set_ylim(-1.05, 1.05)
        axes.set_xlabel(f"row of validation video {video}")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        (args.dir / "video.png").write_bytes(save_png(figure, dpi=110))


def count_parameters(args: argparse.Namespace) -> dict[str, int]:
    """Return how many parameters every arm has."""
    from mtl_dist.models import num_parameters
    from mtl_dist.runs.weights import load_weights, open_weights

    runs = {name: str(args.dir / "runs" / run_name(name, 0)) for name in ARMS}
    return {name: num_parameters(load_weights(open_weights(run))) for name, run in runs.items()}


if __name__ == "__main__":
    run_command(main)
