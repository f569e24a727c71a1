"""The device that every verb computes on, and its free memory. Imports nothing heavy.

A CUDA (or ROCm) GPU if there is one and `ACCELERATE_USE_CPU` does not ask for the CPU, else the CPU. Apple silicon
computes on its CPU too: nobody has shown yet that a run on `mps` gives the result of the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

USE_CPU = "ACCELERATE_USE_CPU"
_YES = ("1", "true", "t", "yes", "y", "on")  # as Accelerate reads it
BF16_GAIN = 1.3  # times as fast as fp32, from which bf16 is worth it
_SMALLEST = 2**18  # elements of a matrix below which nothing is gained, and timing tells nothing
_PROBED = 256, 1536  # rows, and the most columns, of a product that is timed
_M_MMAP_THRESHOLD, _LARGE_BYTES = -3, 2**17  # of glibc's malloc.h; above, each block is mapped for itself
DENSE_SHARE = 0.25  # of the free memory, for quantized weights kept as dense matrices
# What PyTorch and CUDA's libraries write where they do not raise `torch.OutOfMemoryError`, in lower case
_SHORT_OF_MEMORY = (
    "out of memory",  # CUDA's and HIP's runtime, Apple's MPS
    "alloc_failed", "allocation_failed",  # cuBLAS, cuDNN, cuSPARSE, cuFFT
    "cublas_status_not_initialized when calling `cublascreate",  # its workspace
    "can't allocate memory", "not enough memory", "cannot allocate memory",  # the CPU's
)  # fmt: skip


def default_device() -> torch.device:
    """The device of this process."""
    import torch

    if torch.cuda.is_available() and not asks_for_cpu():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def asks_for_cpu() -> bool:
    """Whether `ACCELERATE_USE_CPU` asks for the CPU."""
    return os.environ.get(USE_CPU, "").lower() in _YES


@functools.cache
def bf16_speedup(device: torch.device, inner: int, outer: int) -> float:
    """How many times as fast as in fp32 `device` multiplies in bf16, measured by products of a model's own shape.

    Args:
        device: a GPU is asked whether it has bf16, and not measured.
        inner, outer: sizes of the model's largest weight; for one that is small the answer is 1.
    """
    import torch

    if device.type == "cuda":
        return float("inf") if torch.cuda.is_bf16_supported(including_emulation=False) else 0.0
    if inner * outer < _SMALLEST:
        return 1.0
    rows, most = _PROBED
    x, weight = (torch.ones(n, min(inner, most), device=device) for n in (rows, min(outer, most)))
    exact = min(_seconds(lambda: x @ weight.t()) for _ in range(4))
    x16, weight16, seconds = x.bfloat16(), weight.bfloat16(), list[float]()
    while len(seconds) < 4 and (len(seconds) < 2 or seconds[-1] <= 2 * exact):  # emulated products take long
        seconds.append(_seconds(lambda: x16 @ weight16.t()))  # the first one also makes the kernel
    return exact / min(seconds)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def free_memory(device: torch.device, mapped: int = 0) -> int:
    """Bytes that can still be taken on `device`; on the CPU shared with the other processes of this run.

    Args:
        device: where.
        mapped: bytes of files in memory that shall stay there, which Linux counts as available.
    """
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return max(0, _available_ram() - mapped) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _available_ram() -> int:
    """What Linux calls available, within this container's limit; elsewhere half of the physical memory."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit, \
             open("/sys/fs/cgroup/memory.current", encoding="ascii") as used:  # fmt: skip
            free = min(free, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # no such limit, or "max"
        pass
    return max(free, 0)


def dense_weights_fit(model: torch.nn.Module, device: torch.device) -> bool:
    """Whether a quarter of the free memory holds the weights under a model's adapter as dense matrices.

    Never where its layers come and go: the copies would stay.
    """
    from lmtune.models.structure import base_of, is_streamed

    base = base_of(model)
    if is_streamed(base):
        return False
    layers = (m.get_base_layer() for m in base.modules() if hasattr(m, "get_base_layer"))
    elements = sum(layer.in_features * layer.out_features for layer in layers if hasattr(layer, "in_features"))
    return bool(elements * base.dtype.itemsize <= free_memory(device) * DENSE_SHARE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too small: allocators say so by their type or in words, by device and library."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SHORT_OF_MEMORY)


def return_freed_memory() -> None:
    """Return what was freed on the CPU to the system: glibc keeps it, and tensors of other sizes do not fit in it."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def return_large_blocks() -> None:
    """From now on return what is freed at once where it is large: glibc learns to keep it, layer after layer."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
