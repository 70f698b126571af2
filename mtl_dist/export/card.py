"""The model card of an export, README.md: what it is, how to use it, what it was trained on and how well it does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from mtl_dist.data.index import NO_SET
from mtl_dist.families import FAMILIES, FEATURES, reads_videos
from mtl_dist.objective.scores import NO_SCORE, Score, main_scores, single_scores
from mtl_dist.runs.checkpoint import MODEL
from mtl_dist.runs.start import BEGAN_FROM
from mtl_dist.runs.teacher import TAUGHT_BY
from mtl_dist.runs.weights import Weights
from mtl_dist.tasks import AUS, EXPRESSIONS, TASKS

ONNX = "model.onnx"
_TASK_NAMES = {"va": "valence and arousal", "expr": "expression", "au": "action units"}
_VIEWS = {
    "cropped": "the face and a little around it, as it was in the frame",
    "cropped_aligned": "the face alone, turned and scaled so that the eyes are at the same places in every picture",
}


class Checked(NamedTuple):
    """How the ONNX graph was compared with torch."""

    difference: float  # the largest, of any VA or probability
    num_faces: int
    num_random: int


class Averaged(NamedTuple):
    """What weights are the mean of, where they are no checkpoint's."""

    what: str  # in a sentence
    chapter: str
    scores: Mapping[str, dict[str, Any]]  # of rows that stand above its own


def write_card(
    weights: Weights,
    *,
    files: dict[str, dict[str, Any]],
    constant: dict[str, Any] | None,
    checked: Checked | None,
    averaged: Averaged | None = None,
) -> str:
    """Write README.md; `constant` are the constant predictor's scores on the validation set, where it could be read.

    Of a mean of checkpoints `weights` has the state of the newest of them, and the mean's scores.
    """
    size, is_video = weights.config.data.image_size, reads_videos(weights.config.model.name)
    others = averaged.scores if averaged else {}
    parts = [
        _title(weights, averaged.what if averaged else ""),
        _io_of_videos(weights) if is_video else _io(weights),
        _TORCH.format(size=size) if MODEL in files and not is_video else "",
        _ONNX.format(size=size, classes=list(EXPRESSIONS)) if ONNX in files else "",
        _files(files, checked),
        averaged.chapter if averaged else "",
        _training(weights),
        _scores(weights.state["scores"] if weights.checkpoint.scores else None, constant, others)
        if weights.is_scored
        else f"## Scores\n\n{NO_SCORE.capitalize()}.",
        _LIMITS.format(frames=_OF_VIDEOS if is_video else _OF_FRAMES),
    ]
    return "\n".join(part.strip("\n") + "\n" for part in parts if part)


def _title(weights: Weights, averaged: str) -> str:
    model = weights.config.model
    is_bf16 = weights.config.engine.autocast == "bf16"
    bf16 = (
        "\nIt was evaluated with bfloat16 autocast; the weights are fp32, and ONNX computes in fp32." if is_bf16 else ""
    )
    view = weights.view
    cut = f" as those of view `{view}` are: {_VIEWS.get(view, 'that of its training data')}" if view else ""
    family = FAMILIES[model.name]
    step = f"step {weights.checkpoint.step} of run `{weights.config.run.name}`"
    reads = f"It reads one picture cut to one face{cut}"
    if reads_videos(model.name):
        reads = f"It reads the rows of whole videos{f', of view `{view}`' if view else ''}"
    return f"""
---
library_name: mtl_dist
pipeline_tag: image-classification
license: other
tags: [facial-affect, valence-arousal, facial-expression, action-units]
---

# Facial affect: valence and arousal, 8 expressions, 12 action units

Model `{model.name}` with backbone `{model.backbone}`, as in {family.what} ({family.paper}).
Trained and exported by mtl_dist: {averaged or step}.
{reads}.{bf16}
"""


def _io_of_videos(weights: Weights) -> str:
    if weights.config.model.backbone == FEATURES:
        made_by = [f"`{each.name}` (sha256 `{each.sha256}`)" for each in weights.extractors] or ["what is not known"]
        return (
            f"## Inputs\n\nFeatures of every frame, made by {' and '.join(made_by)}.\n\n"
            "`python -m mtl_dist.predict --runs THIS_DIRECTORY --extractors ... --input film.mp4 --out film.csv`"
        )
    return "## Inputs\n\nWindows of pictures: `python -m mtl_dist.ensemble --runs THIS_DIRECTORY --val SET --out DIR`"


def _io(weights: Weights) -> str:
    size, side = weights.config.data.image_size, weights.config.input_size
    resized = f", then resized to {side} x {side} on the device" if side != size else ""
    return f"""
## Inputs and outputs

- in: RGB, 0 to 255, resized to {size} x {size} (bilinear, antialiased){resized}, divided by 255 and normalised with
  ImageNet's mean and standard deviation. In {ONNX} all but the first resize is part of the graph.
- `va`: valence, arousal in [-1, 1]
- `expr`: probabilities of {", ".join(EXPRESSIONS)}
- `au`: probabilities of action units {", ".join(map(str, AUS))} (FACS numbers), each by itself; on above 0.5
"""


_TORCH = """
## torch

```python
import torch

from mtl_dist.data.augment import normalise
from mtl_dist.data.frames import read_image
from mtl_dist.runs.weights import load_weights, open_weights

weights = open_weights(".")  # this directory; the weights are checked against config.json
model = load_weights(weights)
images = torch.from_numpy(read_image("face.jpg", {size})).permute(2, 0, 1)[None, None]  # (samples, frames, 3, H, W)
valid = torch.ones(images.shape[:2], dtype=torch.bool)  # every frame is one, none is padding
with torch.no_grad():
    outputs = model(normalise(images, weights.config.input_size), valid)
print(outputs.va, outputs.expr_logits.softmax(-1), outputs.au_logits.sigmoid())
```

or, for many, `python -m mtl_dist.predict --runs THIS_DIRECTORY --input photos/ --out photos.csv`.
"""

_ONNX = """
## onnxruntime

```python
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

face = ImageOps.exif_transpose(Image.open("face.jpg")).convert("RGB")
face = face.resize(({size}, {size}), Image.Resampling.BILINEAR)
images = np.asarray(face).transpose(2, 0, 1)[None]  # (N, 3, {size}, {size}) uint8
va, expr, au = onnxruntime.InferenceSession("model.onnx").run(None, {{"images": images}})
print(va, {classes}[expr[0].argmax()], au)
```
"""


def _files(files: dict[str, dict[str, Any]], checked: Checked | None) -> str:
    lines = [f"- `{name}`: {about['bytes']:,} bytes, sha256 `{about['sha256']}`" for name, about in files.items()]
    if checked:
        lines.append(
            f"- {ONNX} run by onnxruntime differs from torch by {checked.difference:.1e} at most (any VA or "
            f"probability; {checked.num_faces} faces and {checked.num_random} pictures of noise, fp32, CPU)"
        )
    return "## Files\n\n" + "\n".join(lines)


def _training(weights: Weights) -> str:
    """Where it began is told by kind: a path would be one of the machine it was trained on."""
    kinds = {"none": "random initialisation", "imagenet": "weights trained on ImageNet"}
    began = f"The backbone began from {kinds.get(weights.config.model.weights, 'a file of weights')}"
    if note := weights.state.get(BEGAN_FROM):
        began = f"It began with {note['with']} of another run or file (sha256 of its weights `{note['sha256']}`)"
    config, of = weights.config, "of its index"
    if config.data.fold:
        of = f"of its index and its part: fold {config.data.fold} of the videos was held out for validation"
    sets = [
        f"- {name}: {sha256}" if sha256 == NO_SET else f"- {name}: sha256 `{sha256}` ({of})"
        for name, sha256 in weights.state["identity"].items()
    ]
    if note := weights.state.get(TAUGHT_BY):
        began += f"; labels that were missing were told by another run (sha256 of its weights `{note['sha256']}`)"
    loss = config.loss.model_copy(update={"teacher": "RUN" if note else config.loss.teacher})
    settings = {"loss": loss, "optim": config.optim, "train": config.train, "augment": config.augment}
    dumped = json.dumps({name: section.model_dump(mode="json") for name, section in settings.items()})
    return "\n".join(
        [
            "## Training",
            "",
            f"{began}; seed {config.run.seed}.",
            "",
            *sets,
            f"- settings: `{dumped}`",
        ]
    )


def _scores(
    scores: dict[str, Any] | None, constant: dict[str, Any] | None, others: Mapping[str, dict[str, Any]]
) -> str:
    """Write the table, a row for the constant predictor and each of the others, with what it does not say."""
    if scores is None:
        return "## Scores on the validation set\n\nThis checkpoint was not evaluated."
    rows = {"constant predictor": constant} if constant else {}
    rows |= {**others, "this model": scores}
    lines = [f"| | {' | '.join(score.title for score in main_scores())} |", f"|---{'|---' * len(main_scores())}|"]
    lines += [f"| {name} | {' | '.join(_cell(row, score) for score in main_scores())} |" for name, row in rows.items()]
    more = [score for score in single_scores() if not score.is_main and scores.get(score.key) is not None]
    lines += ["", f"| | {' | '.join(rows)} |", f"|---{'|---' * len(rows)}|"] if more else []
    for score in more:
        direction = ", lower is better" * (score.sign < 0)
        lines.append(f"| {score.name}{direction} | {' | '.join(_cell(row, score) for row in rows.values())} |")
    notes = [
        f"The validation set has no labels for {_TASK_NAMES[task]}: these outputs were never scored."
        for task in TASKS
        if task not in scores["covers"]
    ]
    if not constant:
        notes.append("The constant predictor's scores are missing: the validation set was not reachable.")
    return "\n\n".join(["## Scores on the validation set", "\n".join(lines), *notes, _SCORE_NOTES])


def _cell(row: dict[str, Any], score: Score) -> str:
    value = row.get(score.key)
    return f"{value:.4f}" if value is not None else "no labels" if score.key in row else "not known"


_SCORE_NOTES = """
P = (CCC V + CCC A) / 2 + EXPR F1 + AU F1, at most 3, and less where no row has a class or a unit: F1 is the mean over
all 8, and all 12. The checkpoint was chosen by this very set: expect less elsewhere.
Read it beside the constant predictor, which gives the same answer for every picture.
""".strip()

_OF_FRAMES, _OF_VIDEOS = "Frames are judged one by one.", "A frame is judged by its neighbours in the video, too."
_LIMITS = """
## Limits and licence

- It estimates how a face looks to annotators, not what a person feels. It is no ground for decisions about people.
- It finds no faces, and says nothing when there is none: cut faces out as those of the training data were.
- {frames} Other cameras, ages, skin colours, poses and head coverings than those of the training
  data were not tested; labels carry their annotators' habits.
- The weights come from the training data and the initial weights above, whose licences bind you: s-Aff-Wild2 and
  AffectNet are for non-commercial research and may not be passed on. Set `license` above to what applies.
"""
