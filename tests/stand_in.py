"""A device that is not there, and who waits for it: torch's "meta" in a GPU's place, its memory pinned by hand.

`Waits` notes every operation for which a host would wait for a GPU, with the line of ours that asks for it: numbers
that are read, copies in either direction unless they are of pinned memory and not blocking, shapes that depend on
values. It answers them with ones, so that a step goes on. What CUDA's own kernels do inside, it does not see.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtl_dist import transfer
from tests.conftest import REPO

aten = torch.ops.aten
META = torch.device("meta")
MAKERS = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}
SAME = {torch.as_tensor, torch.asarray}  # give back a tensor that they are given
BY_VALUE = {"nonzero", "nonzero_numpy", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "equal"}


class StandIn:
    """Pinned memory (`transfer.Pinning`) of a device that copies when it is told to."""

    def __init__(self):
        self.kept: list[torch.Tensor] = []  # what is pinned: no address of it is used again
        self.is_over = True  # whether the device has done all that it was given
        self.num_waits = 0

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr()
        return any(address == own.untyped_storage().data_ptr() for own in self.kept)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.is_pinned(tensor):
            return tensor
        self.kept.append(tensor.clone())
        return self.kept[-1]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        self.kept.append(torch.zeros(shape, dtype=dtype))
        return self.kept[-1]

    def mark(self, device: torch.device) -> StandIn:
        return self

    def query(self) -> bool:
        return self.is_over

    def synchronize(self) -> None:
        self.num_waits += 1


@contextlib.contextmanager
def pinning(kind: str) -> Iterator[StandIn]:
    """Have devices of a kind read pinned memory."""
    pinned = StandIn()
    with mock.patch.dict(transfer.PINNING, {kind: pinned}):
        yield pinned


class Waits(TorchDispatchMode):
    """Notes what would make the host wait for "meta"."""

    def __init__(self, pinned: StandIn):
        super().__init__()
        self.pinned = pinned
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self._waits(func, args, kwargs):
            # A copy to the host that nobody waits for: its values are what was there.
            is_copy_home = func is aten.copy_.default and _is_there(args[1]) and not _is_there(args[0])
            return args[0] if is_copy_home else func(*args, **kwargs)
        self.note(func._schema.name)
        return _answer(func, args, kwargs)

    def note(self, what: str) -> None:
        lines = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(REPO / "mtl_dist"))]
        where = f"{lines[-1].filename.removeprefix(f'{REPO}/')}: {lines[-1].line}" if lines else "no line of ours"
        self.found.append(f"{what} at {where}")

    def _waits(self, func, args, kwargs) -> bool:
        name = func._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func is aten._to_copy.default:
            there, wanted = _is_there(args[0]), kwargs.get("device")
            if wanted is None or (torch.device(wanted).type == "meta") == there:
                return False
            return there or not (kwargs.get("non_blocking") and self.pinned.is_pinned(args[0]))
        if func is aten.copy_.default:
            if _is_there(args[0]) == _is_there(args[1]):
                return False
            is_async = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            return not (is_async and self.pinned.is_pinned(args[1] if _is_there(args[0]) else args[0]))
        if not any(map(_is_there, tensors)):
            return False
        if name in BY_VALUE or name == "_local_scalar_dense" or name.startswith("repeat_interleave"):
            return name != "repeat_interleave" or func._overloadname == "Tensor"
        if name.startswith(("index", "_index_put")) and len(args) > 1 and isinstance(args[1], list | tuple):
            return any(index.dtype == torch.bool or not _is_there(index) for index in args[1] if index is not None)
        # A number that lies on the host goes along with a kernel where that is of plain arithmetic.
        return name in ("where", "cat", "stack") and not all(map(_is_there, tensors))


class _Made(TorchFunctionMode):
    """Notes tensors that are made of Python's numbers for the device."""

    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func in MAKERS and _is_there(made) and not (func in SAME and _is_there(args[0])):
            self.waits.note("a tensor made of numbers")
        return made


@contextlib.contextmanager
def waits() -> Iterator[Waits]:
    """Note what would make the host wait in the block."""
    with pinning("meta") as pinned, Waits(pinned) as noted, _Made(noted):
        yield noted


def _is_there(tensor) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.device.type == "meta"


def _answer(func, args, kwargs):
    """Give something of the right kind."""
    name = func._schema.name.removeprefix("aten::")
    if func is aten._to_copy.default:
        like = args[0]
        device = torch.device(kwargs["device"])
        return torch.ones(like.shape, dtype=kwargs.get("dtype") or like.dtype, device=device)
    if func is aten.copy_.default:
        return args[0]
    if name == "_local_scalar_dense":
        return torch.ones((), dtype=args[0].dtype).item()
    if name == "equal":
        return True
    if name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1]):
        (mask,) = args[1]
        return args[0].flatten(0, mask.ndim - 1)  # as if all were chosen
    if name.startswith(("index_put", "_index_put")):
        return args[0]
    if name == "index":
        return func(args[0], [index if index is None else index.to("meta") for index in args[1]])
    if name == "where":
        return func(*(tensor.to("meta") for tensor in args))
    raise AssertionError(f"no answer to {func}")
