"""What a run was made with, for `environment.json`, `preview.json` and `verification.json`: versions, device, hashes,
some rows and how long they are."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import Any

import numpy as np
import torch

from lmtune.data.preview import pieces_of
from lmtune.evaluation.generative import split_prompt
from lmtune.training.compose import Components

_SHOWN_TOKENS, _BARS = 400, 40
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


def preview(parts: Components, count: int = 4) -> dict[str, Any]:
    """For `preview.json`: the first training rows as `[text, trained]` of each token, and how long sequences are."""
    limit, rows = parts.config.data.max_length, []
    for index in range(min(count, len(parts.data.train))):
        for sequence in parts.data.train[index].sequences[:2]:
            shown = list(islice(pieces_of(parts.renderer.tokenizer, sequence), _SHOWN_TOKENS))
            left = len(sequence.input_ids) - sum(number for _, number, _ in shown)
            tokens = [[text, bool(is_target)] for text, _, is_target in shown]
            rows.append({"where": parts.data.train.location(index), "tokens": tokens, "more": left})
    trained, held_out = parts.data.train.sequences.num_tokens, parts.data.validation
    scored = None if held_out is None else held_out.sequences.num_tokens
    longest = max(int(trained.max()), 0 if scored is None else int(scored.max()))
    # a limit far off would press all bars into one
    most = longest if limit > 4 * longest else max(limit, longest)
    edges = np.unique(np.linspace(0, most, _BARS + 1).round().astype(int))
    counted = [None if one is None else np.histogram(one, edges)[0].tolist() for one in (trained, scored)]
    bars = {"edges": edges.tolist(), "train": counted[0], "validation": counted[1], "limit": limit}
    return {"rows": rows, "lengths": bars}


def verification_rows(parts: Components, count: int = 16) -> dict[str, Any]:
    """The tokens of some held-out rows (trained ones where none are held out), on which a merge, or what an endpoint
    serves, is verified later, and how many of them stand before the answer.

    Of a row that makes several sequences the last, which holds all of it: each costs a pass over all weights.
    """
    rows = parts.data.train if parts.data.validation is None else parts.data.validation
    some = [rows[index] for index in range(min(count, len(rows)))]
    return {
        "sequences": [row.sequences[-1].input_ids.tolist() for row in some],
        "prompt_tokens": [len(split_prompt(row)[0]) for row in some],
    }
