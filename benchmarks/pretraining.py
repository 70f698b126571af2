"""Does masked pre-training help? On rendered faces, with few labels and with all; on photographs.

    python -m benchmarks.pretraining [--dir pretraining] [--seeds 3] [--photographs DIR] [--out FILE]

`small-mae` is trained on rendered faces without labels, of other people than all below. Then, on images of 64 pixels,

probe        scores of linear models over the frozen encoder's mean tokens, fitted on a tenth of the labelled videos:
             with the pre-trained encoder, a random one, and one pre-trained on pictures whose pixels are shuffled
tenth, all   preset small with that ViT, trained on such a tenth, and on all videos: begun with the pre-trained
             encoder, and with random weights, as many steps
photographs  of a set in the s-Aff-Wild2 layout: trained on its expressions from random weights, from the encoder of
             rendered faces, from one pre-trained on the photographs' own pixels (of training people), and from one
             pre-trained on rendered faces and then on these

Scores are of validation videos; trainings with labels are scored by the checkpoint with the highest P on them, of as
many in every arm. Intervals are of differences between means over seeds, bootstrapped over these videos. Every seed
has a tenth of its own, the same for all arms. The control of shuffled pixels has one seed. One run a core; interrupted,
it continues.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from benchmarks.comparators import read_spent, run_all, timed, train_args
from benchmarks.leads import Predicted, compare, print_comparison, read_page
from benchmarks.loader import write_results
from mtl_dist.config import build_config
from mtl_dist.data.augment import normalise
from mtl_dist.data.cache import Cache
from mtl_dist.data.index import read_sets
from mtl_dist.data.loader import eval_batches
from mtl_dist.data.samples import open_samples
from mtl_dist.errors import run_command
from mtl_dist.models.backbone import Backbone
from mtl_dist.models.backbones import build_backbone
from mtl_dist.objective.affect import PredictedRows
from mtl_dist.objective.metrics import Predictions, Targets
from mtl_dist.presets import load_preset
from mtl_dist.report.intervals import number_videos
from mtl_dist.runs.weights import load_weights, open_weights
from mtl_dist.shards.annotations import FILES
from mtl_dist.timeline import video_names
from mtl_dist.training.tracking import read_records

VIEW, SIZE, VIT = "cropped_aligned", 64, "vit_small"
NUM_TRAIN, NUM_VAL, FACES_SEED = 3000, 1200, 1  # the recipe was chosen on faces of seed 0
NUM_UNLABELLED, UNLABELLED_SEEDS = 3000, (100, 101)
SHARE_LABELLED = 0.1  # of the videos
MASKED = ["--train.global-batch", 64, "--optim.lr", 1.5e-3]  # of the autoencoders, beside small-mae
STEPS = {"tenth": 400, "all": 600, "photos": 200}  # of training with labels
PHOTO_MASKED_STEPS = 600
NUM_CONTROLS = 1  # seeds that shuffled pixels are pre-trained with
EVALUATIONS = 6  # of a training with labels
PHOTO_STARTS = {"random": None, "rendered": "pictures", "own": "own", "rendered, own": "both"}
Command = tuple[str, list[str]]


class Features(NamedTuple):
    """What an encoder makes of a set's pictures, with their labels."""

    tokens: np.ndarray  # (n, width)
    targets: Targets
    videos: np.ndarray  # (n,) numbered from 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("pretraining"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40, help="of pre-training")
    parser.add_argument("--photographs", type=Path, help="a set in the s-Aff-Wild2 layout, cropped_aligned")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    with timed(args.dir / "spent.json", of=[args.seeds, args.epochs]):
        make_sets(args.dir, args.seeds)
        pretrain(args)
        tune(args)
        found = {"masked": masked_losses(args), "probe": probes(args)} | tuned(args)
    spent = read_spent(args.dir / "spent.json")
    if args.photographs:
        found["photographs"] = photographs(args)
    print_masked(found["masked"])
    for what, comparison in found.items():
        if what != "masked":
            print_comparison(what, comparison)
    print(f"\nin {spent['seconds'] / 60:.0f} min without the photographs; pages: {args.dir}/report-*/report.html")
    if args.out:
        about = {
            "rows": [NUM_TRAIN, NUM_VAL],
            "epochs": args.epochs,
            "steps": STEPS,
            "seconds": round(spent["seconds"]),
        }
        write_results(args.out, about | found)


# ------------------------------------------------------------------------------------------------------------- the data


def make_sets(root: Path, seeds: int) -> None:
    """Render faces; make the labelled sets, a tenth of the videos a seed and all, and the sets without labels."""
    logs, others = root / "logs", {seed: root / f"others-{seed}" for seed in UNLABELLED_SEEDS}
    renders = {root / "faces": (FACES_SEED, NUM_TRAIN, NUM_VAL)}
    renders |= {path: (seed, NUM_UNLABELLED, 24) for seed, path in others.items()}
    for path, sizes in renders.items():
        flags = [part for pair in zip(("--seed", "--num-train", "--num-val"), map(str, sizes)) for part in pair]
        run_all(f"rendering {path.name}", [(path.name, ["mtl_dist.shards", "synth", str(path), *flags])], logs)
    for seed, path in others.items():
        write_once(root / "pictures" / str(seed), partial(shutil.copytree, path / VIEW))
        write_once(root / "shuffled" / str(seed), partial(shuffle_pixels, path / VIEW))
    commands = [create(root / "faces", root / "all")]
    for draw in range(seeds):
        make_part(root, draw)
        commands.append(create(root / f"part-{draw}", root / f"tenth-{draw}"))
    for name in ("pictures", "shuffled"):
        commands.append(create(root / name, root / f"{name}-set", "--unlabelled"))
    run_all("shards", commands, logs)


def write_once(dest: Path, write: Callable[[Path], object]) -> None:
    """Write a directory, unless it is there; half of one never is."""
    if not dest.exists():
        unfinished = dest.with_name(f"{dest.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write(unfinished)
        unfinished.rename(dest)


def shuffle_pixels(source: Path, dest: Path) -> None:
    """Write every picture, as the model would see it, with its pixels in one other order: nothing of its shape is left.

    The order is the same for all.
    """
    order = np.random.default_rng(0).permutation(SIZE**2)
    for path in sorted(source.rglob("*.jpg")):
        pixels = np.asarray(Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))
        target = (dest / path.relative_to(source)).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.reshape(-1, 3)[order].reshape(pixels.shape)).save(target)


def make_part(root: Path, draw: int) -> None:
    """Lay out a tenth of the training videos, another one each draw, and all of validation."""
    part = root / f"part-{draw}"
    shutil.rmtree(part, ignore_errors=True)
    header, *rows = (root / "faces" / FILES["train"]).read_text().splitlines()
    videos = sorted({row.split("/")[0] for row in rows})
    chosen = set(np.random.default_rng(draw).permutation(videos)[: round(SHARE_LABELLED * len(videos))])
    part.mkdir()
    (part / VIEW).symlink_to((root / "faces" / VIEW).absolute())
    shutil.copy(root / "faces" / FILES["val"], part)
    kept = [row for row in rows if row.split("/")[0] in chosen]
    (part / FILES["train"]).write_text("\n".join([header, *kept]) + "\n")


def create(source: Path, dest: Path, *flags: str) -> Command:
    return f"create-{dest.name}", ["mtl_dist.shards", "create", str(source), str(dest), "--views", VIEW, *flags]


# ------------------------------------------------------------------------------------------------------------- training


def train(root: Path, name: str, data: Path, preset: str, seed: int, *flags: object) -> Command:
    """Return the command that trains a run, or goes on with it."""
    command = train_args(root / "runs", name, preset, data / VIEW)
    return name, [*command, "--run.seed", str(seed), "--data.image-size", str(SIZE), *map(str, flags)]


def pretrain(args: argparse.Namespace) -> None:
    """Train an autoencoder of the pictures for every seed, and one of the shuffled ones."""
    commands = [
        train(
            args.dir,
            f"{name}-{seed}",
            args.dir / f"{name}-set",
            "small-mae",
            seed,
            *MASKED,
            "--train.epochs",
            args.epochs,
        )
        for seed in range(args.seeds)
        for name in (("pictures", "shuffled") if seed < NUM_CONTROLS else ("pictures",))
    ]
    run_all("masked pre-training", commands, args.dir / "logs")


def tune(args: argparse.Namespace) -> None:
    """Train with labels from the pre-trained encoders and from random weights, as many steps."""
    commands = [
        with_labels(args.dir, data, start, seed)
        for seed in range(args.seeds)
        for data in ("tenth", "all")
        for start in ("pictures", None)
    ]
    run_all("training with labels", commands, args.dir / "logs")


def with_labels(root: Path, data: str, start: str | None, seed: int, *flags: object) -> Command:
    """Return the command that trains preset small with the ViT; `start` names the autoencoders it begins with."""
    labelled = root / (f"{data}-{seed}" if data == "tenth" else data)
    epochs = epochs_of(labelled, STEPS[data], batch=16)
    own = ["--model.backbone", VIT, "--train.epochs", epochs, "--train.eval-every", -(-epochs // EVALUATIONS)]
    if start:
        own += ["--run.start", root / "runs" / f"{start}-{seed}", "--run.start-with", "backbone"]
    return train(root, f"{data}-{start or 'random'}-{seed}", labelled, "small", seed, *own, *flags)


def epochs_of(data: Path, steps: int, *, batch: int) -> int:
    """Return the epochs of a set that have about so many steps."""
    return max(1, round(steps / (read_sets((str(data / VIEW / "train"),)).rows // batch)))


# -------------------------------------------------------------------------------------------------------------- scoring


def masked_losses(args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the last validation loss of hidden patches of every seed, and the best constant picture's."""
    runs = [str(args.dir / "runs" / f"pictures-{seed}") for seed in range(args.seeds)]
    last = [[record for record in read_records(run) if record["kind"] == "eval"][-1] for run in runs]
    kinds = {"autoencoder": "scores", "constant picture": "constant"}
    return {name: [record[kind]["masked_loss"] for record in last] for name, kind in kinds.items()}


def print_masked(losses: dict[str, list[float]]) -> None:
    print("loss of hidden patches, validation")
    for name, values in losses.items():
        print(f"  {name:42}{np.mean(values):8.4f}   {' '.join(f'{value:.4f}' for value in values)}")


def probes(args: argparse.Namespace) -> dict[str, Any]:
    """Compare linear models over the frozen encoders."""
    found: dict[str, list[Predicted]] = {name: [] for name in ("pictures", "shuffled", "random")}
    for seed in range(args.seeds):
        for name, scored in found.items():
            if name == "shuffled" and seed >= NUM_CONTROLS:
                continue
            encoder = random_encoder(seed) if name == "random" else pretrained(args.dir / "runs" / f"{name}-{seed}")
            scored.append(probe(encoder, args.dir / f"tenth-{seed}"))
    return compare(found, [("pictures", "random"), ("shuffled", "random"), ("pictures", "shuffled")])


def random_encoder(seed: int) -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_backbone(VIT, SIZE)


def pretrained(run: Path) -> Backbone:
    return load_weights(open_weights(str(run)), objective="masked").backbone


def tuned(args: argparse.Namespace) -> dict[str, Any]:
    """Compare the trainings with labels."""
    found = {}
    for data in ("tenth", "all"):
        names = {name: [f"{data}-{name}-{seed}" for seed in range(args.seeds)] for name in ("pictures", "random")}
        found[data] = compare_runs(args.dir, data, names, [("pictures", "random")])
    return found


def compare_runs(
    root: Path, what: str, names: dict[str, list[str]], pairs: list[tuple[str, str]], keys: tuple[str, ...] = ("p",)
) -> dict[str, Any]:
    """Make the page of methods, each of a run a seed, and compare them."""
    page, runs = (
        root / f"report-{what}",
        [str(root / "runs" / name) for of_method in names.values() for name in of_method],
    )
    run_all("the page", [(page.name, ["mtl_dist.report", *runs, "--out", str(page)])], root / "logs")
    return compare({name: read_page(page, of_method) for name, of_method in names.items()}, pairs, keys)


@torch.inference_mode()
def extract(backbone: Backbone, uri: str) -> Features:
    """Return the mean token of every picture of a set."""
    backbone.eval()
    sets, own = read_sets((uri,)), {"data": {"image_size": SIZE}, "model": {"backbone": VIT}}
    samples = open_samples(sets, build_config(load_preset("small"), own), Cache(None))
    rows, tokens, labels = [], [], []
    for batch in eval_batches(samples, batch=64, rank=0, num_ranks=1, workers=1, prefetch=2):
        rows.append(batch.rows[:, 0].numpy().copy())
        tokens.append(backbone(normalise(batch.inputs, SIZE)[:, 0]).mean((2, 3)).numpy())
        labels.append([column[:, 0].numpy().copy() for column in batch.labels])
    names = samples.names()
    videos = [own or video for own, video in zip(names.videos, video_names(names.images))]
    assert (np.concatenate(rows) == names.rows).all()
    return Features(np.concatenate(tokens), Targets(*map(np.concatenate, zip(*labels))), number_videos(videos))


def probe(backbone: Backbone, data: Path) -> Predicted:
    """Fit linear models on the training rows of a tenth, and predict the validation rows."""
    train, val = (extract(backbone, str(data / VIEW / split)) for split in ("train", "val"))
    scaler = StandardScaler().fit(train.tokens)
    x, new, y = scaler.transform(train.tokens), scaler.transform(val.tokens), train.targets
    va = Ridge(alpha=10.0).fit(x[y.va_mask], y.va[y.va_mask]).predict(new).clip(-1, 1)
    classes = LogisticRegression(C=0.1, max_iter=1000, class_weight="balanced").fit(x[y.expr_mask], y.expr[y.expr_mask])
    expr = np.zeros((len(new), 8))
    expr[:, classes.classes_] = classes.predict_proba(new)
    au = np.zeros((len(new), 12))
    for unit in range(12):
        rows, on = y.au_mask[:, unit], y.au[:, unit]
        if len(np.unique(on[rows])) == 2:
            model = LogisticRegression(C=0.1, max_iter=1000, class_weight="balanced").fit(x[rows], on[rows])
            au[:, unit] = model.predict_proba(new)[:, 1]
    return Predicted(PredictedRows(np.arange(len(new)), Predictions(va, expr, au), val.targets), val.videos)


# ---------------------------------------------------------------------------------------------------------- photographs


def photographs(args: argparse.Namespace) -> dict[str, Any]:
    """Train on photographs of expressions from every start, and compare F1."""
    root, seeds = args.dir, range(args.seeds)
    write_once(root / "photo-pictures", partial(copy_training_people, args.photographs))
    own = root / "photo-pictures-set"
    made = [create(root / "photo-pictures", own, "--unlabelled"), create(args.photographs, root / "photos")]
    run_all("shards of photographs", made, root / "logs")
    epochs = epochs_of(own, PHOTO_MASKED_STEPS, batch=32)
    masked = ["--train.global-batch", 32, "--train.epochs", epochs, "--train.eval-every", epochs]
    autoencoders = [train(root, f"own-{seed}", own, "small-mae", seed, *masked) for seed in seeds]
    autoencoders += [
        train(root, f"both-{seed}", own, "small-mae", seed, *masked, "--run.start", root / "runs" / f"pictures-{seed}")
        for seed in seeds
    ]
    run_all("pre-training on photographs", autoencoders, root / "logs")
    only = ["--loss.va", 0, "--loss.au", 0]
    commands = {
        name: [with_labels(root, "photos", start, seed, *only) for seed in seeds]
        for name, start in PHOTO_STARTS.items()
    }
    run_all("training on photographs", [command for of in commands.values() for command in of], root / "logs")
    names = {name: [run for run, _ in of] for name, of in commands.items()}
    pairs = [(name, "random") for name in PHOTO_STARTS if name != "random"]
    return compare_runs(root, "photographs", names, pairs, ("expr",))


def copy_training_people(photographs: Path, dest: Path) -> None:
    """Copy the pictures of training's people, none of whom may be in validation."""
    people = []
    for split in ("train", "val"):
        with (photographs / FILES[split]).open(newline="") as file:
            people.append({row["image"].split("/")[0] for row in csv.DictReader(file)})
    if shared := people[0] & people[1]:
        raise SystemExit(f"error: {len(shared)} people of {photographs} are in both splits, such as {min(shared)}")
    for name in sorted(people[0]):
        shutil.copytree(photographs / VIEW / name, dest / name)


if __name__ == "__main__":
    run_command(main)
