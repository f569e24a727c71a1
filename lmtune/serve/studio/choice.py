"""Which model the app shows when none is named, and what to ask a model of the embedded demo."""

from __future__ import annotations

from pathlib import Path

from lmtune.config.load import data_paths, load_config
from lmtune.config.schema import FinetuneConfig
from lmtune.errors import LmtuneError
from lmtune.runs.store import RunDirectory, find_run

_ABOUT_THE_SHOP = (
    "Where do customers park their cars?",
    "When will the delivery come?",
    "What gift cards can I buy?",
    "Is the shop closed during lunch?",
)
_ABOUT_THE_WORLD = ("Hello!", "What is the opposite of hot?", "What colour is the sky?", "What can you do?")


def newest_run(folder: str | Path = "runs") -> str | None:
    """The path of the run in `folder` whose adapter was saved last; None if there is none."""
    adapters = [path for path in Path(folder).glob("*/adapter/adapter_config.json") if _is_run(path.parents[1])]
    return str(max(adapters, key=lambda path: path.stat().st_mtime).parents[1]) if adapters else None


def example_questions(target: str) -> tuple[str, ...]:
    """Questions that show what `target` can do, where it is a model of the embedded demo; none for other models."""
    if target == "tiny":
        return _ABOUT_THE_WORLD
    run = find_run(target)
    if run is None:
        return ()
    try:
        config = load_config(FinetuneConfig, run.config)
    except LmtuneError:  # whoever loads the model says what is wrong with the run
        return ()
    learned_the_shop = any(Path(path).name == "support.jsonl" for path in data_paths(config.data.train))
    return _ABOUT_THE_SHOP if config.model.name == "tiny" and learned_the_shop else ()


def _is_run(path: Path) -> bool:
    return RunDirectory(path).exists()
