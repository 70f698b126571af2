"""The spatial attention of every action unit's region, over a few validation faces: the same frames in every view."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mtl_dist.data.augment import build_preparation
from mtl_dist.predicting.evaluate import forward_all
from mtl_dist.report.drawing import Figure, canvas, save_png
from mtl_dist.report.pictures import Pictures, choose_apart
from mtl_dist.report.results import Method, Result
from mtl_dist.report.tables import write_csv
from mtl_dist.runs.weights import load_weights
from mtl_dist.tasks import AUS, NUM_AUS

SIDE = 160  # pixels of a drawn face
COLUMNS = 6  # of maps; two lines a face
OPACITY = 0.75  # of the map where it is highest


def choose_faces(result: Result, images: list[str], video: np.ndarray, *, count: int) -> list[int]:
    """Places of the frames with the most active units, of different videos."""
    targets = result.predicted.targets
    active = ((targets.au > 0) & targets.au_mask).sum(1)
    return choose_apart(np.argsort(-active, kind="stable"), images, video, count=count)


def draw_attention(
    method: Method, place: int, faces: list[int], *, images: list[str], device: torch.device, cache_dir: Path | None
) -> Figure | None:
    """Maps of the 12 action units over each face; None for models without such maps."""
    result = method.shown
    model = load_weights(result.member.weights).to(device)
    if not hasattr(model, "attention_maps"):
        return None
    rows = result.predicted.rows[faces]
    pictures = Pictures(result.member, cache_dir)
    batch = pictures.read(rows, result.member.weights.config.data.image_size)
    passed = forward_all(
        model, [batch], prepare=build_preparation(result.member.weights.config), device=device,
        forward=lambda inputs, valid: model.attention_maps(inputs[valid]))  # fmt: skip
    maps = torch.cat([part for _, part in passed])[:, :NUM_AUS].float()
    large = F.interpolate(maps, size=(SIDE, SIDE), mode="bilinear", align_corners=False).cpu().numpy()
    return _draw(method, place, result, faces, images, pictures.pixels(rows, SIDE), maps.cpu().numpy(), large)


def _draw(method, place, result: Result, faces, images, pixels, maps, large) -> Figure:
    predictions, targets = result.predicted.predictions, result.predicted.targets
    data: list[tuple] = [("row", "image", "AU", "label", "probability", "least attention", "most", "mean")]
    lines = NUM_AUS // COLUMNS
    with canvas(9.6, 2.75 * len(faces)) as figure:
        grid = figure.add_gridspec(lines * len(faces), lines + COLUMNS)
        for number, face in enumerate(faces):
            top = number * lines
            axes = figure.add_subplot(grid[top : top + lines, 0:lines])
            axes.imshow(pixels[number])
            axes.axis("off")
            axes.set_title(f"row {result.predicted.rows[face]}", fontsize=9)
            for unit, au in enumerate(AUS):
                label = "–" if not targets.au_mask[face, unit] else "on" if targets.au[face, unit] > 0 else "off"
                own, probability = maps[number, unit], predictions.au[face, unit]
                axes = figure.add_subplot(grid[top + unit // COLUMNS, lines + unit % COLUMNS])
                _overlay(axes, pixels[number], large[number, unit])
                axes.set_title(f"AU{au} {label}, p {probability:.2f}\n{own.min():.2f} to {own.max():.2f}", fontsize=7,
                               fontweight="normal", pad=2)  # fmt: skip
                data.append((result.predicted.rows[face], images[face], f"AU{au}", label, f"{probability:.4f}",
                             *(f"{value:.4f}" for value in (own.min(), own.max(), own.mean()))))  # fmt: skip
        png = save_png(figure, dpi=130)
    alt = (
        f"Spatial attention of {method.label} for 12 action units over {len(faces)} validation faces, rows "
        f"{', '.join(str(result.predicted.rows[face]) for face in faces)}: maps laid over the face, in colour where "
        "the attention is high."
    )
    caption = (
        f"{result.name} on the {result.member.val.view.replace('_', ' ')} view. Above a map: the unit, its label, the "
        "predicted probability, the map's range; colours run over that range."
    )
    return Figure(f"attention_{place}", method.label, caption, alt, png, write_csv(data), is_photo=True, is_wide=True)


def _overlay(axes, pixels: np.ndarray, own: np.ndarray) -> None:
    """A grey face with the map over it, clear where it is low."""
    from matplotlib import colormaps

    low, high = own.min(), own.max()
    share = (own - low) / (high - low) if high - low > 1e-6 else np.zeros_like(own)
    grey = (pixels @ np.array([0.299, 0.587, 0.114]))[..., None] / 255
    opacity = OPACITY * share[..., None]
    axes.imshow((grey * (1 - opacity) + colormaps["inferno"](share)[..., :3] * opacity).clip(0, 1))
    axes.axis("off")
