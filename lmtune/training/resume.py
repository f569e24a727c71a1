"""Whether a run begins, goes on or is finished already, and whether going on would still be the same run.

A checkpoint carries its run's identity: the settings, data and base that decide what is learned. If any of them has
changed, continuing would give a model that no single command describes, so it is refused and the differences named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any, get_type_hints

from lmtune.batching.plan import Plan
from lmtune.config.load import load_config, to_tree
from lmtune.config.schema import FinetuneConfig, RunConfig, TrainConfig
from lmtune.data.report import DataReport, changed_files
from lmtune.errors import CheckpointError
from lmtune.io.text import format_list
from lmtune.runs.log import recorded_steps
from lmtune.runs.store import RunDirectory
from lmtune.training.checkpoint import Checkpoint, newest_checkpoint

# Settings that change speed, memory or reporting; what is learned they change only as far as dropout is drawn anew.
_FREE = {
    "train.micro_batch_tokens", "train.gradient_checkpointing", "evaluation.score_base",
    "evaluation.exact_match_rows", "evaluation.max_new_tokens", "data.train", "data.validation", "adapter.adapter",
}  # fmt: skip
_LENGTH = ("train.epochs", "train.max_steps")  # a run may be trained on: `steps_before` and `require_steps` judge them
_DATA = "the data files' content"
_TOKENS = "the rows' tokens"


def identity(
    config: FinetuneConfig, data_key: str, base_fingerprint: str, tokens: str | None = None, start: str | None = None
) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued, as `section.key: value`.

    Data counts by its `tokens`, not by its path or by what made them; by all that they depend on (`data_key`) where one
    of the two runs has no such hash, as runs of earlier versions. The base and the adapter to begin from (`start`)
    count by their weights.
    """
    flat = {
        f"{section}.{key}": value
        for section, values in to_tree(config).items()
        if section != "run"
        for key, value in values.items()
    }
    kept = {key: value for key, value in flat.items() if key not in _FREE}
    data = {_DATA: data_key} if tokens is None else {_DATA: data_key, _TOKENS: tokens}
    if start is not None:
        kept["the starting adapter's weights"] = start
    return {**kept, **data, "the base model's weights": base_fingerprint}


def _defaults() -> dict[str, Any]:
    """The default of every setting that has one, as `section.key: value`."""
    sections = get_type_hints(FinetuneConfig)
    return {
        f"{name}.{field.name}": list(field.default) if isinstance(field.default, tuple) else field.default
        for name, section in sections.items()
        for field in fields(section)
        if field.default is not MISSING
    }


def find_checkpoint(
    run: RunDirectory, now: Mapping[str, Any], data: DataReport | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from (None at the beginning), and what was wrong with newer ones.

    Args:
        run: the run.
        now: the identity asked for.
        data: what the data files are now, to say which one changed.

    Raises:
        CheckpointError: the run was made with other settings, data or base, or all its checkpoints are damaged.
    """
    run.clean()
    checkpoint, skipped = newest_checkpoint(run.checkpoints)
    if checkpoint is not None:
        require_same(run, checkpoint.state["identity"], now, data)
    return checkpoint, skipped


def records_lost(run: RunDirectory, checkpoint: Checkpoint | None) -> list[str]:
    """What to say of the steps that an unfinished run has done, where their weights or records are gone.

    Raises:
        CheckpointError: checkpoints must have been written, and there are none; or the records are damaged.
    """
    steps, summary = recorded_steps(run), run.read_summary()
    if checkpoint is not None:
        missing = checkpoint.step - len({step for step in steps if 1 <= step <= checkpoint.step})
        return [f"{run.metrics}: {missing} of the {checkpoint.step} steps done are no longer recorded"] * bool(missing)
    done = max([*steps, summary.get("steps") or 0])
    due = (load_config(FinetuneConfig, run.config).run if run.exists() else RunConfig()).checkpoint_every_steps
    # The first one itself may have been what could not be written.
    if done > due or (done and summary.get("status") == "complete"):
        raise CheckpointError(
            f"{run.checkpoints}: no checkpoint is there, though {done} steps are recorded; restore the folder from a "
            "copy, or begin again with run.resume=never (the old run is renamed)"
        )
    return [f"{run.path}: {done} steps were done before and no checkpoint holds them; they are done again"] * bool(done)


def require_same(
    run: RunDirectory, before: Mapping[str, Any], now: Mapping[str, Any], data: DataReport | None = None
) -> None:
    """Raise CheckpointError with every difference between a run's identity and the one asked for.

    A setting that the run's version did not know yet counts as its default, which keeps what was done before.
    """
    before, now = ({k: v for k, v in one.items() if k not in _FREE and k not in _LENGTH} for one in (before, now))
    unused = _DATA if _TOKENS in before and _TOKENS in now else _TOKENS
    before, now = ({k: v for k, v in one.items() if k != unused} for one in (before, now))
    before = {**{key: value for key, value in _defaults().items() if key in now}, **before}
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    differences = []
    for key in keys:
        if key in (_DATA, _TOKENS):
            differences += _changed_data(run, data, alone=len(keys) == 1)
        else:
            differences.append(
                f"{key}: was {before.get(key)!r}, now {now.get(key)!r}" if "." in key else f"{key}: changed"
            )
    if keys:
        raise CheckpointError(
            f"{run.path}: this run was begun differently, so it cannot go on\n{format_list(differences)}\n"
            "  put these back, or choose a new run.name, or begin again with run.resume=never (the old run is renamed)"
        )


def steps_before(before: Mapping[str, Any], num_rows: int, train: TrainConfig) -> int | None:
    """How many steps a run of that identity was to have; None if it does not say so."""
    length: dict[str, Any] = {key.partition(".")[2]: before.get(key) for key in _LENGTH}
    return None if length["epochs"] is None else Plan.count_steps(num_rows, replace(train, **length))


def require_steps(run: RunDirectory, done: int, steps: int, train: TrainConfig) -> None:
    """Raise CheckpointError if a run that has `done` so many is to have only `steps`."""
    if done > steps:
        key = "train.epochs" if train.max_steps is None else "train.max_steps"
        value = train.epochs if train.max_steps is None else train.max_steps
        raise CheckpointError(
            f"{run.path}: {key}: {value:g} makes {steps} steps, and {done} are done; raise it to {done} or "
            "more, or begin again with run.resume=never (the old run is renamed)"
        )


def _changed_data(run: RunDirectory, data: DataReport | None, alone: bool) -> list[str]:
    """Why the rows of tokens are others than they were, as far as the run's `data.json` tells.

    Args:
        run: the run.
        data: what the data files are now.
        alone: whether nothing else differs, such as `data.max_length`, from which other tokens follow.
    """
    try:
        before = run.read_data_report()
    except CheckpointError:
        before = None
    if before is None or data is None:
        return [f"{_DATA}: changed"]
    if files := changed_files(before, data):
        return files
    return ["how rows become tokens: changed (the tokenizer, its template, or another version of lmtune)"] * alone
