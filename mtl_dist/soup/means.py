"""Means of the weights of checkpoints.

Of the last of one run: Izmailov et al. 2018 (arXiv 1803.05407). Of several runs that began alike: Wortsman et al. 2022
(arXiv 2203.05482).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtl_dist.errors import Damaged, InputError
from mtl_dist.progress import progress_bar
from mtl_dist.runs.checkpoint import MODEL, read_tensors
from mtl_dist.runs.weights import deleted
from mtl_dist.soup.ingredients import Ingredient

State = Mapping[str, Tensor]


def mean_of(states: Iterable[State], newest: State) -> dict[str, Tensor]:
    """Return the mean of state dicts of the same names, shapes and dtypes.

    Numbers with a point are added up in float64, in the order of the states, and cast back. All else, such as counts,
    is the `newest` state's. `states` are asked for one after the other: one of them is in memory at a time.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    for state in states:
        count += 1
        for name, tensor in state.items():
            if tensor.is_floating_point():
                sums[name] = sums[name].add_(tensor) if name in sums else tensor.to(torch.float64, copy=True)
    return {
        name: (sums[name] / count).to(tensor.dtype) if name in sums else tensor.clone()
        for name, tensor in newest.items()
    }


def fetch(ingredients: Sequence[Ingredient], directory: Path) -> list[Path]:
    """Copy the weights of every checkpoint to a local directory, once; return the files.

    Raises `InputError` for what is damaged, and where tensors have other names, shapes or dtypes.
    """
    paths, expected = [], None
    with progress_bar("reading checkpoints", len(ingredients)) as advance:
        for number, one in enumerate(ingredients):
            try:
                tensors = read_tensors(one.weights.checkpoint, MODEL)
            except FileNotFoundError:
                raise deleted(one.weights.checkpoint) from None
            except Damaged as error:
                raise InputError(f"{error}; delete {one.weights.uri}, or name other checkpoints") from None
            kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
            expected = expected or kinds
            if wrong := [name for name in {**expected, **kinds} if expected.get(name) != kinds.get(name)]:
                mine, theirs = (_describe(of.get(wrong[0])) for of in (expected, kinds))
                raise InputError(
                    f"{ingredients[0].given} and {one.given} have different architectures: {wrong[0]} is {mine} in one "
                    f"and {theirs} in the other, and so are {len(wrong) - 1} more; give runs of one architecture"
                )
            paths.append(directory / f"{number}.safetensors")
            save_file(tensors, paths[-1])
            advance(1)
    return paths


def load_mean(paths: Sequence[Path], newest: Path) -> dict[str, Tensor]:
    """Return the mean of the weights in files of `fetch`; `newest` is the one of them whose counts are taken."""
    return mean_of((load_file(path) for path in paths), load_file(newest))


def _describe(kind: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "not there" if kind is None else f"{kind[0]} {str(kind[1]).removeprefix('torch.')}"
