"""What works on this machine, found by trying it, and how to fix what does not.

    for finding in examine():
        print(finding.level, finding.name, finding.text)

What needs torch is tried by this module in a process of its own, so a library that cannot be loaded, or a kernel that
kills its process, becomes a finding and not the end of the examination.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

Level = Literal["ok", "warn", "fail"]

SHOWN_PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "gradio", "huggingface_hub",
)  # fmt: skip
_PROBES = (sys.executable, "-m", "lmtune.doctor")
_PROBE_SECONDS = 180.0
_GIB = 2**30
_WIDTH = 128  # of the layers that are tried
# The largest error of a layer's output relative to the output; measured are 0.09 and 0.006 on a CPU
_ERRORS = {"nf4": 0.2, "int8": 0.05}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: its name, what was found, and how to fix it.

    `warn`: something is missing that the main job does not need; `fail`: it needs it.
    """

    name: str
    level: Level
    text: str
    fix: str = ""


def examine(runs_dir: Path = Path()) -> Iterator[Finding]:
    """Everything, one by one as it is found; `runs_dir` is where runs would be written."""
    yield from check_packages()
    yield from run_probes(_PROBES, _PROBE_SECONDS)
    yield check_folder("runs", runs_dir, "fail", "work in a folder you can write to, or set run.dir")
    yield check_disk(runs_dir)
    yield from check_caches()
    yield check_hub_token()


def check_packages() -> Iterator[Finding]:
    """Python and the libraries, against what lmtune asks for; small ones are named only if they are wrong."""
    yield Finding("python", "ok", platform.python_version())
    for line in importlib.metadata.requires("lmtune") or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        finding = check_package(needed)
        if needed.name in SHOWN_PACKAGES or finding.level != "ok":
            yield finding


def check_package(needed: Requirement) -> Finding:
    """Whether a package is there, in a version that lmtune was tried with."""
    install = f'pip install "{needed}"'
    try:
        found = importlib.metadata.version(needed.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(needed.name, "fail", "not installed", install)
    if not needed.specifier.contains(found, prereleases=True):
        return Finding(needed.name, "warn", f"{found}; lmtune was tried with {needed.specifier}", install)
    return Finding(needed.name, "ok", found)


def run_probes(command: Sequence[str], seconds: float) -> Iterator[Finding]:
    """The findings of a process that prints them as JSON lines, `{"begin": name}` before each part.

    A part in which the process dies, or does not come to an end, is a finding too.
    """
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    part, late = "torch", threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)

        def stop() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            for line in child.stdout or ():
                tree = json.loads(line) if line.startswith("{") else {}  # a library may print something of its own
                if "begin" in tree:
                    part = tree["begin"]
                elif "level" in tree:
                    yield Finding(**tree)
            child.wait()
        finally:
            timer.cancel()
            child.kill()
            child.wait()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1][:300]
    if code := child.returncode:
        if late.is_set():
            why = f"no end after {seconds:.0f} s"
        elif code < 0:
            why = f"killed its process ({signal.Signals(-code).name}): a library does not fit this machine"
        else:
            why = f"ended with an error: {last}"
        fix = "the parts after it were not tried; install with the versions of constraints.txt, which are tested"
        yield Finding(part, "fail", why, fix)


def check_folder(name: str, folder: Path, level: Level, fix: str) -> Finding:
    """Whether a file can be made in `folder`, or the nearest folder above it that exists."""
    place = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            return Finding(name, "ok", f"{folder} can be written")
    except OSError as error:
        return Finding(name, level, f"{folder} cannot be written ({error.strerror or error})", fix)


def check_disk(folder: Path) -> Finding:
    """Room for runs, and for models of the size people tune."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free / _GIB
    if free < 0.5:
        return Finding("disk", "fail", f"{free:.2f} GiB free", "make room for checkpoints and merged models")
    if free < 10:
        return Finding("disk", "warn", f"{free:.1f} GiB free", "enough for the demo; a 7B model takes 15 GiB")
    return Finding("disk", "ok", f"{free:,.0f} GiB free")


def check_caches() -> Iterator[Finding]:
    """The folders where tokenized rows and downloaded models are kept."""
    from huggingface_hub import constants

    from lmtune.io.atomic import cache_folder

    yield check_folder("row cache", cache_folder(), "fail", "name another folder in LMTUNE_CACHE")
    yield check_folder("model cache", Path(constants.HF_HUB_CACHE), "warn", "name another folder in HF_HOME")
    if constants.HF_HUB_OFFLINE:
        fix = "only models in the cache are found; unset it for others"
        yield Finding("network", "warn", "HF_HUB_OFFLINE is set", fix)


def check_hub_token() -> Finding:
    """Whether there is a Hub token; it is not shown, and the Hub is not asked."""
    from huggingface_hub import get_token

    none = "none; only `lmtune push` and private or gated models need one (hf auth login)"
    return Finding("Hub token", "ok", "there is one" if get_token() else none)


def main() -> None:
    """Every trial, one after the other, as JSON lines; a failure in one does not stop the next."""
    for name, (trial, level, fix) in TRIALS.items():
        print(json.dumps({"begin": name}), flush=True)
        try:
            for finding in trial():
                print(json.dumps(asdict(finding)), flush=True)
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(json.dumps(asdict(Finding(name, level, text, fix))), flush=True)


def find_processor() -> Iterator[Finding]:
    """Cores and memory."""
    import torch

    from lmtune.models.device import free_memory

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("CPU", "ok", f"{cores} cores, {torch.get_num_threads()} threads, {capability}")
    free = free_memory(torch.device("cpu")) / _GIB
    fix = "little for training; close other programs" if free < 2 else ""
    yield Finding("memory", "warn" if fix else "ok", f"{free:.1f} GiB free", fix)


def find_gpus() -> Iterator[Finding]:
    """Each GPU with its memory, and whether it computes in bf16."""
    import torch

    if not torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
        if driver and torch.version.cuda is None:
            fix = "install torch's CUDA build; pytorch.org says how"
            yield Finding("GPU", "warn", "there is an NVIDIA driver, but torch is a build for CPUs", fix)
        elif driver:
            fix = "its driver may be too old for this torch, or CUDA_VISIBLE_DEVICES hides it"
            yield Finding("GPU", "warn", "there is an NVIDIA driver, but torch finds no GPU", fix)
        else:
            yield Finding("GPU", "ok", "none; small models can be tuned on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        text = f"{about.name}, {about.total_memory / _GIB:.0f} GiB, compute capability {about.major}.{about.minor}"
        if about.major >= 8 or torch.version.hip:  # older ones only emulate bf16
            yield Finding(f"GPU {index}", "ok", f"{text}, bf16")
        else:
            fix = "set model.dtype=float16 or float32, and compare the loss"
            yield Finding(f"GPU {index}", "warn", f"{text}, no bf16 of its own", fix)


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
    """lmtune's attention by segment against a masked one."""
    import torch
    import torch.nn.functional as F

    from lmtune.batching.packing import SegmentLayout
    from lmtune.kernels.attention import segment_attention
    from lmtune.models.device import default_device

    device = default_device()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 96, 32, device=device) for _ in range(3))
    owner = torch.tensor([0] * 40 + [1] * 56, device=device)
    mask = (owner[:, None] == owner) & torch.ones(96, 96, dtype=torch.bool, device=device).tril()
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    got, _ = segment_attention(torch.nn.Module(), q, k, v, None, segments=SegmentLayout.of_segments(40, 56))
    difference = float((got.transpose(1, 2) - wanted).abs().max())
    if not difference < 1e-3:
        raise ArithmeticError(f"attention by segment differs by {difference:.2g} from masked attention")
    yield Finding("attention", "ok", f"by segment on {device.type}")


def try_processes() -> Iterator[Finding]:
    """Whether processes can talk: gloo on CPUs, nccl on GPUs."""
    import torch
    import torch.distributed as dist

    kinds = ["gloo"] + (["nccl"] if torch.cuda.is_available() and dist.is_nccl_available() else [])
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group(kind, init_method=f"file://{folder}/meet", rank=0, world_size=1)
            try:
                dist.all_reduce(torch.ones(1, device="cuda" if kind == "nccl" else "cpu"))
            finally:
                dist.destroy_process_group()
    yield Finding("processes", "ok", f"{' and '.join(kinds)}: --processes works")


def _quantized_layer(kind: str, weight: Any, dtype: Any) -> Any:
    import bitsandbytes as bnb

    layer: Any
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(_WIDTH, _WIDTH, bias=False, compute_dtype=dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    else:
        layer = bnb.nn.Linear8bitLt(_WIDTH, _WIDTH, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return layer


_BITSANDBYTES = "install bitsandbytes again in the version of constraints.txt"
_TORCH = "install torch again in the version of constraints.txt"
# Each trial, and what it stands for if it raises: nf4 is what the main job uses
TRIALS: dict[str, tuple[Callable[[], Iterator[Finding]], Level, str]] = {
    "CPU": (find_processor, "fail", _TORCH),
    "GPU": (find_gpus, "warn", "check the driver with nvidia-smi; ACCELERATE_USE_CPU=true works without the GPU"),
    "nf4": (lambda: try_quantization("nf4"), "fail", f"{_BITSANDBYTES}, or set model.quantization=none"),
    "int8": (lambda: try_quantization("int8"), "warn", f"{_BITSANDBYTES}, or use nf4"),
    "attention": (try_attention, "fail", _TORCH),
    "processes": (try_processes, "warn", f"one process works all the same; for more {_TORCH}"),
}


if __name__ == "__main__":
    main()
