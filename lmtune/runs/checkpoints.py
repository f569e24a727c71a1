"""Which checkpoints of a run are whole, told without loading them.

    checkpoints/step-000100/   adapter_model.safetensors  optimizer.safetensors  state.json  manifest.json

They are written by `lmtune.training.checkpoint`. A folder without a manifest that matches is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

ADAPTER, OPTIMIZER, STATE, MANIFEST = (
    "adapter_model.safetensors", "optimizer.safetensors", "state.json", "manifest.json",
)  # fmt: skip


def checkpoint_folders(folder: Path) -> list[Path]:
    """The folders named like checkpoints, oldest step first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit()), key=step_of)


def step_of(path: Path) -> int:
    """The step of a folder named like a checkpoint."""
    return int(path.name[5:])


def problem_of(path: Path) -> str | None:
    """Why a checkpoint folder cannot be used, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is damaged ({error})"
    if not isinstance(manifest, dict):
        return f"{MANIFEST} is damaged (no mapping)"
    for name in (ADAPTER, OPTIMIZER, STATE):
        if not (path / name).is_file():
            return f"{name} is missing"
        if manifest.get(name) != fingerprint(path / name):
            return f"{name} is not what was written (size or checksum differs)"
    return None


def fingerprint(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: its size and SHA-256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
