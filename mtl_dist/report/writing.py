"""Make a report: gather the evidence, draw, write. Nothing is written before every input is known to be good."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from mtl_dist import storage
from mtl_dist.device import named_device
from mtl_dist.errors import Damaged
from mtl_dist.families import FAMILIES
from mtl_dist.parsing import parse_json
from mtl_dist.predicting.members import Member, check_apart, find_member, unique_names
from mtl_dist.progress import progress_bar
from mtl_dist.report.affect import draw_affect
from mtl_dist.report.attention import choose_faces, draw_attention
from mtl_dist.report.calibration import draw_reliability
from mtl_dist.report.chapters import Drawings, compose, lead
from mtl_dist.report.classes import draw_confusion, draw_f1
from mtl_dist.report.curves import draw_curves
from mtl_dist.report.drawing import Figure, method_styles
from mtl_dist.report.evidence import Evidence, gather
from mtl_dist.report.gradients import draw_gradients
from mtl_dist.report.mistakes import worst_mistakes
from mtl_dist.report.options import ReportCommand
from mtl_dist.report.pace import draw_pace
from mtl_dist.report.page import html
from mtl_dist.report.pictures import Pictures
from mtl_dist.report.reconstruction import check_alike, write_parts
from mtl_dist.report.results import CONSTANT, Method
from mtl_dist.report.unscored import ABOUT, check_scored_alike, write_unscored
from mtl_dist.runs.weights import Weights, open_best
from mtl_dist.sealed import seal, unseal

PAGE_NAME = "report.html"
LISTING_NAME = "data/written.json"  # the names of the figures and tables


def write_report(command: ReportCommand, *, written: str) -> str:
    """Write the report and return its page's URI; `written` is the command as it was typed. Raises `InputError`."""
    device = named_device(command.device)
    opened = {uri: open_best(uri) for uri in command.runs}
    if not check_scored_alike(opened, command):
        return _write_unscored(command, opened, written)
    members = _find_members(command, opened)
    objectives = {name: FAMILIES[member.weights.config.model.name].objective for name, member in members.items()}
    check_alike(objectives)
    if "masked" in objectives.values():
        figures, parts = write_parts(members, command, device)
        about = ["Masked autoencoders: they learn from pictures without labels."]
        page = html.page(title=command.title, lead=about, parts=parts, footer=[_made_by(written)])
        return _write(command.out, page, _files(figures))
    evidence = gather(command, list(members.values()), device)
    drawings = draw(
        evidence, device=device, num_faces=command.faces, num_errors=command.errors, cache_dir=command.cache_dir
    )
    tables, parts = compose(evidence, drawings)
    val = evidence.methods[1].shown.member.val
    footer = [
        _made_by(written),
        f"Validation rows are those of the source with sha256 {val.source_sha256}.",
    ]
    page = html.page(title=command.title, lead=lead(evidence, num_draws=command.draws), parts=parts, footer=footer)
    files = {f"tables/{table.name}.csv": table.csv() for table in tables} | _files(drawings.figures)
    for mistakes in drawings.mistakes:
        files[f"figures/errors_{mistakes.task}.csv"] = mistakes.csv
        files |= {f"figures/{mistake.name}.png": mistake.png for mistake in mistakes.worst}
    return _write(command.out, page, files)


def _find_members(command: ReportCommand, opened: dict[str, Weights]) -> dict[str, Member]:
    vals = command.val or [None] * len(command.runs)
    return {
        name: find_member(uri, weights, val, cache_dir=command.cache_dir)
        for name, (uri, weights), val in zip(unique_names(command.runs), opened.items(), vals)
    }


def _write_unscored(command: ReportCommand, opened: dict[str, Weights], written: str) -> str:
    check_apart(command.out, command.runs)
    storage.check_writable(command.out, flag="--out")
    figures, parts = write_unscored(dict(zip(unique_names(command.runs), opened.items())))
    page = html.page(title=command.title, lead=[ABOUT], parts=parts, footer=[_made_by(written)])
    return _write(command.out, page, _files(figures))


def _made_by(written: str) -> str:
    return f"Made {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} by: {written}"


def _files(figures: Sequence[Figure]) -> dict[str, bytes]:
    return {f"figures/{f.name}.{kind}": data for f in figures for kind, data in (("png", f.png), ("csv", f.csv))}


def _write(out: str, page: str, files: dict[str, bytes]) -> str:
    """Write a page with its files; return its URI."""
    where = storage.join(out, PAGE_NAME)
    storage.delete(where)  # of an earlier report; and there again last: a page without its files is worse than none
    _remove_earlier(out, files)
    for name, data in files.items():
        storage.write_bytes(storage.join(out, name), data)
    storage.write_bytes(where, page.encode())
    return where


def _remove_earlier(out: str, files: dict[str, bytes]) -> None:
    """Remove what an earlier report wrote here and this one does not; nothing that others put beside it."""
    where = storage.join(out, LISTING_NAME)
    try:
        data = storage.read_bytes(where)  # a list, of before it was sealed
        earlier = set(parse_json(data) if data.startswith(b"[") else unseal(data)["files"])
    except (FileNotFoundError, Damaged, KeyError, TypeError):
        earlier = set()
    # Should this one be interrupted, the next still knows of both.
    storage.write_bytes(where, seal({"files": sorted(earlier | files.keys())}))
    for name in earlier - files.keys():
        if name.startswith(("figures/", "tables/")) and ".." not in name.split("/"):
            storage.delete(storage.join(out, name))
    storage.write_bytes(where, seal({"files": sorted(files)}))


def draw(
    evidence: Evidence, *, device: torch.device, num_faces: int, num_errors: int, cache_dir: Path | None
) -> Drawings:
    """Draw every figure; `num_errors` are the pictures of each task."""
    methods, images, video = evidence.methods, evidence.images, evidence.video
    styles = method_styles(methods)
    real = [method for method in methods if method.label != CONSTANT]
    trained = [method for method in real if method.shown.member]
    with progress_bar("drawing", 4 + 2 * len(real) + len(trained)) as advance:
        curves, notes = draw_curves(methods, styles)
        gradients = [draw_gradients(method, place) for place, method in enumerate(trained, start=1)]
        paces = [
            draw_pace(method.label, method.shown.name, method.shown.uri, place)
            for place, method in enumerate(trained, start=1)
        ]
        advance(1)
        f1 = draw_f1(methods, styles, evidence.labels)
        advance(1)
        reliability, calibration = draw_reliability(methods, styles)
        advance(1)
        confusion, affect, attention, without = [], [], [], []
        for place, method in enumerate(real, start=1):
            confusion.append(draw_confusion(method, place))
            advance(1)
            affect += draw_affect(method, place)
            advance(1)
        faces = choose_faces(trained[0].shown, images, video, count=num_faces)
        for place, method in enumerate(trained, start=1):
            if faces:
                figure = draw_attention(method, place, faces, images=images, device=device, cache_dir=cache_dir)
                if figure:
                    attention.append(figure)
                else:
                    without.append(method.label)
            advance(1)
        mistakes = []
        if shown_from := _pictures_of(evidence.best, trained):
            pictures = Pictures(shown_from, cache_dir)
            mistakes = worst_mistakes(evidence.best.shown, pictures, images, video, count=num_errors)
        advance(1)
    confusion, gradients, paces = (list(filter(None, figures)) for figures in (confusion, gradients, paces))
    return Drawings(
        curves, notes, gradients, paces, confusion, f1, reliability, calibration, affect, attention, without, mistakes
    )


def _pictures_of(best: Method, trained: list[Method]) -> Member | None:
    """Whose pictures show the errors: the method's own, of an ensemble any, the wider crop first; None: all runs read
    features."""
    with_pictures = [method.shown.member for method in trained if not method.shown.member.val.extractors]
    if best.shown.member in with_pictures:
        return best.shown.member
    return min(with_pictures, key=lambda member: member.val.view != "cropped", default=None)
