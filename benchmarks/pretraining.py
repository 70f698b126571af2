"""Does masked pre-training help? On rendered faces, with few labels and with all.

    python -m benchmarks.pretraining [--dir pretraining] [--seeds 3] [--out FILE]

`small-mae` is trained on rendered faces without their labels, of other people, and on the training pictures. Then

probe    scores of linear models over the frozen encoder's mean tokens, fitted on a tenth of the labelled videos: with
         the pre-trained encoder, a random one, and one that was pre-trained on pictures whose pixels are shuffled
tuned    preset small with that ViT, trained on that tenth, and on all videos: begun with the pre-trained encoder, and
         with random weights, as many steps

Every number is of the validation videos; intervals are of differences, bootstrapped over these videos. Interrupted, it
continues.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from benchmarks.loader import write_results
from mtl_dist.config import build_config
from mtl_dist.data.augment import normalise
from mtl_dist.data.cache import Cache
from mtl_dist.data.index import read_sets
from mtl_dist.data.loader import eval_batches
from mtl_dist.data.samples import open_samples
from mtl_dist.models.backbone import Backbone
from mtl_dist.models.backbones import build_backbone
from mtl_dist.objective.metrics import Predictions, Targets, metric_sums
from mtl_dist.objective.scores import scores
from mtl_dist.predicting.members import open_member, predict_member, row_names
from mtl_dist.processes import with_parent
from mtl_dist.report.intervals import number_videos
from mtl_dist.runs.weights import load_weights, open_weights
from mtl_dist.shards.annotations import FILES
from mtl_dist.training.tracking import read_records

VIEW, SIZE, VIT = "cropped_aligned", 96, "vit_small"
NUM_TRAIN, NUM_VAL, NUM_UNLABELLED = 3000, 1200, 3000
SHARE_LABELLED = 0.1  # of the videos
LABELS, STARTS = ("tenth", "all"), ("pictures", "random")
DRAWS = 1000


class Features(NamedTuple):
    """What an encoder makes of a set's pictures, with their labels."""

    tokens: np.ndarray  # (n, width)
    targets: Targets
    videos: np.ndarray  # (n,) numbered from 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("pretraining"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="of pre-training")
    parser.add_argument("--tuned-steps", type=int, default=600, help="of training with labels")
    parser.add_argument("--parts", nargs="+", choices=("probe", "tuned"), default=("probe", "tuned"))
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    begun = time.monotonic()
    make_sets(args.dir)
    train_all(args)
    results = [measure(args, seed) for seed in range(args.seeds)]
    figures = {"seeds": results, "seconds": round(time.monotonic() - begun)}
    print_table(results)
    if args.out:
        write_results(args.out, figures)


# ------------------------------------------------------------------------------------------------------------- the data


def make_sets(root: Path) -> None:
    """Render faces; make the labelled sets, a tenth of each seed's videos, and the sets without labels."""
    faces, others = root / "faces", root / "others"
    run("mtl_dist.shards", "synth", faces, "--num-train", NUM_TRAIN, "--num-val", NUM_VAL, done=faces / FILES["val"])
    run("mtl_dist.shards", "synth", others, "--num-train", NUM_UNLABELLED, "--num-val", 24, "--seed", 100,
        done=others / FILES["val"])  # fmt: skip
    create(faces, root / "all")
    pictures = root / "pictures"
    if not pictures.exists():
        for number, source in enumerate((faces, others)):
            shutil.copytree(source / VIEW, pictures / str(number))
        for path in sorted({line.split(",")[0] for line in (faces / FILES["val"]).read_text().splitlines()[1:]}):
            (pictures / "0" / path).unlink(missing_ok=True)
        shuffle_pixels(pictures, root / "shuffled")
    for name in ("pictures", "shuffled"):
        create(root / name, root / f"{name}-set", "--unlabelled")


def shuffle_pixels(source: Path, dest: Path) -> None:
    """Write every picture with its pixels in one other order, the same for all: nothing of a face's shape is left."""
    order = np.random.default_rng(0).permutation
    orders: dict[tuple[int, ...], np.ndarray] = {}
    for path in sorted(source.rglob("*.jpg")):
        pixels = np.asarray(Image.open(path))
        places = orders.setdefault(pixels.shape[:2], order(pixels.shape[0] * pixels.shape[1]))
        target = dest / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.reshape(-1, 3)[places].reshape(pixels.shape)).save(target, quality=95)


def make_part(root: Path, seed: int) -> Path:
    """Make a set of a tenth of the training videos, drawn by the seed; validation stays."""
    part = root / f"part-{seed}"
    if not part.exists():
        header, *rows = (root / "faces" / FILES["train"]).read_text().splitlines()
        videos = sorted({row.split("/")[0] for row in rows})
        chosen = np.random.default_rng(seed).permutation(videos)[: round(SHARE_LABELLED * len(videos))]
        part.mkdir()
        (part / VIEW).symlink_to((root / "faces" / VIEW).absolute())
        shutil.copy(root / "faces" / FILES["val"], part)
        kept = [row for row in rows if row.split("/")[0] in set(chosen)]
        (part / FILES["train"]).write_text("\n".join([header, *kept]) + "\n")
    return create(part, root / f"part-{seed}-set")


def create(source: Path, dest: Path, *flags: str) -> Path:
    run("mtl_dist.shards", "create", source, dest, "--views", VIEW, *flags, done=dest / VIEW / "val" / "index.json")
    return dest


def run(module: str, *args: object, done: Path | None = None) -> None:
    """Run a command of the project on one thread, unless what it makes is there."""
    if done is None or not done.exists():
        command = with_parent([sys.executable, "-m", module, *map(str, args)])
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


# ------------------------------------------------------------------------------------------------------------- training


def train(root: Path, name: str, data: Path, preset: str, seed: int, *flags: object) -> str:
    """Train a run, or go on with it; return its URI."""
    sets = [part for split in ("train", "val") for part in (f"--data.{split}", data / VIEW / split)]
    run("mtl_dist.train", "--local", "--preset", preset, "--run.storage", root / "runs", "--run.name", name,
        "--run.seed", seed, *sets, *flags)  # fmt: skip
    return str(root / "runs" / name)


def train_all(args: argparse.Namespace) -> None:
    """Train every run, one on each core: two on one thread are faster than one on two."""
    seeds = range(args.seeds)
    side_by_side(
        {f"{name}-{seed}": partial(pretrain, args, name, seed) for seed in seeds for name in ("pictures", "shuffled")}
    )
    if "tuned" in args.parts:
        labels_and_starts = list(product(seeds, LABELS, STARTS))
        side_by_side({f"tuned {one}": partial(tune, args, *one) for one in labels_and_starts})


def side_by_side(jobs: dict[str, Callable[[], str]]) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool, Progress() as bar:
        task = bar.add_task(f"{len(jobs)} runs", total=len(jobs))
        for name, job in {name: pool.submit(job) for name, job in jobs.items()}.items():
            bar.update(task, description=name)
            job.result()
            bar.advance(task)


def pretrain(args: argparse.Namespace, name: str, seed: int) -> str:
    """Train an autoencoder of one of the sets without labels."""
    data = args.dir / f"{name}-set"
    return train(args.dir, f"{name}-{seed}", data, "small-mae", seed, "--train.epochs", args.epochs)


def tune(args: argparse.Namespace, seed: int, labels: str, start: str) -> str:
    """Train with labels from the pre-trained encoder or from random weights, as many steps."""
    data = labelled(args.dir, labels, seed)
    rows = read_sets((str(data / VIEW / "train"),)).rows
    epochs = max(1, round(args.tuned_steps * 16 / rows))
    flags = ["--model.backbone", VIT, "--train.epochs", epochs, "--train.eval-every", max(1, epochs // 10)]
    if start != "random":
        flags += ["--run.start", args.dir / "runs" / f"{start}-{seed}", "--run.start-with", "backbone"]
    return train(args.dir, f"{labels}-{start}-{seed}", data, "small", seed, *flags)


def labelled(root: Path, labels: str, seed: int) -> Path:
    """Return the set with a tenth of the labelled videos, or with all."""
    return root / "all" if labels == "all" else make_part(root, seed)


def measure(args: argparse.Namespace, seed: int) -> dict:
    """Measure all of one seed; the runs are there."""
    root, part = args.dir, make_part(args.dir, seed)
    runs = {name: str(root / "runs" / f"{name}-{seed}") for name in ("pictures", "shuffled")}
    last = [record for record in read_records(runs["pictures"]) if record["kind"] == "eval"][-1]
    found = {
        "masked_loss": last["scores"]["masked_loss"],
        "constant_picture": last["constant"]["masked_loss"],
    }
    encoders: dict[str, Callable[[], Backbone]] = {
        name: lambda uri=uri: load_weights(open_weights(uri), objective="masked").backbone for name, uri in runs.items()
    }
    encoders["random"] = lambda: random_encoder(seed)
    if "probe" in args.parts:
        found |= compare("probe", {name: probe(build(), part, root / "all") for name, build in encoders.items()})
    if "tuned" in args.parts:
        for labels in LABELS:
            tuned = {start: predicted(tune(args, seed, labels, start)) for start in STARTS}
            found |= compare(f"tuned_{labels}", tuned)
    return found


def random_encoder(seed: int) -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_backbone(VIT, SIZE)


# -------------------------------------------------------------------------------------------------------------- scoring


@torch.inference_mode()
def extract(backbone: Backbone, uri: str) -> Features:
    """Return the mean token of every picture of a set."""
    backbone.eval()
    sets, config = read_sets((uri,)), build_config({"data": {"image_size": SIZE}}).data
    samples = open_samples(sets, config, Cache(None))
    tokens, labels = [], []
    for batch in eval_batches(samples, batch=64, rank=0, num_ranks=1, workers=1, prefetch=2):
        tokens.append(backbone(normalise(batch.inputs, SIZE)[:, 0]).mean((2, 3)).numpy())
        labels.append([column[:, 0].numpy().copy() for column in batch.labels])
    names = samples.names()
    videos = number_videos([video or image for video, image in zip(names.videos, names.images)])
    return Features(np.concatenate(tokens), Targets(*map(np.concatenate, zip(*labels))), videos)


def probe(backbone: Backbone, part: Path, whole: Path) -> tuple[Predictions, Targets, np.ndarray]:
    """Fit linear models on the training rows of a part, and predict the validation rows."""
    train, val = extract(backbone, str(part / VIEW / "train")), extract(backbone, str(whole / VIEW / "val"))
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
    return Predictions(va, expr, au), val.targets, val.videos


def predicted(run_uri: str) -> tuple[Predictions, Targets, np.ndarray]:
    """Return what a run's best checkpoint says of the validation rows."""
    member = open_member(run_uri)
    found = predict_member(member, device=torch.device("cpu"))
    return found.predictions, found.targets, number_videos(row_names(member).videos)


def compare(what: str, methods: dict[str, tuple[Predictions, Targets, np.ndarray]]) -> dict:
    """Return P of every method, and the interval of the pre-trained one's lead over the random one."""
    _, targets, videos = methods["pictures"]
    p = {name: score(predictions, targets) for name, (predictions, *_) in methods.items()}
    rng, count = np.random.default_rng(0), videos.max() + 1
    rows_of = [np.flatnonzero(videos == video) for video in range(count)]
    leads = []
    for _ in range(DRAWS):
        rows = np.concatenate([rows_of[video] for video in rng.integers(0, count, count)])
        drawn = [score(*(take(part, rows) for part in methods[name][:2])) for name in ("pictures", "random")]
        leads.append(drawn[0] - drawn[1])
    low, high = np.quantile(leads, [0.025, 0.975])
    return {what: p, f"{what}_lead": p["pictures"] - p["random"], f"{what}_interval": [float(low), float(high)]}


def take(part: Predictions | Targets, rows: np.ndarray) -> Predictions | Targets:
    return type(part)(*(column[rows] for column in part))


def score(predictions: Predictions, targets: Targets) -> float:
    return scores(metric_sums(predictions, targets))["p"]


def print_table(results: list[dict]) -> None:
    print(f"{'':28}{'mean':>9}   of every seed")
    for key in results[0]:
        values = [result[key] for result in results]
        if isinstance(values[0], dict):
            for name in values[0]:
                print_row(f"{key} {name}", [value[name] for value in values])
        elif isinstance(values[0], float):
            print_row(key, values)
        else:
            print(f"{key:28}{'':>9}   {', '.join(f'{low:+.3f} to {high:+.3f}' for low, high in values)}")


def print_row(what: str, values: list[float]) -> None:
    print(f"{what:28}{np.mean(values):>9.3f}   {', '.join(f'{value:.3f}' for value in values)}")


if __name__ == "__main__":
    main()
