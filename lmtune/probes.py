"""Small trials of what training needs, run by `lmtune.doctor` in a process of its own: `python -m lmtune.probes`.

Each prints its findings as JSON lines. That a library is installed says little; whether a layer in 4 bit gives the
right numbers on this device is found by computing with one.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmtune.doctor import Finding

if TYPE_CHECKING:
    import torch

_GIB = 2**30
_WIDTH = 128  # of the layers that are tried
# The largest error of a layer's output relative to the output; measured are 0.09 and 0.006 on a CPU
_ERRORS = {"nf4": 0.2, "int8": 0.05}


def main() -> None:
    """Every trial, one after the other; a failure in one does not stop the next."""
    for name, trial in TRIALS.items():
        print(f'{{"begin": "{name}"}}', flush=True)
        try:
            for finding in trial():
                print(finding.as_json(), flush=True)
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            level, mend = _ON_FAILURE[name]
            print(Finding(name, level, text, mend).as_json(), flush=True)  # type: ignore[arg-type]


def find_processor() -> Iterator[Finding]:
    """Cores and memory."""
    import torch

    from lmtune.models.memory import free_memory

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("CPU", "ok", f"{cores} cores, {torch.get_num_threads()} threads, {_cpu_capability()}")
    free = free_memory(torch.device("cpu")) / _GIB
    mend = "little for training; close other programs" if free < 2 else ""
    yield Finding("memory", "warn" if mend else "ok", f"{free:.1f} GiB free", mend)


def find_gpus() -> Iterator[Finding]:
    """Each GPU with its memory, and whether it computes in bf16."""
    import torch

    if not torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
        if driver and torch.version.cuda is None:
            mend = "install torch's CUDA build; pytorch.org says how"
            yield Finding("GPU", "warn", "there is an NVIDIA driver, but torch is a build for CPUs", mend)
        elif driver:
            mend = "its driver may be too old for this torch, or CUDA_VISIBLE_DEVICES hides it"
            yield Finding("GPU", "warn", "there is an NVIDIA driver, but torch finds no GPU", mend)
        else:
            yield Finding("GPU", "ok", "none; small models can be tuned on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        text = f"{about.name}, {about.total_memory / _GIB:.0f} GiB, compute capability {about.major}.{about.minor}"
        if about.major >= 8 or torch.version.hip:  # older ones only emulate bf16
            yield Finding(f"GPU {index}", "ok", f"{text}, bf16")
        else:
            mend = "set model.dtype=float16 or float32, and compare the loss"
            yield Finding(f"GPU {index}", "warn", f"{text}, no bf16 of its own", mend)


def try_quantization(kind: str) -> Iterator[Finding]:
    """A layer in `nf4` or `int8`, forward and backward, against the same layer in full precision."""
    import torch

    from lmtune.models.base import compute_dtype
    from lmtune.models.device import default_device
    from lmtune.models.libraries import quiet_libraries

    quiet_libraries()
    device = default_device()
    dtype = compute_dtype(device)
    torch.manual_seed(0)
    weight, x = torch.randn(_WIDTH, _WIDTH), torch.randn(8, _WIDTH)
    layer = _quantized_layer(kind, weight, dtype).to(device)
    inputs = x.to(device, dtype).clone().requires_grad_()
    output = layer(inputs)
    output.sum().backward()
    exact = x @ weight.T
    error = float((output.detach().float().cpu() - exact).norm() / exact.norm())
    gradient = inputs.grad
    if not error < _ERRORS[kind]:
        raise ArithmeticError(f"a {kind} layer on {device.type} is {error:.0%} off what it should compute")
    if gradient is None or not bool(torch.isfinite(gradient).all()) or float(gradient.abs().max()) == 0:
        raise ArithmeticError(f"a {kind} layer on {device.type} gives no gradient")
    yield Finding(kind, "ok", f"forward and backward on {device.type}, {error:.1%} from full precision")


def try_attention() -> Iterator[Finding]:
    """lmtune's attention by document against a masked one, and which of PyTorch's kernels run here."""
    import torch
    import torch.nn.functional as F

    from lmtune.batching.packing import Layout
    from lmtune.kernels.attention import attention_by_document
    from lmtune.models.base import compute_dtype
    from lmtune.models.device import default_device

    device = default_device()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 96, 32, device=device) for _ in range(3))
    owner = torch.tensor([0] * 40 + [1] * 56, device=device)
    mask = (owner[:, None] == owner) & torch.ones(96, 96, dtype=torch.bool, device=device).tril()
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    got, _ = attention_by_document(torch.nn.Module(), q, k, v, None, layout=Layout.of_documents(40, 56))
    difference = float((got.transpose(1, 2) - wanted).abs().max())
    if not difference < 1e-3:
        raise ArithmeticError(f"attention by document differs by {difference:.2g} from masked attention")
    kernels = _working_kernels(*(tensor.to(compute_dtype(device)) for tensor in (q, k, v)))
    yield Finding("attention", "ok", f"by document on {device.type}; kernels: {', '.join(kernels)}")
    if device.type == "cuda" and not {"flash", "cudnn"} & set(kernels):
        yield Finding("attention", "warn", "no flash kernel for this GPU", "long rows are slower; nothing to mend")


def try_processes() -> Iterator[Finding]:
    """Whether processes can talk: gloo on CPUs, nccl on GPUs."""
    import torch
    import torch.distributed as dist

    working = []
    kinds = ["gloo"] + (["nccl"] if torch.cuda.is_available() and dist.is_nccl_available() else [])
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group(kind, init_method=f"file://{folder}/meet", rank=0, world_size=1)
            try:
                tensor = torch.ones(1, device="cuda" if kind == "nccl" else "cpu")
                dist.all_reduce(tensor)
                working.append(kind)
            finally:
                dist.destroy_process_group()
    yield Finding("processes", "ok", f"{' and '.join(working)}: --processes works")


def _quantized_layer(kind: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.nn.Module:
    import bitsandbytes as bnb

    layer: Any
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(_WIDTH, _WIDTH, bias=False, compute_dtype=dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    else:
        layer = bnb.nn.Linear8bitLt(_WIDTH, _WIDTH, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    checked: torch.nn.Module = layer
    return checked


def _working_kernels(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[str]:
    """Which kernels of scaled dot product attention run for tensors like these."""
    import warnings

    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
    }  # fmt: skip
    working = []
    for name, backend in backends.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each kernel that does not fit says why
            try:
                with sdpa_kernel([backend]):
                    F.scaled_dot_product_attention(query, key, value, is_causal=True)
            except RuntimeError:
                continue
        working.append(name)
    return working


def _cpu_capability() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()


TRIALS: dict[str, Callable[[], Iterator[Finding]]] = {
    "CPU": find_processor,
    "GPU": find_gpus,
    "nf4": lambda: try_quantization("nf4"),
    "int8": lambda: try_quantization("int8"),
    "attention": try_attention,
    "processes": try_processes,
}
_BITSANDBYTES = "install bitsandbytes again in the version of constraints.txt"
_TORCH = "install torch again in the version of constraints.txt"
# What a trial that raises stands for: nf4 is what the main job uses
_ON_FAILURE = {
    "CPU": ("fail", _TORCH),
    "GPU": ("warn", "check the driver with nvidia-smi; ACCELERATE_USE_CPU=true works without the GPU"),
    "nf4": ("fail", f"{_BITSANDBYTES}, or set model.quantization=none"),
    "int8": ("warn", f"{_BITSANDBYTES}, or use nf4"),
    "attention": ("fail", _TORCH),
    "processes": ("warn", f"one process works all the same; for more {_TORCH}"),
}

if __name__ == "__main__":
    main()
    sys.exit(0)
