"""Tasks of lm-eval (EleutherAI's harness) on a loaded model: published benchmarks, or a task file of your own.

    for score in task_scores(loaded, "hellaswag,my_tasks/capitals.yaml"): score.task, score.metric, score.tuned

The harness gets the model in memory, adapter and all, and scores it as it scores any other: without a chat template, in
its own prompts. The base is scored beside a tuned model. https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmtune.errors import ConfigError, LmtuneError, is_failure
from lmtune.inference.engine import unpacked_attention
from lmtune.inference.load import LoadedModel
from lmtune.io.console import progress
from lmtune.io.text import is_finite_number, one_line
from lmtune.models.members import AS_IS

_BATCH_SIZE = 8


@dataclass(frozen=True)
class TaskScore:
    """One metric of a task.

    Attributes:
        tuned, base: its value; the base's is None for a model without an adapter.
        tuned_error, base_error: standard errors, None where the harness gives none.
    """

    task: str
    metric: str
    tuned: float
    tuned_error: float | None
    base: float | None = None
    base_error: float | None = None

    def as_dict(self) -> dict[str, object]:
        """For `--json`."""
        return asdict(self)


def require_lm_eval() -> None:
    """ConfigError where the harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--lm-eval: the package lm-eval is missing; install it: pip install 'lmtune[eval]'")


def task_scores(loaded: LoadedModel, tasks: str) -> list[TaskScore]:
    """What the harness measures on tasks, given by names, patterns of names, YAML files or folders of them.

    Raises:
        ConfigError: the harness is not installed, the model is a classifier, or there is no such task.
        LmtuneError: the harness fails, for example since a data set of a task cannot be loaded.
    """
    require_lm_eval()
    if loaded.head is not None:
        raise ConfigError("--lm-eval: a classifier gives no answers; expected a language model")
    if loaded.members != AS_IS:
        raise ConfigError("--lm-eval: an ensemble is no model that lm-eval can run; give one of its members")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with progress("reading the tasks of lm-eval"):
        manager, names = _find(tasks)
    try:
        tuned = _run(loaded, names, manager, "the model")
        base = None
        if loaded.has_adapter:
            with loaded.use_base():
                base = _run(loaded, names, manager, "the base")
    except LmtuneError:
        raise
    except Exception as error:  # what tasks and their data sets raise is of any kind
        if not is_failure(error):
            raise
        raise LmtuneError(f"--lm-eval: {tasks}: {one_line(error)}") from error
    return [
        TaskScore(*key, *found, *((base or {}).get(key, (None, None)))) for key, found in tuned.items()
    ]  # fmt: skip


def _find(tasks: str) -> tuple[Any, list[str]]:
    """The harness' index of tasks, and those that are asked for."""
    task_manager = importlib.import_module("lm_eval.tasks").TaskManager
    asked = [name.strip() for name in tasks.split(",") if name.strip()]
    folders = [name for name in asked if Path(name).is_dir()]
    files = [name for name in asked if Path(name).is_file()]
    named = [name for name in asked if name not in (*folders, *files)]
    manager = task_manager(include_path=folders or None, include_defaults=bool(named))
    inside = task_manager(include_path=folders, include_defaults=False).all_tasks if folders else []
    found = [*files, *inside]
    for name in named:
        matching = manager.match_tasks([name])
        if not matching:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"--lm-eval: {name}: no such task or file{hint}")
        found += matching
    if not found:
        raise ConfigError("--lm-eval: no task named; give names of tasks, YAML files or folders, with commas between")
    return manager, list(dict.fromkeys(found))


def _run(
    loaded: LoadedModel, names: list[str], manager: Any, who: str
) -> dict[tuple[str, str], tuple[float, float | None]]:
    """By task and metric the value and its standard error."""
    harness, models = importlib.import_module("lm_eval"), importlib.import_module("lm_eval.models.huggingface")
    with progress(f"scoring {who} with lm-eval"), unpacked_attention(loaded.model):
        model = models.HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=_BATCH_SIZE)
        results = harness.simple_evaluate(
            model=model, tasks=names, task_manager=manager, log_samples=False, bootstrap_iters=1000
        )  # fmt: skip
    found: dict[tuple[str, str], tuple[float, float | None]] = {}
    for task, values in (results or {})["results"].items():
        for key, value in values.items():
            metric, _, filtered = str(key).partition(",")
            if metric.endswith("_stderr") or not is_finite_number(value) or not filtered:
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            found[str(task), name] = (float(value), float(error) if is_finite_number(error) else None)
    return found
