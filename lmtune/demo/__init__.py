"""The embedded default: a tiny base model, and example data.

It shows the whole work of lmtune on any computer, offline, in two minutes. The model knows nothing beyond its world.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def tiny_path() -> Path:
    """The folder of the base model `tiny`."""
    return Path(str(resources.files("lmtune.demo"))) / "tiny"


def support_data() -> Path:
    """The example rows to train on: prompt/completion JSONL."""
    return _examples() / "support.jsonl"


def support_heldout() -> Path:
    """The example rows to score with: the same facts, asked in other words."""
    return _examples() / "support_heldout.jsonl"


def drift_prompts() -> Path:
    """Prompts about everything and nothing, in English and Chinese: what a model should answer as before."""
    return Path(str(resources.files("lmtune.demo"))) / "drift.jsonl"


def _examples() -> Path:
    """`lmtune.examples` in an installed package, which is the folder `examples/` of a checkout."""
    return Path(str(resources.files("lmtune.examples")))
