"""GPUs that are not there: tensors that say cuda:0 or cuda:1, refuse to mix with others, and compute on the CPU.

They show with real numbers that predictions are made where they should be, and are the CPU's. No streams, no kernels
of CUDA's own, no backward pass: what only a GPU shows, they do not. Made for machines without one.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mtl_dist.predicting import spread as parts

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}  # read one device and write another
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
USED_DIR = "FAKE_GPUS_USED_DIR"  # where `part_main` notes which GPU a part was predicted on

_part_main = parts._part_main


class FakeCudaTensor(torch.Tensor):
    """A tensor of a device, whose numbers are in `host`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host, device):
        return torch.Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=device, requires_grad=host.requires_grad)  # fmt: skip

    def __init__(self, host, device):
        self.host = host

    def __repr__(self):
        return f"{self.host}@{self.device}"

    def tolist(self):
        return self.host.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


class FakeGpus(TorchDispatchMode):
    """What plain tensors and factories need: .to("cuda:1"), torch.zeros(3, device="cuda")."""

    def __init__(self, count: int):
        super().__init__()
        self.count, self.current = count, 0
        self.used: dict[int, int] = {}  # how many operations each GPU did

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self:  # inference mode does not take operations apart before they come here
            parts = func.decompose(*args, **(kwargs or {}))
        return _dispatch(func, args, kwargs or {}, self) if parts is NotImplemented else parts

    def set_device(self, device) -> None:
        self.current = self.place(torch.device(device)).index

    def place(self, device: torch.device) -> torch.device:
        index = self.current if device.index is None else device.index
        if index >= self.count:
            raise RuntimeError(f"invalid device ordinal: cuda:{index} of {self.count}")
        return torch.device("cuda", index)


@contextlib.contextmanager
def fake_gpus(count: int = 2):
    """Run the block as on a machine of so many GPUs; gives `FakeGpus`, which tells what was used."""
    gpus, cuda, amp = FakeGpus(count), torch.cuda, torch.cuda.amp.common
    torch._C._ensureCUDADeviceGuardSet()  # as FakeTensorMode does where there is no GPU
    with contextlib.ExitStack() as stack:
        for owner, name, fake in (
            (cuda, "_lazy_init", lambda: None),
            (cuda, "is_available", lambda: True),
            (cuda, "device_count", lambda: count),
            (cuda, "current_device", lambda: gpus.current),
            (cuda, "set_device", gpus.set_device),
            (cuda, "is_bf16_supported", lambda *args, **kwargs: True),
            (amp, "amp_definitely_not_available", lambda: False),
        ):
            stack.enter_context(mock.patch.object(owner, name, fake))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # CPUs have no cudnn_batch_norm
        for switch in (
            torch._C._set_only_lift_cpu_tensors,  # torch.tensor(..., device="cuda"): made on the host, then moved
            torch.__future__.set_swap_module_params_on_conversion,  # Module.to() keeps the subclass
        ):
            switch(True)
            stack.callback(switch, False)
        yield stack.enter_context(gpus)


def part_main(sender, task, part: int, num_parts: int) -> None:
    """Stand in for `parts._part_main`, in a process of its own, which has fake GPUs too."""
    with fake_gpus(int(os.environ["FAKE_GPUS"])) as gpus:
        _part_main(sender, task, part, num_parts)
    about = {"pid": os.getpid(), "current": gpus.current, "used": sorted(gpus.used)}
    Path(os.environ[USED_DIR], f"{part}.json").write_text(json.dumps(about))


def _dispatch(func, args, kwargs, gpus: FakeGpus | None = None):
    """Do an operation on the host and give its results to the device that it belongs to, or raise."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    target = kwargs.get("device")
    target = torch.device(target) if target is not None else None
    devices = {tensor.device for tensor in tensors if isinstance(tensor, FakeCudaTensor)}
    if not devices and (target is None or target.type != "cuda"):
        return func(*args, **kwargs)
    if func is aten._fused_sdp_choice.default:
        return 0  # the attention of plain operations: the others are not the CPU's
    if func is aten._has_compatible_shallow_copy_type.default:
        return False
    if func not in COPIES:
        free = tensors[:1] if func in INDEXING else [t for t in tensors if t.dim()]  # as CUDA: numbers, indices
        devices |= {tensor.device for tensor in free}
        if len(devices) > 1:
            raise RuntimeError(f"{func}: expected all tensors on the same device, found {sorted(map(str, devices))}")
    if target is not None:
        out = gpus.place(target) if target.type == "cuda" and gpus else target
    else:
        out = args[0].device if func in COPIES else next(iter(devices))
    if gpus and out.type == "cuda":
        gpus.used[out.index] = gpus.used.get(out.index, 0) + 1

    owners = {id(tensor.host): tensor for tensor in tensors if isinstance(tensor, FakeCudaTensor)}
    args, kwargs = tree_map(lambda leaf: leaf.host if isinstance(leaf, FakeCudaTensor) else leaf, (args, kwargs))
    if target is not None:
        kwargs["device"] = torch.device("cpu")
        kwargs.pop("non_blocking", None)
    if func is aten._to_copy.default:
        kwargs.setdefault("device", torch.device("cpu"))
    results = func(*args, **kwargs)
    if out.type != "cuda":
        return results

    def give(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        same = owners.get(id(leaf))  # what an operation in place returns
        return same if same is not None else FakeCudaTensor(leaf, out)

    return tree_map(give, results)
