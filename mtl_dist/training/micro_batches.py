"""How a rank's part of a step is cut into micro-batches."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from mtl_dist.tasks import Batch


def split_batch(batch: Batch, *, parts: int, passes: int) -> list[Batch]:
    """Cut a batch into micro-batches, each with its part of all `passes` equal parts of it (the samples of a task).

    By slices: an index that lies on the host would make it wait for the device.
    """
    if parts == 1:
        return [batch]
    tensors, spec = tree_flatten(batch)
    cut = [[own.tensor_split(parts) for own in tensor.tensor_split(passes)] for tensor in tensors]
    return [
        tree_unflatten([torch.cat([own[part] for own in of_passes]) for of_passes in cut], spec)
        for part in range(parts)
    ]
