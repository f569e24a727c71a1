"""From a job to the settings of its run: `ftjob-….yaml`, which `lmtune finetune` takes as it is.

    settings = settings_of(job, files, num_rows, runs, defaults)
    settings.config.train.learning_rate
    path.write_text(settings.yaml)

What the request leaves open is what the server's own defaults say, else what `lmtune init` proposes for so many rows
and this base, else the default of lmtune.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lmtune.config.load import build_config, with_overrides
from lmtune.config.schema import FinetuneConfig, RowKind
from lmtune.config.yaml import write_yaml
from lmtune.errors import ConfigError
from lmtune.models.locate import is_local
from lmtune.proposal import KnownModel, known_model, propose, this_machine
from lmtune.serve.fine_tuning.requests import WandbIntegration
from lmtune.serve.fine_tuning.store import Job

ROWS: dict[str, RowKind] = {"supervised": "answer", "dpo": "pair"}
_OBJECTIVES = {"supervised": "sft", "dpo": "dpo"}
_PROPOSED = ("train.batch_size", "train.epochs", "train.learning_rate")
_CHECKPOINT_MINUTES = 2  # what a power cut may cost; a checkpoint of an adapter takes a second
_EVALUATIONS = 10  # of the validation file in a run
_OF_ADAPTER = ("dropout", "lora_plus_ratio")  # settings that do not come with the adapter that a job begins from

_NOT_DEFAULTS = (
    ("model", "name", "the server"), ("data", "train", "each job"), ("data", "validation", "each job"),
    ("run", "name", "each job"), ("run", "dir", "the server"), ("tuning", "adapter", "each job"),
)  # fmt: skip

Tree = dict[str, dict[str, object]]


@dataclass(frozen=True)
class JobFiles:
    """Where the rows of a job are."""

    train: Path
    validation: Path | None


@dataclass(frozen=True)
class Settings:
    """The settings of a job's run.

    Attributes:
        config: checked.
        yaml: the file of the run.
        hyperparameters: as the API shows them.
    """

    config: FinetuneConfig
    yaml: str
    hyperparameters: Mapping[str, object]


def as_method(fault: str) -> str:
    """A fault of rows, with what a client of the API can set in the place of a setting."""
    methods = {objective: method for method, objective in _OBJECTIVES.items()}
    return re.sub(
        r"set objective\.kind: (\w+), or ",
        lambda found: f"set method.type: {methods[found[1]]}, or " if found[1] in methods else "", fault,
    )  # fmt: skip


def read_defaults(path: Path | None) -> Tree:
    """The sections that every job starts from.

    Raises:
        ConfigError: the file cannot be read, or a setting in it is wrong or belongs to the jobs.
    """
    if path is not None and not path.is_file():
        raise ConfigError(f"--job-defaults: {path}: no such file; expected a YAML file of config sections")
    tree: Tree = with_overrides(path, {})
    for section, key, who in _NOT_DEFAULTS:
        values = tree.get(section)
        if isinstance(values, dict) and values.get(key) is not None:
            raise ConfigError(f"{path}: {section}.{key}: {who} says it; remove it")
    asked = {**tree, "model": {"name": "tiny", **tree.get("model", {})}, "data": {"train": "-", **tree.get("data", {})}}
    build_config(FinetuneConfig, asked, where=str(path))
    return tree


def settings_of(job: Job, files: JobFiles, num_rows: int, runs: Path, defaults: Tree) -> Settings:
    """The settings of a job's run.

    Args:
        job: what is asked.
        files: its rows.
        num_rows: how many there are to train on.
        runs: the folder of the runs.
        defaults: of `read_defaults`.

    Raises:
        ConfigError: the settings contradict each other.
        ModelError: the base cannot be used.
    """
    model = {**asdict(job.base.model), **defaults.get("model", {})}
    name = str(model["name"])
    model["name"] = str(Path(name).resolve()) if is_local(name) else name
    kind, asked = job.request.kind, job.request.asked
    train, multiplier = _training(job, str(model["name"]), files, num_rows, defaults)
    evaluation = dict(defaults.get("evaluation", {}))
    steps = math.ceil(num_rows / _number(train["batch_size"])) * _number(train["epochs"])
    if files.validation is not None:
        evaluation.setdefault("every_steps", max(1, round(steps / _EVALUATIONS)))
    objective = defaults.get("objective", {})
    objective = dict(objective) if objective.get("kind", "sft") == _OBJECTIVES[kind] else {}
    beta = {} if asked.beta is None else {"beta": asked.beta}
    trackers = [one.type for one in job.request.integrations or ()]
    run = defaults.get("run", {})
    tree: Tree = {
        **defaults,
        "model": model,
        "data": {"validation_fraction": 0.0, **defaults.get("data", {}), "train": str(files.train.resolve()),
                 "validation": None if files.validation is None else str(files.validation.resolve())},
        "tuning": _tuning(job, runs, defaults),
        "objective": {**objective, **beta, "kind": _OBJECTIVES[kind]},
        "train": train,
        "evaluation": evaluation,
        "run": {"checkpoint_every_minutes": _CHECKPOINT_MINUTES, **run, "name": job.id, "dir": str(runs.resolve()),
                "trackers": list(dict.fromkeys([*trackers, *_names(run.get("trackers"))]))},
    }  # fmt: skip
    config = build_config(FinetuneConfig, tree, where=job.id)
    shown = {"n_epochs": _whole(config.train.epochs), "batch_size": config.train.batch_size}
    shown |= {"learning_rate_multiplier": _whole(multiplier)}
    shown |= {"beta": getattr(config.objective, "beta", 0.1)} if kind == "dpo" else {}
    return Settings(config, write_yaml(tree), shown)


def environment_of(job: Job) -> dict[str, str]:
    """What its trackers are told by variables of the environment."""
    variables: dict[str, str] = {}
    for one in job.request.integrations or ():
        if isinstance(one, WandbIntegration):
            given = {"WANDB_PROJECT": one.wandb.project, "WANDB_NAME": one.wandb.name, "WANDB_ENTITY": one.wandb.entity}
            variables |= {key: value for key, value in given.items() if value is not None}
            variables |= {"WANDB_TAGS": ",".join(one.wandb.tags)} if one.wandb.tags else {}
    return variables


def _training(job: Job, model: str, files: JobFiles, num_rows: int, defaults: Tree) -> tuple[dict[str, object], float]:
    """The section `train`, and by what its learning rate is multiplied."""
    asked, own = job.request.asked, dict(defaults.get("train", {}))
    known = KnownModel(known_model(model).parameters)  # not its tokenizer, so that rows are not measured
    proposed, _ = propose(
        model, [str(files.train)], job.base.model.quantization, num_rows, this_machine(), known, ROWS[job.request.kind]
    )
    settings = {key.partition(".")[2]: proposed[key] for key in _PROPOSED if key in proposed}
    settings = {"learning_rate": 2.0e-4, **settings, **own, "seed": job.request.seed}
    if asked.n_epochs is not None:
        settings["epochs"], settings["max_steps"] = asked.n_epochs, None
    if asked.batch_size is not None:
        settings["batch_size"] = asked.batch_size
    multiplier = asked.learning_rate_multiplier or 1.0
    if multiplier != 1:
        if settings["learning_rate"] == "find":
            raise ConfigError(
                f"learning_rate_multiplier: {multiplier:g}; this server finds the learning rate itself "
                "(train.learning_rate: find); leave the multiplier out"
            )
        settings["learning_rate"] = _number(settings["learning_rate"]) * multiplier
    return settings, multiplier


def _tuning(job: Job, runs: Path, defaults: Tree) -> dict[str, object]:
    """The section `tuning`: that of the defaults, or what continues the adapter of an earlier job."""
    own = dict(defaults.get("tuning", {}))
    if job.base.start is None:
        return own
    kept = {key: own[key] for key in _OF_ADAPTER if key in own}
    return {**kept, "kind": "lora", "adapter": str((runs / job.base.start).resolve())}


def _number(value: object) -> float:
    assert isinstance(value, (int, float)), value
    return value


def _whole(value: float) -> float:
    """3 for 3.0, as clients expect of what is a whole number."""
    return int(value) if value == int(value) else value


def _names(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else []
