"""The device of a rank, and its memory."""

from __future__ import annotations

import ctypes
import gc

import torch

from mtl_dist.config import Config
from mtl_dist.errors import InputError
from mtl_dist.machine import num_cpus

# What is no exception of its own: of torch's allocator on CPUs, of CUDA and its libraries.
_WORDS_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "posix_memalign failed",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
MEMORY_REMEDY = "take a smaller model, smaller inputs or shorter windows, more ranks, or a device with more memory"

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def pick_device(config: Config, *, has_gpu: bool) -> torch.device:
    """Return the device of this rank. Raises `InputError` where it has not what the configuration asks for."""
    wanted = check_device(config, has_gpu=has_gpu)
    return torch.device(wanted, torch.cuda.current_device()) if wanted == "cuda" else torch.device("cpu")


def check_device(config: Config, *, has_gpu: bool) -> str:
    """Return "cuda" or "cpu": what a rank with or without a GPU trains on. Raises `InputError` as `pick_device`."""
    wanted = config.engine.device
    if wanted == "auto":
        wanted = "cuda" if has_gpu else "cpu"
    if wanted == "cuda" and not has_gpu:
        raise InputError(
            "engine.device is cuda, but this rank has no GPU (under Ray: ray.gpus_per_rank); use auto or cpu"
        )
    if config.engine.batchnorm == "sync" and wanted == "cpu":
        raise InputError(
            "engine.batchnorm is sync, which torch has on GPUs only; use local (buffers are averaged) or frozen"
        )
    return wanted


def named_device(name: str) -> torch.device:
    """Return the device a command names: cpu, cuda, or auto. Raises `InputError` where there is no GPU for cuda.

    Torch, which knows of the process's affinity only, gets no more threads than there are CPUs for it.
    """
    torch.set_num_threads(min(torch.get_num_threads(), num_cpus()))
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda, but torch sees no GPU here; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def keep_freed_memory() -> None:
    """Tell glibc not to give freed memory back to the kernel: every step would fault its activations in again.

    Three epochs of the small preset took 19 and 20 s with it, 22 to 24 s without (benchmarks/NOTES.md). Other C
    libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most it takes


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out."""
    is_own = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_own or any(words in str(error) for words in _WORDS_OF_MEMORY)


def free_memory() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
