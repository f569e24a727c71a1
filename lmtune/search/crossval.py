"""Cross-validation: a run for each fold, and how far their scores spread.

    result = cross_validate(config, folds=5)          # runs/NAME/fold-1 … fold-5, each an ordinary run

The scores of folds are not independent, for any two of them share most of their training rows; their spread alone
would say too little of how they might fall with other rows. The interval is that of a t distribution with the variance
of a mean of k folds raised to `(1/k + 1/(k - 1)) s²` (Nadeau and Bengio, Inference for the generalization error, 2003).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lmtune.config.metrics import deciding_metric, direction_of
from lmtune.config.schema import FinetuneConfig
from lmtune.data.store import TokenizedData
from lmtune.errors import CheckpointError, ConfigError
from lmtune.evaluation.intervals import student
from lmtune.io.atomic import write_json
from lmtune.io.console import err, escape, warn
from lmtune.io.text import is_finite_number
from lmtune.parallel.launch import connect
from lmtune.runs.store import RunDirectory, ScoreValues, Summary
from lmtune.search.folds import fold_selections, group_values
from lmtune.search.quietly import one_run
from lmtune.training.compose import load_rows
from lmtune.training.run import run_finetune
from lmtune.training.shared import Shared

RESULT = "crossval.json"
_COUNTS = ("rows", "exact_match_rows")


@dataclass(frozen=True)
class Spread:
    """One score over the folds.

    Attributes:
        values: of each fold.
        mean, deviation: of these; the deviation is that of a sample.
        low, high: the 95 % interval of the mean.
    """

    values: tuple[float, ...]
    mean: float
    deviation: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of two folds or more."""
        k = len(values)
        mean = math.fsum(values) / k
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (k - 1))
        reach = student(k - 1) * deviation * math.sqrt(1 / k + 1 / (k - 1))
        return cls(tuple(values), mean, deviation, mean - reach, mean + reach)


@dataclass(frozen=True)
class CrossValidation:
    """What `crossval.json` holds.

    Attributes:
        name: of the folder with the folds' runs.
        folds, group: as they were asked for.
        metric: the score that decides.
        rows: how many are scored together.
        tuned, base: each score over the folds; `base` is empty where it was not scored.
        held_out: SHA-256 of what each fold was scored on, in hex.
        steps: of each fold, as trained; patience may end one sooner.
    """

    name: str
    folds: int
    group: str | None
    metric: str
    rows: int
    tuned: Mapping[str, Spread]
    base: Mapping[str, Spread]
    held_out: tuple[str, ...]
    steps: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def read(cls, folder: Path) -> CrossValidation:
        """The result in a folder; ConfigError if there is none, or it is damaged."""
        try:
            tree = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            spreads = {
                key: {name: Spread(**{**one, "values": tuple(one["values"])}) for name, one in tree[key].items()}
                for key in ("tuned", "base")
            }
            return cls(**{**tree, **spreads, "held_out": tuple(tree["held_out"]), "steps": tuple(tree["steps"])})
        except OSError:
            raise ConfigError(f"{folder}: no finished cross-validation; `lmtune crossval` makes one") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{folder / RESULT}: damaged: {error}; delete it and run the same command again"
            ) from None


def fold_config(config: FinetuneConfig, fold: int) -> FinetuneConfig:
    """The settings of one fold, counted from 1: an ordinary run, which holds nothing out by itself."""
    folder = RunDirectory.of(config.run).path
    run = replace(config.run, dir=str(folder), name=f"fold-{fold}", resume="auto")
    return replace(config, data=replace(config.data, validation=None, validation_fraction=0.0), run=run)


def check_crossval(config: FinetuneConfig, folds: int, group: str | None) -> Path:
    """The folder of the folds' runs, after what can be seen before anything is loaded was checked; ConfigError."""
    run = RunDirectory.of(config.run)
    if run.exists():
        raise ConfigError(f"run.name: {run.path} is a run already; choose another run.name")
    if config.run.resume != "never" and (run.path / RESULT).exists():
        before = CrossValidation.read(run.path)
        if (before.folds, before.group) != (folds, group):
            was = f"--folds {before.folds}" + (f" --group {before.group}" if before.group else "")
            raise CheckpointError(
                f"{run.path}: was made with {was}; put that back, or choose a new run.name, or begin again with "
                "run.resume=never (the old one is renamed)"
            )
    return run.path


def cross_validate(
    config: FinetuneConfig, folds: int, group: str | None = None, said: Callable[[int, Summary], None] | None = None
) -> CrossValidation:
    """Train and score each fold, or what is left of it, and write `crossval.json`.

    Args:
        config: the settings; `run.name` names the folder of the folds' runs.
        folds: how many.
        group: the key of rows whose equal values stay in one fold.
        said: is told each fold's number and summary.

    Raises:
        LmtuneError: something is wrong; Interrupted: a fold was asked to stop, and is saved.
    """
    folder = check_crossval(config, folds, group)
    if config.run.resume == "never" and folder.exists():
        err.print(f"the earlier cross-validation is now {escape(str(RunDirectory(folder).archive()))}")
    if config.data.validation is not None:
        warn("data.validation is not used: each fold is scored on the rows of data.train that it leaves out")
    shared, parallel = Shared(), connect(config.parallel, config.run.process_timeout_seconds)
    data = load_rows(fold_config(config, 1), parallel, shared)[1].train
    groups = None if group is None else group_values(data, group)
    selections = fold_selections(data, folds, config.train.seed, groups)
    summaries, seen = list[Summary](), set[str]()
    for fold, selection in enumerate(selections, start=1):
        own = fold_config(config, fold)
        with one_run(seen):
            summary = run_finetune(own, RunDirectory.of(own.run), selection, shared=shared).summary
        summaries.append(summary)
        if said is not None:
            said(fold, summary)
    result = CrossValidation(
        folder.name, folds, group, deciding_metric(config.evaluation.metric, config.objective.kind)[0],
        sum(len(one.validation or ()) for one in selections), _spreads([one.tuned for one in summaries]),
        _spreads([one.base for one in summaries]),
        tuple(_sha256(data, one.validation or ()) for one in selections), tuple(one.steps or 0 for one in summaries),
    )  # fmt: skip
    write_json(folder / RESULT, result.to_dict())
    return result


def against(result: CrossValidation, other: CrossValidation) -> dict[str, Spread]:
    """How far the scores of `result` are above those of `other`, fold by fold; for losses below is better.

    Raises:
        ConfigError: their folds are not scored on the same rows.
    """
    if result.held_out != other.held_out:
        raise ConfigError(
            f"--against: {other.name} was scored on other rows; expected the same rows (copies by `lmtune augment` "
            "aside), train.seed, --folds and --group"
        )
    return {
        name: Spread.of([a - b for a, b in zip(one.values, other.tuned[name].values, strict=True)])
        for name, one in result.tuned.items()
        if name in other.tuned
    }


def verdict(metric: str, apart: Spread) -> str:
    """`better`, `worse` or `not told apart`: the first of two, by how far its score is above the other's."""
    if apart.low <= 0 <= apart.high:
        return "not told apart"
    return "better" if (apart.mean < 0) == (direction_of(metric) == "min") else "worse"


def _spreads(scores: Sequence[ScoreValues | None]) -> dict[str, Spread]:
    """Of each score that all folds have."""
    known = [one for one in scores if one is not None]
    if len(known) < len(scores):
        return {}
    names = [name for name in known[0] if name not in _COUNTS and all(is_finite_number(one.get(name)) for one in known)]
    return {name: Spread.of([float(one[name] or 0.0) for one in known]) for name in names}


def _sha256(data: TokenizedData, rows: Sequence[int]) -> str:
    """Equal for rows of equal content, in whatever order."""
    return hashlib.sha256(json.dumps(sorted(data.content[list(rows)].tolist())).encode()).hexdigest()
