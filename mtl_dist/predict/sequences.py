"""Predict videos with models of sequences: what describes every frame, then the model over each whole video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mtl_dist.data.augment import build_preparation, normalise
from mtl_dist.data.frames import Seen
from mtl_dist.data.unlabelled import no_labels
from mtl_dist.errors import InputError
from mtl_dist.families import FEATURES, reads_videos
from mtl_dist.features.extractors import FeatureNet, Network, build, find_feature_nets
from mtl_dist.features.options import CreateOptions
from mtl_dist.features.pooling import Pooled
from mtl_dist.objective.affect import PredictedRows
from mtl_dist.objective.metrics import Predictions, Targets
from mtl_dist.predicting.evaluate import forward_all, predict
from mtl_dist.predicting.inputs import Frames, ShardSet
from mtl_dist.predicting.spread import Outcome
from mtl_dist.runs.weights import FILE_SUFFIXES, Weights, is_local_file, load_weights
from mtl_dist.tasks import Batch
from mtl_dist.timeline import make_timeline

Progress = Callable[[int], None]


class Rows(NamedTuple):
    """Features of n frames, in the order of their rows."""

    rows: np.ndarray  # (n,) int64
    features: np.ndarray  # (n, D) float16, as a set of features has them


def check_models(runs: Sequence[str], models: Sequence[Weights], extractors: Sequence[str]) -> bool:
    """Return whether the models read features. Raises `InputError` where some do and some do not, and for models of
    videos that read pictures."""
    for run, weights in zip(runs, models):
        if reads_videos(weights.config.model.name) and weights.config.model.backbone != FEATURES:
            raise InputError(
                f"{run} reads windows of pictures, and predict reads pictures one by one: what it would say is none of "
                "what was scored; python -m mtl_dist.ensemble and report read its validation set"
            )
    reads = [weights.config.model.backbone == FEATURES for weights in models]
    if any(reads) and not all(reads):
        raise InputError(
            f"--runs names {runs[reads.index(True)]}, which reads features, and {runs[reads.index(False)]}, which "
            "reads pictures; predict with each apart (python -m mtl_dist.ensemble combines them)"
        )
    if extractors and not reads[0]:
        raise InputError(f"--extractors is for models of features, and {runs[0]} reads pictures; leave it out")
    return reads[0]


def find_extractors(runs: Sequence[str], models: Sequence[Weights], given: Sequence[str]) -> list[FeatureNet]:
    """Return what makes the features that the models were trained on. Raises `InputError` where `given` is not that."""
    wanted = models[0].extractors
    for run, weights in zip(runs, models):
        if [other.identity for other in weights.extractors] != [extractor.identity for extractor in wanted]:
            raise InputError(f"{runs[0]} and {run} were trained on other features; predict with each apart")
    if not wanted:
        raise InputError(f"{runs[0]} does not say what made its features: an export does not; name the run")
    count = sum(extractor.folds for extractor in wanted)
    names = ", ".join(f"{extractor.name} (sha256 {extractor.sha256[:8]})" for extractor in wanted)
    if len(given) != count:
        raise InputError(f"--extractors names {len(given)}; expected {count}, in this order: {names}")
    left, found = list(given), []
    for extractor in wanted:
        own, left = left[: extractor.folds], left[extractor.folds :]
        is_file = own[0].endswith(FILE_SUFFIXES) or is_local_file(own[0])
        options = CreateOptions(
            runs=tuple(own),
            pool=extractor.pool,
            folds=extractor.folds if extractor.folds > 1 else None,
            **({"backbone": extractor.name.partition(" ")[0], "image_size": extractor.input_size} if is_file else {}),
        )
        (net,) = find_feature_nets(options)
        if net.extractor.identity != extractor.identity:
            raise InputError(
                f"--extractors has {' '.join(own)}, with weights of sha256 {net.extractor.sha256[:8]}; {runs[0]} was "
                f"trained on features of {extractor.name}, sha256 {extractor.sha256[:8]}; give that one"
            )
        found.append(net)
    return found


def count_passes(nets: Sequence[FeatureNet]) -> int:
    """Return how often every frame is decoded: once for every size of pictures."""
    return len({network.image_size for net in nets for network in net.networks})


def predict_videos(
    models: Sequence[Weights],
    nets: Sequence[FeatureNet],
    frames: Frames,
    *,
    device: torch.device,
    batch: int,
    workers: int,
    progress: Progress,
) -> Outcome:
    """Describe all frames, then predict every video as a whole; rows in ascending order.

    `progress` is told of frames, once for each of `count_passes`. Raises `InputError`.
    """
    if isinstance(frames, ShardSet):
        raise InputError(
            f"--input is {frames.uri}, a shard set: describe it with python -m mtl_dist.features create, and score it "
            "with python -m mtl_dist.ensemble or python -m mtl_dist.report"
        )
    described, seen = describe_frames(nets, frames, device=device, batch=batch, workers=workers, progress=progress)
    images = frames.names(described.rows)
    # Frames that lie in no directory of the input are those of one video.
    timeline = make_timeline(images, [image.rpartition("/")[0] or "." for image in images])
    order = np.lexsort((timeline.frame, timeline.video))
    ends = np.flatnonzero(np.diff(timeline.video[order])) + 1
    videos = [_as_batch(described, places) for places in np.split(order, ends) if len(places)]
    total = None
    for weights in models:
        model = load_weights(weights).to(device)
        bf16 = weights.config.engine.autocast == "bf16"
        own = predict(model, videos, prepare=build_preparation(weights.config), device=device, bf16=bf16)
        total = own.predictions if total is None else Predictions(*(a + b for a, b in zip(total, own.predictions)))
    by_row = np.argsort(own.rows)
    mean = Predictions(*(array[by_row] / len(models) for array in total))
    return Outcome(PredictedRows(own.rows[by_row], mean, Targets(*(array[by_row] for array in own.targets))), seen)


@torch.inference_mode()
def describe_frames(
    nets: Sequence[FeatureNet], frames: Frames, *, device: torch.device, batch: int, workers: int, progress: Progress
) -> tuple[Rows, Seen]:
    """Return the features of all frames, those of several extractors side by side, and what was noticed."""
    opened = {network: build(network).to(device) for net in nets for network in net.networks}
    columns: dict[int, list[np.ndarray]] = {place: [] for place in range(len(nets))}
    rows, seen = np.zeros(0, np.int64), Seen()
    for size in dict.fromkeys(network.image_size for network in opened):
        # Folds are of one size, so a set of features is made in one pass.
        mine = [place for place, net in enumerate(nets) if net.networks[0].image_size == size]
        found, this_pass = [], Seen()
        describing = Describing([[(network, opened[network]) for network in nets[place].networks] for place in mine])
        batches = frames.batches(size, batch=batch, workers=workers, part=0, num_parts=1, seen=this_pass)
        for part, described in forward_all(
            describing, batches, prepare=lambda batch, draws: batch.inputs, device=device
        ):
            found.append(part.rows[:, 0].numpy().copy())
            for place, features in zip(mine, described):
                columns[place].append(features.cpu().numpy().astype(np.float16))
            progress(len(part.rows))
        rows = np.concatenate(found or [rows])
        seen = this_pass
    if not len(rows):
        raise InputError("--input has no frame that could be read")
    return Rows(rows, np.concatenate([np.concatenate(parts) for parts in columns.values()], axis=1)), seen


class Describing(nn.Module):
    """What describes pictures of one size: several sets of networks."""

    def __init__(self, sets: list[list[tuple[Network, Pooled]]]):
        super().__init__()
        self._sizes = [[network.input_size for network, _ in of_one] for of_one in sets]
        self.sets = nn.ModuleList([nn.ModuleList([model for _, model in of_one]) for of_one in sets])
        self.eval()

    def forward(self, inputs: Tensor, valid: Tensor) -> list[Tensor]:
        """Return features (n, D) of each set, the mean of its networks', of pictures (n, 1, 3, H, W)."""
        return [
            torch.stack([net(normalise(inputs, size)[:, 0]).float() for net, size in zip(models, sizes)]).mean(0)
            for models, sizes in zip(self.sets, self._sizes)
        ]


def _as_batch(described: Rows, places: np.ndarray) -> Batch:
    """Return the frames of one video, in their order, as a sample without labels."""
    return Batch(
        inputs=torch.from_numpy(described.features[places])[None],
        valid=torch.ones(1, len(places), dtype=torch.bool),
        labels=no_labels(1, len(places)),
        rows=torch.from_numpy(described.rows[places])[None],
        samples=torch.zeros(1, dtype=torch.int64),
    )
