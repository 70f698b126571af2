"""The report of masked autoencoders: what the loss came down to, and what they tell of hidden patches."""

from __future__ import annotations

import io
import itertools

import numpy as np
import torch

from mtl_dist.data.augment import build_preparation
from mtl_dist.data.cache import GIB, Cache
from mtl_dist.data.loader import eval_batches
from mtl_dist.data.samples import open_samples
from mtl_dist.errors import InputError
from mtl_dist.label_counts import LabelCounts
from mtl_dist.objective.masked import TERM
from mtl_dist.objective.module import build_objective
from mtl_dist.objective.scores import MASKED
from mtl_dist.predicting.evaluate import forward_all
from mtl_dist.predicting.members import Member
from mtl_dist.report.drawing import COLOURS, Figure, canvas, save_png
from mtl_dist.report.options import ReportCommand
from mtl_dist.report.page import Part, html
from mtl_dist.report.tables import write_csv
from mtl_dist.runs.weights import load_weights
from mtl_dist.training.tracking import read_records

NO_LABELS = LabelCounts(rows=0, va=0, expr=0, au=[0] * 12, expr_classes=[0] * 8, au_positives=[0] * 12, unlabelled=0)


def write_parts(
    members: dict[str, Member], command: ReportCommand, device: torch.device
) -> tuple[list[Figure], list[Part]]:
    """Draw runs by name, `command.faces` pictures of each; return the figures, and the chapters that hold them."""
    if command.ensemble:
        raise InputError("--ensemble is given, and these runs are autoencoders, which make none; leave it out")
    figures: dict[str, list[Figure]] = {}
    records = {name: _evaluations(member) for name, member in members.items()}
    if known := {name: found for name, found in records.items() if found}:
        figures["Loss of hidden patches"] = [_draw_curve(known)]
    if command.faces:
        named = enumerate(members.items())
        figures["What is told of hidden patches"] = [
            _draw_pictures(name, member, place, device, command) for place, (name, member) in named
        ]
    chapters = [Part(of[0].name, title, [html.figure(figure) for figure in of]) for title, of in figures.items()]
    without = [name for name, found in records.items() if not found]
    if without:
        chapters.append(Part("notes", "Notes", [html.paragraph(f"No records were kept of: {', '.join(without)}.")]))
    return list(itertools.chain.from_iterable(figures.values())), chapters


def _evaluations(member: Member) -> list[dict]:
    return [record for record in read_records(member.run_uri) if record["kind"] == "eval"]


def _draw_curve(records: dict[str, list[dict]]) -> Figure:
    rows: list[tuple] = [("run", "step", MASKED.key, "constant picture")]
    ends = []
    with canvas(6.5, 3.8) as figure:
        axes = figure.subplots()
        for (name, points), colour in zip(records.items(), itertools.cycle(COLOURS)):
            steps = [record["step"] for record in points]
            values = [record["scores"][MASKED.key] for record in points]
            floors = [record["constant"][MASKED.key] for record in points]
            axes.plot(steps, values, color=colour, marker="o", markersize=3, label=name)
            axes.plot(steps, floors, color=colour, linestyle=":", linewidth=1.2)
            rows += [(name, *each) for each in zip(steps, values, floors)]
            ends.append(f"{name} ends at {values[-1]:.3f}, the constant picture at {floors[-1]:.3f}")
        axes.set_xlabel("training step")
        axes.set_ylabel(MASKED.title)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside lower center", ncols=2)
        png = save_png(figure)
    caption = (
        "The validation set, after every evaluation; lower is better. Dotted: the best constant picture, which tells "
        "at every place the mean of what is hidden there."
    )
    alt = f"Line chart of {MASKED.name} against training steps: {'; '.join(ends)}."
    return Figure("masked_loss", MASKED.title, caption, alt, png, write_csv(rows))


def _draw_pictures(name: str, member: Member, place: int, device: torch.device, command: ReportCommand) -> Figure:
    config = member.weights.config
    samples = open_samples(member.val, config, Cache(command.cache_dir, max_bytes=int(config.data.cache_gib * GIB)))
    batches = eval_batches(samples, batch=command.faces, rank=0, num_ranks=1, workers=0, prefetch=1)
    model = load_weights(member.weights, objective="masked").to(device)
    objective = build_objective(config, NO_LABELS)
    meter = objective.meter(num_shown=command.faces)
    for batch, outputs in forward_all(
        model, itertools.islice(batches, 1), prepare=build_preparation(config), device=device
    ):
        meter.add(outputs, batch)
    pixels = meter.pictures()[TERM]
    share, shown = config.model.masked.share, len(pixels) // config.input_size
    caption = (
        f"Validation pictures of {member.val.view}: the picture, what is seen of it ({1 - share:.0%} of the patches), "
        "and what is told of the rest."
    )
    if config.model.masked.normalise:
        caption += " A patch's own mean and deviation, which the model is not asked for, are lent to what it tells."
    alt = f"{shown} rows of three pictures of a face: whole, with most patches grey, and filled in."
    rows = [("run", "picture"), *((name, image) for image in samples.names().images[:shown])]
    return Figure(f"masked_{place}", name, caption, alt, _as_png(pixels), write_csv(rows), is_photo=True)


def _as_png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    Image.fromarray(pixels).save(png := io.BytesIO(), "PNG")
    return png.getvalue()


def check_alike(objectives: dict[str, str]) -> None:
    """Raise `InputError` where runs by name were trained for different things: no score is of both."""
    if len(set(objectives.values())) > 1:
        told = ", ".join(f"{name} for {objective}" for name, objective in objectives.items())
        raise InputError(f"these runs were trained for different things ({told}): report those of one kind at a time")
