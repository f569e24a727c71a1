"""What a run was made with, for `environment.json` and `verification.json`: versions, device, hashes, some tokens."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lmtune.training.compose import Components

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "lmtune")


def environment(parts: Components) -> dict[str, Any]:
    """Versions, device, git revision and data hashes, for `environment.json`; no path and no name of a machine."""
    device = parts.parallel.device
    return {
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "dtype": str(parts.forward.dtype).removeprefix("torch."),
        "processes": parts.parallel.world_size,
        "torch_threads": torch.get_num_threads(),
        "git_revision": _git_revision(),
        "data_sha256": parts.data.key,
        "tokens_sha256": parts.data.signature,
        "base_fingerprint": parts.fingerprint,
        **({"starting_adapter_sha256": parts.start.sha256} if parts.start is not None else {}),
        **({"selection_sha256": parts.selection.sha256} if parts.selection is not None else {}),
        **({"head": asdict(parts.head)} if parts.head is not None else {}),
        "disabled_optimizations": parts.forward.disabled_optimizations,
    }


def _version(library: str) -> str | None:
    """The installed version; None for a library that is not there, as bitsandbytes may be."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The commit of the folder the command was run in, if it is a checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def verification_rows(parts: Components, count: int = 16) -> dict[str, Any]:
    """The tokens of some held-out rows (trained ones where none are held out), on which a merge is verified later.

    Of a row that makes several sequences the last, which holds all of it: each costs a pass over all weights.
    """
    rows = parts.data.train if parts.data.validation is None else parts.data.validation
    some = [rows[index].sequences[-1] for index in range(min(count, len(rows)))]
    return {"sequences": [sequence.input_ids.tolist() for sequence in some]}
