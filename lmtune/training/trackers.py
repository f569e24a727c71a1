"""What a run tells TensorBoard, Trackio, Weights & Biases or MLflow, through Accelerate's trackers (`run.trackers`).

A tracker gets numbers and settings: no row, no answer, no secret, no path. One that fails is told nothing more, with
one warning; the run goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from lmtune.config.load import to_tree
from lmtune.config.schema import FinetuneConfig
from lmtune.errors import ConfigError
from lmtune.io.console import warn, without_secrets
from lmtune.io.text import is_finite_number, one_line
from lmtune.models.locate import shareable_name
from lmtune.runs.store import RunDirectory
from lmtune.training.hooks import Hook
from lmtune.training.loop import Action, StepEvent

_IN_EXTRA = ("tensorboard", "trackio")  # of `lmtune[trackers]`; the others are installed by their name
_PROJECT = "lmtune"
_PRIVATE = ("data.train", "data.validation", "data.system", "data.columns")  # paths, and words of the rows' owner
_NAMES = ("model.name", "tuning.adapter")  # of models, which may be folders


def require_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if the package of a tracker is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        ways = ["pip install 'lmtune[trackers]'"] if set(missing) & set(_IN_EXTRA) else []
        ways += [f"pip install {name}" for name in missing if name not in _IN_EXTRA]
        install = " and ".join(f"`{way}`" for way in ways)
        raise ConfigError(
            f"run.trackers: {', '.join(missing)} not installed; run {install}, or take the name out of run.trackers"
        )


def shared_settings(config: FinetuneConfig) -> dict[str, bool | int | float | str]:
    """The settings that a tracker gets, by `section.key`."""
    shared: dict[str, bool | int | float | str] = {}
    for section, values in to_tree(config).items():
        for key, value in values.items() if section != "run" else ():
            name = f"{section}.{key}"
            if name in _PRIVATE or value is None:
                continue
            if name in _NAMES:
                value = shareable_name(str(value))
                value = os.path.basename(value) if os.path.isabs(value) else value
            if not isinstance(value, (bool, int, float, str)):
                value = json.dumps(value)
            shared[name] = without_secrets(value) if isinstance(value, str) else value
    return shared


class Trackers(Hook):
    """A context manager that starts the trackers, and a hook that tells them of each step; for rank 0.

    Args:
        config: of the run.
        run: its folder, where TensorBoard's files go.
        names: of the trackers; none for other ranks.
        done_steps: of a run that is resumed; TensorBoard forgets what came after them.
    """

    def __init__(self, config: FinetuneConfig, run: RunDirectory, names: Sequence[str], done_steps: int) -> None:
        self.config, self.run, self.names, self.done_steps = config, run, names, done_steps
        self._log: dict[str, Callable[..., None]] = {}
        self._finish: dict[str, Callable[[], None]] = {}

    def __enter__(self) -> Trackers:
        for name in dict.fromkeys(self.names):
            self._attempt(name, self._start, name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, finish in list(self._finish.items()):
            self._attempt(name, finish)

    def after_step(self, event: StepEvent) -> Action:
        result, plan = event.result, event.plan
        values = {
            "loss": result.loss, "learning_rate": event.learning_rate, "grad_norm": result.grad_norm,
            "epoch": plan.epoch, "tokens_per_second": plan.totals.tokens / max(event.seconds, 1e-9), **result.metrics,
        }  # fmt: skip
        told = {f"train/{name}": value for name, value in values.items()}
        if event.validation is not None:
            told |= _named("validation", event.validation.as_dict())
        self._tell(told, event.state.step)
        return "continue"

    def scored(self, who: str, scores: Mapping[str, float | None] | None, step: int) -> None:
        """Tell the scores of the base or of the tuned model."""
        if scores is not None:
            self._tell(_named(who, scores), step)

    def _tell(self, values: Mapping[str, float], step: int) -> None:
        for name, log in list(self._log.items()):
            self._attempt(name, log, values, step)

    def _start(self, name: str) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # without which Accelerate's trackers cannot log what they do
        own = str(self.config.run.name)
        options: dict[str, dict[str, object]] = {
            "tensorboard": {"run_name": "", "logging_dir": str(self.run.path / "tensorboard")},
            "trackio": {
                "run_name": _PROJECT,
                "name": own,
                "resume": "allow",
                "embed": False,
                "auto_log_cpu": False,
                "auto_log_gpu": False,
            },
            "wandb": {
                "run_name": os.environ.get("WANDB_PROJECT", _PROJECT),
                "name": os.environ.get("WANDB_NAME", own),
                "settings": _wandb_settings,
            },
            "mlflow": {"experiment_name": _PROJECT, "run_name": own},
        }
        given = {key: value() if callable(value) else value for key, value in options[name].items()}
        if name == "tensorboard" and self.done_steps:
            given["purge_step"] = self.done_steps + 1
        tracker = LOGGER_TYPE_TO_CLASS[name](**given)
        tracker.start()
        self._log[name], self._finish[name] = tracker.log, tracker.finish
        if name == "trackio":  # its own also forgets the run, which would else be finished again at exit
            self._finish[name] = importlib.import_module("trackio").finish
        tracker.store_init_configuration(shared_settings(self.config))

    def _attempt(self, name: str, act: Callable[..., None], *arguments: object) -> None:
        """Do it; a tracker that fails is left alone from then on."""
        try:
            with contextlib.redirect_stdout(sys.stderr):  # results alone go to stdout
                act(*arguments)
        except Exception as error:
            self._log.pop(name, None)
            self._finish.pop(name, None)
            warn(f"run.trackers: {name} has failed and is told nothing more: {one_line(error)}; the run goes on")


def _named(who: str, scores: Mapping[str, float | None]) -> dict[str, float]:
    return {f"{who}/{name}": value for name, value in scores.items() if value is not None and is_finite_number(value)}


def _wandb_settings() -> object:
    """Without what the library collects by itself: code, Git, the machine and the command line."""
    import wandb

    os.environ.setdefault("WANDB_DISABLE_CODE", "true")
    return wandb.Settings(x_disable_meta=True, x_disable_machine_info=True, disable_git=True, save_code=False)
