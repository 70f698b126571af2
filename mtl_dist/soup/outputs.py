"""What a mean of checkpoints leaves: an export, and soup.json, which says what was averaged.

soup.json is written first and config.json, which makes it an export, last. So a directory with the one and without the
other is what a killed command left, and the same command writes it anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from mtl_dist import storage
from mtl_dist.errors import Damaged, InputError
from mtl_dist.export.card import Averaged, write_card
from mtl_dist.export.job import describe_file, write_weights
from mtl_dist.objective.scores import flat_scores
from mtl_dist.predicting.members import check_apart
from mtl_dist.runs.checkpoint import MODEL, Checkpoint
from mtl_dist.runs.weights import EXPORTED_CONFIG, exported_config
from mtl_dist.sealed import seal, unseal
from mtl_dist.soup.ingredients import Ingredient, newest_of
from mtl_dist.soup.options import SoupCommand

FORMAT = "mtl_dist-soup-1"
SOUP, CARD = "soup.json", "README.md"
NAMES = (SOUP, MODEL, CARD, EXPORTED_CONFIG)  # in the order in which they are written
MAX_SOUP_BYTES = 16 << 20


class Soup(NamedTuple):
    """What was averaged, and how it scored: what soup.json holds beside the recipe."""

    method: str  # tail average, uniform soup, greedy soup
    taken: list[str]  # the names of the checkpoints whose mean it is
    scores: dict[str, dict[str, Any]]  # {row: scores}: the constant predictor, the checkpoints, the soup
    soup_row: str  # which of the rows is that of the weights that are written
    bn_samples: int  # that BatchNorm's statistics were estimated on; 0: they were not
    halves: list[dict[str, Any]]  # what was chosen on one half of the videos and scored on the other


def make_recipe(ingredients: Sequence[Ingredient], command: SoupCommand) -> dict[str, Any]:
    """Return what decides the result: of the same recipe is the same soup, but for last bits."""
    return {
        "method": "greedy" if command.greedy else "mean",
        "checkpoints": [
            {"run": one.run, "step": one.weights.checkpoint.step, "sha256": one.sha256} for one in ingredients
        ],
        "data": newest_of(ingredients).weights.identity,
        "bn_batches": command.bn_batches,
        "seed": command.seed,
    }


def read_finished(command: SoupCommand, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """Return soup.json where --out holds this very soup; None where it can be written.

    Raises `InputError` where --out holds something else.
    """
    out = command.out
    check_apart(out, command.runs)
    storage.check_writable(out, flag="--out")
    names = [found.name for found in storage.list_objects(out)]
    if not names:
        return None
    if SOUP not in names:
        shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
        raise InputError(f"--out is {out}, which holds something else already ({shown}); name another directory")
    try:
        content = unseal(storage.read_bytes(storage.join(out, SOUP), max_bytes=MAX_SOUP_BYTES))
        if content.get("format") != FORMAT:
            raise Damaged(f"it has format {content.get('format')!r}; this version reads {FORMAT!r}")
    except Damaged as error:
        raise InputError(
            f"--out is {out}, and its {SOUP} is damaged ({error}); delete it, or name another directory"
        ) from None
    if content["recipe"] != recipe:
        raise InputError(
            f"--out is {out}, which holds the mean of other checkpoints, or one made in another way "
            f"({content['method']} of {len(content['recipe']['checkpoints'])}); name another directory, or delete it"
        )
    return content if EXPORTED_CONFIG in names else None


def write_soup(
    out: str, soup: Soup, model: nn.Module, ingredients: Sequence[Ingredient], recipe: dict[str, Any], scratch: Path
) -> None:
    """Write everything to --out, config.json last; where that fails nothing is left."""
    newest = newest_of([one for one in ingredients if one.name in soup.taken])
    own = soup.scores[soup.soup_row]
    write_weights(model, scratch / MODEL)
    files = {MODEL: describe_file(scratch / MODEL)}
    about = newest.weights.checkpoint
    checkpoint = Checkpoint(out, about.step, flat_scores(own), about.saved_at, files)
    weights = newest.weights._replace(checkpoint=checkpoint, state=newest.weights.state | {"scores": own})
    (_, constant), *others = soup.scores.items()
    rows = {row: scored for row, scored in others if row != soup.soup_row}
    averaged = Averaged(_what(soup), _chapter(soup, ingredients, newest), rows)
    content = {"format": FORMAT, "recipe": recipe, **soup._asdict()}
    (scratch / SOUP).write_bytes(seal(content))
    (scratch / CARD).write_text(write_card(weights, files=files, constant=constant, checked=None, averaged=averaged))
    (scratch / EXPORTED_CONFIG).write_bytes(seal(exported_config(weights, files).model_dump(mode="json")))
    _upload(scratch, out)


def _upload(scratch: Path, out: str) -> None:
    is_new = not storage.is_s3(out) and not storage.local_path(out).exists()
    try:
        for name in NAMES:
            storage.upload(scratch / name, storage.join(out, name))
    except BaseException:  # Ctrl-C too
        for name in reversed(NAMES):
            with contextlib.suppress(InputError, OSError):
                storage.delete(storage.join(out, name))
        if is_new:
            with contextlib.suppress(OSError):
                storage.local_path(out).rmdir()
        raise


def _what(soup: Soup) -> str:
    if len(soup.taken) == 1:
        return f"{soup.taken[0]}, to which no other checkpoint was added ({soup.method})"
    return f"the mean of the weights of {len(soup.taken)} checkpoints ({soup.method})"


def _chapter(soup: Soup, ingredients: Sequence[Ingredient], newest: Ingredient) -> str:
    """Say what was averaged."""
    lines = ["## What was averaged", "", "| checkpoint | sha256 of its weights | in the mean |", "|---|---|---|"]
    lines += [f"| {one.name} | `{one.sha256}` | {'yes' if one.name in soup.taken else 'no'} |" for one in ingredients]
    statistics = (
        f"BatchNorm's running statistics were estimated anew on {soup.bn_samples:,} augmented training samples."
        if soup.bn_samples
        else "No running statistics of BatchNorm were estimated anew."
    )
    lines += ["", f"{statistics} What is told of training is that of the newest in the mean, {newest.name}."]
    if soup.halves:
        lines += [
            "",
            "The choice was made on all rows below, so its score there is too high. What was chosen on one half of the "
            "videos and scored on the other has a row of its own.",
        ]
    return "\n".join(lines)
