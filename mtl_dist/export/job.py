"""Make an export: the weights, the graph that is checked against torch, the model card."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from mtl_dist import storage
from mtl_dist.config import Config
from mtl_dist.data.augment import build_preparation
from mtl_dist.data.index import read_sets
from mtl_dist.data.unlabelled import unlabelled
from mtl_dist.errors import InputError
from mtl_dist.export.card import ONNX, Checked, write_card
from mtl_dist.export.graph import check_onnx_installed, largest_difference, run_onnx, write_onnx
from mtl_dist.export.options import ExportCommand
from mtl_dist.families import reads_videos
from mtl_dist.models import non_finite
from mtl_dist.objective.metrics import Predictions
from mtl_dist.objective.scores import constant_scores, label_sums
from mtl_dist.predicting.evaluate import predict
from mtl_dist.predicting.inputs import open_frames, parent_uri
from mtl_dist.predicting.predictions import check_finite
from mtl_dist.runs import CONFIG_NAME
from mtl_dist.runs.checkpoint import MODEL
from mtl_dist.runs.weights import EXPORTED_CONFIG, Weights, exported_config, load_weights, open_weights
from mtl_dist.sealed import seal
from mtl_dist.training.tracking import read_records

TOLERANCE = 1e-4
NUM_FACES = 64
NUM_RANDOM = 8
CHECK_BATCH = 16


def export(command: ExportCommand) -> None:
    """Check the run and --out, then write all files, config.json last. Raises `InputError`."""
    if "onnx" in command.formats:
        check_onnx_installed()
    weights = open_weights(command.run)
    if reads_videos(weights.config.model.name):
        raise InputError(
            f"{command.run} reads whole videos, and an export is of models of single pictures; use the run itself: "
            f"python -m mtl_dist.predict --runs {command.run} --extractors ..."
        )
    if not weights.state:
        raise InputError(f"{command.run} is an export already; name the run that it came from")
    _check_apart(command.out, weights)
    _check_out(command.out)
    with storage.scratch_directory("export") as scratch:
        files: dict[str, dict[str, Any]] = {}
        model = load_weights(weights)
        _check_weights(model, weights.uri)
        if "safetensors" in command.formats:
            write_weights(model, scratch / MODEL)
            files[MODEL] = describe_file(scratch / MODEL)
        checked = None
        if "onnx" in command.formats:
            faces = _read_faces(command, weights, scratch)
            checked = _export_onnx(model, weights, faces, scratch / ONNX)
            files[ONNX] = describe_file(scratch / ONNX)
        card = write_card(weights, files=files, constant=_constant_scores(weights), checked=checked)
        # config.json is what makes it an export: away first, and there again when all else is.
        for name in (EXPORTED_CONFIG, MODEL, ONNX):
            storage.delete(storage.join(command.out, name))
        for name in files:
            storage.upload(scratch / name, storage.join(command.out, name))
        storage.write_bytes(storage.join(command.out, "README.md"), card.encode())
        config = exported_config(weights, files).model_dump(mode="json")
        storage.write_bytes(storage.join(command.out, EXPORTED_CONFIG), seal(config))
    print(f"exported {weights.uri} to {command.out}: {', '.join((*files, 'README.md', EXPORTED_CONFIG))}")


def _check_apart(out: str, weights: Weights) -> None:
    """Raise where the export would be taken for a run, or damage its checkpoints."""
    own = storage.absolute(weights.uri)
    run_uri = own.rpartition("/checkpoints/")[0]  # empty where the checkpoint is a copy outside a run
    target = storage.join(storage.absolute(out))
    if target in (own, run_uri) or (run_uri and f"{target}/".startswith(f"{run_uri}/checkpoints/")):
        raise InputError(f"--out is {out}, where the run itself keeps its files; name another directory")
    if storage.exists(storage.join(out, CONFIG_NAME)):  # whoever predicts with that run would take this one's weights
        raise InputError(f"--out is {out}, which is a run; name another directory")


def _check_out(out: str) -> None:
    """Raise unless files can be written to --out: now, and not after the graph was made."""
    storage.check_lasting(out, flag="--out")
    if storage.is_s3(out):  # a bucket has nothing above it
        storage.check_writable(out)
        return
    if storage.exists(out):
        raise InputError(f"--out is {out}, which is a file; expected a directory, which may be there already or not")
    # Not --out itself where there is none, which would be left behind empty where the graph is refused.
    storage.check_writable(out if storage.local_path(out).is_dir() else parent_uri(out.rstrip("/")))


def _check_weights(model: nn.Module, uri: str) -> None:
    if wrong := non_finite(model):
        raise InputError(f"{uri} has weights that are not finite ({', '.join(wrong[:3])}); train it again")


def write_weights(model: nn.Module, path: Path) -> None:
    """Write the weights as an export has them."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, path, metadata={"format": "pt"})


def _export_onnx(model: nn.Module, weights: Weights, faces: np.ndarray, path: Path) -> Checked:
    """Write the graph and compare it with torch. Ends the command where they differ by more than `TOLERANCE`."""
    config = weights.config
    size = config.data.image_size
    print(f"writing ONNX of {weights.uri} ...", flush=True)
    write_onnx(model, path, image_size=size, input_size=config.input_size)
    noise = np.random.default_rng(0).integers(0, 256, (NUM_RANDOM, 3, size, size), np.uint8)
    differences = {}
    for name, images in (("faces", faces), ("pictures of noise", noise)):
        answers = _run_torch(model, images, config)
        numbers = range(1, len(images) + 1)
        check_finite(answers, [f"number {number} of the {name}" for number in numbers], source=weights.uri)
        found = largest_difference(run_onnx(path, images, batch=CHECK_BATCH), answers)
        differences[name] = found
        print(f"onnxruntime and torch differ by {found:.1e} at most on {len(images)} {name} (at most {TOLERANCE:.0e})")
        if not found <= TOLERANCE:  # NaN neither
            sys.exit(
                f"error: the ONNX graph of {weights.uri} does not answer as torch does: {found:.1e} on {name}, at most "
                f"{TOLERANCE:.0e} is let through; nothing was written. --formats safetensors exports the weights alone"
            )
    return Checked(max(differences.values()), len(faces), len(noise))


def _run_torch(model: nn.Module, images: np.ndarray, config: Config) -> Predictions:
    """Predict (n, 3, S, S) uint8 as predict and the ensemble do, in fp32."""
    pixels = images.transpose(0, 2, 3, 1)
    starts = range(0, len(pixels), CHECK_BATCH)
    batches = [unlabelled(pixels[i : i + CHECK_BATCH], range(len(pixels[i : i + CHECK_BATCH]))) for i in starts]
    return predict(model, batches, prepare=build_preparation(config), device=torch.device("cpu")).predictions


def _read_faces(command: ExportCommand, weights: Weights, scratch: Path) -> np.ndarray:
    """Read up to `NUM_FACES` pictures (n, 3, S, S) uint8 as the model takes them."""
    config = weights.config
    split, sets = ("validation", config.data.val) if config.data.val else ("training", config.data.train)
    uri = command.images or sets[0]
    try:
        frames = open_frames(uri, scratch=scratch, cache_dir=command.cache_dir)
    except InputError as error:
        if command.images:
            raise
        raise InputError(
            f"the run's {split} set, which torch and onnxruntime are compared on, cannot be read ({error}); give other "
            "faces with --images, a directory or shard set"
        ) from None
    found, parts = 0, []
    batches = frames.batches(config.data.image_size, batch=CHECK_BATCH, workers=0, part=0, num_parts=1)
    for batch in batches:
        parts.append(batch.inputs[:, 0].numpy().copy())
        found += len(parts[-1])
        if found >= NUM_FACES:
            break
    return np.concatenate(parts)[:NUM_FACES]


def _constant_scores(weights: Weights) -> dict[str, Any] | None:
    """Return the constant predictor's scores on the run's validation set: as the run recorded them, else what the set's
    label counts tell. None where the set is not where it was."""
    with contextlib.suppress(InputError):  # damaged records are no reason to refuse an export
        for record in read_records(weights.uri.rpartition("/checkpoints/")[0]):
            if record["kind"] == "eval" and record["step"] == weights.checkpoint.step and "constant" in record:
                return record["constant"]
    try:
        val = read_sets(weights.config.data.val)
    except InputError:
        return None
    is_same = val.sha256 == weights.state["identity"]["validation set"]
    return constant_scores(label_sums(val.labels)) if is_same else None


def describe_file(path: Path) -> dict[str, Any]:
    """Return what config.json says of a file."""
    return {"bytes": path.stat().st_size, "sha256": storage.sha256_of(path)}
