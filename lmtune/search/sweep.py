"""A search over settings: trials that Optuna proposes, each an ordinary run, over one loaded base.

    result = sweep(space, trials=20)          # runs/NAME/trial-000 …, study.db, sweep.json, best.yaml

A trial's values are drawn from (seed, its number, the key) and what was found before, so a search that was killed goes
on as if it had not been: the trial that was under way has its values in the study and resumes as any run does. Several
processes may work on one study; which trials are under way here is told by locks, which die with their process.
Machines that share a study have no lock in common: which combination a trial tries, and whether it is one too many,
follows from its number, which the database gives to one of them only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from lmtune.config.load import dump_config, load_config, to_tree
from lmtune.config.metrics import deciding_metric
from lmtune.config.schema import FinetuneConfig
from lmtune.errors import CheckpointError, ConfigError, LmtuneError
from lmtune.io.atomic import try_lock, wait_for_lock, write_json, write_text
from lmtune.io.console import err, escape
from lmtune.io.text import format_list, one_line
from lmtune.parallel.signals import Interrupted
from lmtune.runs.store import RunDirectory
from lmtune.search.pictures import write_pictures
from lmtune.search.quietly import one_run
from lmtune.search.results import RESULT, SweepResult, TrialResult
from lmtune.search.space import Choice, Space
from lmtune.training.hooks import Hook
from lmtune.training.loop import Action, StepEvent
from lmtune.training.run import run_finetune
from lmtune.training.shared import Shared

STUDY, BEST = "study.db", "best.yaml"
_TRIES = 20  # to make the tables of a study
_STARTUP_TRIALS = 8  # drawn at random, before what was found says where to look
_ABOUT = "lmtune"  # the study's own note of what is searched


class Pruned(Interrupted):
    """A trial that is behind the others was ended."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 0)


class PruningHook(Hook):
    """Tells the study of each validation, and ends a trial that is worse than the median of the others."""

    def __init__(self, trial: Any, metric: str) -> None:
        self.trial, self.metric = trial, metric

    def after_step(self, event: StepEvent) -> Action:
        if event.validation is None:
            return "continue"
        step, value = event.state.step, event.validation.value(self.metric)
        if step not in self.trial.study.trials[self.trial.number].intermediate_values:  # it was told before a crash
            self.trial.report(value, step)
        if not event.is_last and self.trial.should_prune():
            raise Pruned(f"after step {step}: {self.metric} {value:.4f} is behind the other trials")
        return "continue"


@dataclass(frozen=True)
class Plan:
    """What a search is.

    Attributes:
        space: the settings and what is searched.
        trials: how many there are to be in the study in all.
        minutes: after which no trial begins; None is no limit.
        storage: the address of a database, as SQLAlchemy reads it; None is `study.db` in the sweep's folder.
        prune: end trials that are behind.
    """

    space: Space
    trials: int
    minutes: float | None = None
    storage: str | None = None
    prune: bool = False

    @property
    def folder(self) -> Path:
        """Where the trials are kept."""
        return RunDirectory.of(self.space.config.run).path

    @property
    def url(self) -> str:
        """The study's storage."""
        return self.storage or f"sqlite:///{self.folder / STUDY}"


def check_plan(plan: Plan) -> None:
    """Raise ConfigError for what can be seen before anything is loaded."""
    config, folder = plan.space.config, plan.folder
    if RunDirectory(folder).exists() or (folder / "crossval.json").exists():
        raise ConfigError(f"run.name: {folder} is something else already; choose another run.name")
    if config.data.validation is None and not config.data.validation_fraction:
        raise ConfigError(
            "data.validation_fraction: 0 holds no row out, and trials are compared by rows that are; raise it, or "
            "name data.validation"
        )
    if plan.prune and config.evaluation.every_steps is None:
        raise ConfigError("--prune: needs evaluation.every_steps, the interval at which trials are compared")


def sweep(plan: Plan, said: Callable[[TrialResult, SweepResult], None] | None = None) -> SweepResult:
    """Make the trials that are left; tells `said` of each.

    Raises:
        LmtuneError: something is wrong; Interrupted: a trial was asked to stop, and is saved.
    """
    check_plan(plan)
    storage = None if plan.storage is None else _storage(plan)  # before anything is written
    folder, config = plan.folder, plan.space.config
    if config.run.resume == "never" and folder.exists():
        err.print(f"the earlier sweep is now {escape(str(RunDirectory(folder).archive()))}")
    folder.mkdir(parents=True, exist_ok=True)
    with _deciding(plan):  # of processes that start at once, one makes the study
        study = _open_study(plan, storage or _storage(plan))
        for left in folder.glob(".trial-*.lock"):  # by a process that was killed behind its last trial
            with contextlib.ExitStack() as held:
                _lock(plan, int(left.stem.removeprefix(".trial-")), held)
    shared, seen, began = Shared(), set[str](), time.monotonic()
    while plan.minutes is None or time.monotonic() - began < 60 * plan.minutes:
        with _claimed(plan, study) as trial:
            if trial is None:
                break
            _make(plan, study, trial, shared, seen)
            result = _write(plan, study)
            if said is not None:
                said(next(one for one in result.trials if one.number == trial.number), result)
    return _write(plan, study)


def trial_config(plan: Plan, number: int, values: Mapping[str, str]) -> FinetuneConfig:
    """The settings of a trial; the base, which is the same for all, is not scored."""
    config = plan.space.configured(values)
    run = replace(config.run, dir=str(plan.folder), name=f"trial-{number:03d}", resume="auto")
    return replace(config, run=run, evaluation=replace(config.evaluation, score_base=False))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError("sweep: optuna is not installed; pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _storage(plan: Plan) -> Any:
    """The database, with Optuna's tables; ConfigError if it cannot be used."""
    optuna = _optuna()
    arguments = {"connect_args": {"timeout": 60}} if plan.url.startswith("sqlite") else None
    tries = _TRIES
    while True:
        try:
            return optuna.storages.RDBStorage(plan.url, engine_kwargs=arguments)
        except Exception as error:  # whatever a database or its driver raises
            cause = (
                getattr(error, "orig", None) or (error.__cause__ if isinstance(error, ImportError) else None) or error
            )
            tries -= 1
            if tries and re.search("already exists|unique", str(cause), re.IGNORECASE):
                time.sleep(0.1)  # another machine makes the tables at this moment
                continue
            advice = (
                "this database needs a driver; install it with pip" if isinstance(error, ImportError)
                else "expected the address of a database that can be reached, such as sqlite:////shared/study.db"
            )  # fmt: skip
            raise ConfigError(f"--storage: {_without_password(plan.url)}: {one_line(cause)}; {advice}") from None


def _open_study(plan: Plan, storage: Any) -> Any:
    """The study, new or as it was left; CheckpointError if it searches something else."""
    optuna, config = _optuna(), plan.space.config
    metric, direction = deciding_metric(config.evaluation.metric, config.objective.kind)
    study = optuna.create_study(
        storage=storage, study_name=config.run.name, load_if_exists=True,
        direction="minimize" if direction == "min" else "maximize",
        pruner=optuna.pruners.MedianPruner() if plan.prune else optuna.pruners.NopPruner(),
    )  # fmt: skip
    tree = {key: value for key, value in to_tree(config).items() if key not in ("run", "parallel")}
    now = {"over": {one.key: one.text for one in plan.space.choices}, "settings": tree, "metric": metric}
    before = study.user_attrs.get(_ABOUT)
    if before is None:
        study.set_user_attr(_ABOUT, json.loads(json.dumps(now)))
    elif differences := list(_differences(before, json.loads(json.dumps(now)))):
        raise CheckpointError(
            f"{plan.folder}: this study was begun with others\n{format_list(differences)}\n"
            "  put these back, or choose a new run.name"
        )
    return study


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], place: str = "") -> Iterator[str]:
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        name = {"over": "--over", "settings": ""}.get(key, key) if not place else f"{place}.{key}".lstrip(".")
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, name or ".")
        elif old != new:
            yield f"{name}: was {old!r}, now {new!r}"


@contextlib.contextmanager
def _claimed(plan: Plan, study: Any) -> Iterator[Any]:
    """The next trial to work on, one that was cut off first; None where there are as many as there are to be.

    Which one is decided by one process at a time. Its own lock says that somebody here works on it.
    """
    with contextlib.ExitStack() as held:
        with _deciding(plan):
            trial = _cut_off(plan, study, held) or _new(plan, study, held)
        yield trial


@contextlib.contextmanager
def _deciding(plan: Plan) -> Iterator[None]:
    """Inside the block no other process of this folder decides."""
    with open(plan.folder / ".sweep.lock", "a+", encoding="utf-8") as file:
        wait_for_lock(file)
        yield


def _lock(plan: Plan, number: int, held: contextlib.ExitStack) -> bool:
    """Hold the lock of a trial; False if another process does."""
    path = plan.folder / f".trial-{number:03d}.lock"
    opened = contextlib.ExitStack()
    if try_lock(opened.enter_context(open(path, "a+", encoding="utf-8"))) is False:  # noqa: SIM115 - closed with `held`
        opened.close()
        return False
    held.enter_context(opened)
    held.callback(lambda: path.unlink(missing_ok=True))
    return True


def _cut_off(plan: Plan, study: Any, held: contextlib.ExitStack) -> Any:
    """A trial of this folder that is under way and that no process holds; with its values, which a crash may have cut
    short."""
    optuna = _optuna()
    for known in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        is_own = plan.storage is None or known.user_attrs.get("folder") == _owner(plan)
        if is_own and _lock(plan, known.number, held):
            now = study.get_trials(deepcopy=False)[known.number]
            if now.state == optuna.trial.TrialState.RUNNING:  # and not done by the process that has just let go of it
                trial = optuna.Trial(study, known._trial_id)
                _draw(plan, study, trial)
                return trial
    return None


def _new(plan: Plan, study: Any, held: contextlib.ExitStack) -> Any:
    """A new trial; None if there are enough, or every combination was tried."""
    if _is_enough(plan, _trials(study)):
        return None
    trial = study.ask()
    if _is_enough(plan, [one for one in _trials(study) if one.number < trial.number]):  # others were quicker
        study.tell(trial, state=_optuna().trial.TrialState.FAIL)
        return None
    _lock(plan, trial.number, held)
    trial.set_user_attr("folder", _owner(plan))
    _draw(plan, study, trial)
    return trial


def _trials(study: Any) -> list[Any]:
    """All in their order, without those that were one too many."""
    return [one for one in study.get_trials(deepcopy=False) if one.state.name != "FAIL"]


def _is_enough(plan: Plan, trials: Sequence[Any]) -> bool:
    return len(trials) >= plan.trials or bool(plan.space.combinations(plan.trials) and not _left(plan, trials))


def _left(plan: Plan, trials: Sequence[Any]) -> list[dict[str, str]]:
    """The combinations that these trials do not try; one without its values yet takes the first that is left to it."""
    left = plan.space.combinations(plan.trials)
    for one in trials:
        own = one.params if len(one.params) == len(plan.space.choices) else next(iter(left), None)
        left = [values for values in left if values != own]
    return left


def _draw(plan: Plan, study: Any, trial: Any) -> None:
    """Give the trial a value for every key; those that it has stay."""
    optuna = _optuna()
    left = _left(plan, [one for one in _trials(study) if one.number < trial.number])
    for place, choice in enumerate(plan.space.choices):
        seed = np.random.SeedSequence([plan.space.config.train.seed, trial.number, place]).generate_state(1)[0]
        study.sampler = optuna.samplers.TPESampler(seed=int(seed), n_startup_trials=_STARTUP_TRIALS)
        if left:
            with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
                study.sampler = optuna.samplers.PartialFixedSampler(left[0], study.sampler)
        _suggest(trial, choice)


def _suggest(trial: Any, choice: Choice) -> None:
    if choice.values:
        trial.suggest_categorical(choice.key, list(choice.values))
    elif choice.is_whole:
        step = {} if choice.step is None else {"step": round(choice.step)}
        trial.suggest_int(choice.key, round(choice.low), round(choice.high), log=choice.is_log, **step)
    else:
        trial.suggest_float(choice.key, choice.low, choice.high, step=choice.step, log=choice.is_log)


def _owner(plan: Plan) -> str:
    """What stands for this folder on this machine. Containers may share address and path, machines may share a disk."""
    mark = plan.folder / ".sweep.id"
    if not mark.is_file():
        write_text(mark, uuid.uuid4().hex)
    return hashlib.sha256(f"{uuid.getnode()} {mark.read_text('utf-8')}".encode()).hexdigest()[:16]


def _make(plan: Plan, study: Any, trial: Any, shared: Shared, seen: set[str]) -> None:
    """Run one trial to its end, and tell the study.

    A run that diverges, or for which the memory is too small, is the worst of all; one whose input is wrong ends the
    search, for so would all others.
    """
    state = _optuna().trial.TrialState
    metric, _ = deciding_metric(plan.space.config.evaluation.metric, plan.space.config.objective.kind)
    config = trial_config(plan, trial.number, _values(plan, trial.params))
    hooks = [PruningHook(trial, metric)] if plan.prune else []
    try:
        with one_run(seen):
            summary = run_finetune(config, RunDirectory.of(config.run), hooks=hooks, shared=shared).summary
    except Pruned as pruned:
        trial.set_user_attr("reason", str(pruned))
        study.tell(trial, state=state.PRUNED)
        return
    except LmtuneError as error:
        if error.exit_code != 1:
            raise
        trial.set_user_attr("failed", one_line(error))
        study.tell(trial, state=state.PRUNED)
        return
    value = (summary.tuned or {}).get(metric)
    if value is None:
        raise ConfigError("data.validation_fraction: no row was held out, so trials cannot be compared; raise it")
    trial.set_user_attr("scores", dict(summary.tuned or {}))
    trial.set_user_attr("steps", summary.steps)
    trial.set_user_attr("seconds", summary.figures.get("train_seconds"))
    study.tell(trial, float(value))


def _values(plan: Plan, params: Mapping[str, Any]) -> dict[str, str]:
    """The values of a trial as the command line writes them."""
    return {choice.key: choice.written(params[choice.key]) for choice in plan.space.choices if choice.key in params}


def _write(plan: Plan, study: Any) -> SweepResult:
    """The study as it is now, in `sweep.json`, `best.yaml` and pictures."""
    optuna, config = _optuna(), plan.space.config
    metric, direction = deciding_metric(config.evaluation.metric, config.objective.kind)
    trials = tuple(_result(plan, one) for one in _trials(study))
    done = [one for one in trials if one.status == "complete" and one.score is not None]
    best = (min if direction == "min" else max)(done, key=lambda one: cast(float, one.score)) if done else None
    importances: dict[str, float] = {}
    if len(done) > 2:
        with contextlib.suppress(ValueError, RuntimeError, ImportError):  # all trials have one value, or one score
            importances = {key: float(share) for key, share in optuna.importance.get_param_importances(study).items()}
    result = SweepResult(
        str(config.run.name), metric, direction, trials, None if best is None else best.number, importances
    )
    write_json(plan.folder / RESULT, asdict(result))
    if best is not None:
        write_text(plan.folder / BEST, dump_config(_best_config(plan, best)))
    write_pictures(plan.folder, plan.space, result)
    return result


def _best_config(plan: Plan, best: TrialResult) -> FinetuneConfig:
    """The settings of a trial for a run of its own, with what its run has found by itself if it was made here."""
    config, run = plan.space.config, RunDirectory(plan.folder / f"trial-{best.number:03d}")
    own = load_config(FinetuneConfig, run.config) if run.exists() else plan.space.configured(best.values)
    named = replace(config.run, name=f"{config.run.name}-best", resume="auto")
    return replace(own, run=named, evaluation=config.evaluation)


def _result(plan: Plan, trial: Any) -> TrialResult:
    known = trial.user_attrs
    status = {"COMPLETE": "complete", "PRUNED": "pruned", "RUNNING": "running"}.get(trial.state.name, "waiting")
    reason = known.get("failed") or known.get("reason") or ""
    return TrialResult(
        trial.number, "failed" if "failed" in known else status, _values(plan, trial.params),
        trial.value if trial.state.name == "COMPLETE" else None, known.get("steps"), known.get("seconds"), reason,
        known.get("scores") or {},
    )  # fmt: skip


def _without_password(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    return f"{scheme}{mark}…@{rest.rpartition('@')[2]}" if "@" in rest else url
