"""The run directory: where a run's files are, who may write there, and how the run went.

    runs/NAME/  config.yaml  environment.json  data.json  events.jsonl  metrics.jsonl  results.csv  summary.json
                predictions.jsonl  confusion.svg  verification.json  checkpoints/  adapter/  merged/

Nothing here imports torch, so that listing runs answers at once.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, cast, get_args

from lmtune.config.schema import FullConfig, LoraConfig, PartialConfig, RunConfig
from lmtune.data.report import DataReport
from lmtune.data.selection import Selection
from lmtune.errors import CheckpointError, ConfigError, ModelError
from lmtune.io.atomic import parse_object, remove_leftovers, try_lock
from lmtune.io.text import is_finite_number, shorten

Status = Literal["running", "interrupted", "failed", "complete"]
ScoreValues = Mapping[str, float | None]  # by the names of `lmtune.evaluation.scoring.Scores`; None is not measured


@dataclass(frozen=True)
class Summary:
    """What `summary.json` says of a run."""

    status: Status = "running"  # how it ended; also "running" if it was killed
    base: ScoreValues | None = None  # scores before training; None where they were not measured
    tuned: ScoreValues | None = None
    standard_errors: Mapping[str, ScoreValues] = field(default_factory=dict)  # of the scores, for `base` and `tuned`
    steps: int | None = None  # None before the end
    reason: str = ""  # why it was interrupted or has failed
    started_from: str | None = None  # the adapter that it began from
    figures: Mapping[str, float] = field(default_factory=dict)  # every number, by its key
    tree: Mapping[str, object] = field(default_factory=dict)  # the JSON object

    @classmethod
    def parse(cls, tree: Mapping[str, object]) -> Summary:
        """The summary in a JSON object; ValueError says why no run writes such a one."""
        status = tree.get("status", "running")
        if status not in get_args(Status):
            raise ValueError(f"status: got {shorten(status)}; expected {' or '.join(get_args(Status))}")
        scores: dict[str, Any] = {key: tree.get(key) for key in ("base", "tuned", "standard_errors")}
        for key, value in scores.items():
            is_scores = isinstance(value, Mapping) and (
                key == "standard_errors" or all(one is None or is_finite_number(one) for one in value.values())
            )
            if value is not None and not is_scores:
                raise ValueError(f"{key}: got {shorten(value)}; expected scores")
        values: dict[str, Any] = {key: tree.get(key) for key in ("steps", "reason", "started_from")}
        for key, kind in (("steps", int), ("reason", str), ("started_from", str)):
            if not isinstance(values[key], kind | None):
                raise ValueError(f"{key}: got {shorten(values[key])}; expected {kind.__name__}")
        figures = {key: value for key, value in tree.items() if is_finite_number(value) and key != "format"}
        return cls(
            cast(Status, status), scores["base"], scores["tuned"], scores["standard_errors"] or {}, values["steps"],
            values["reason"] or "", values["started_from"], cast("dict[str, float]", figures), tree,
        )  # fmt: skip


class RunDirectory:
    """The paths of one run. Creating the object touches nothing on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.data = self.path / "data.json"
        self.events = self.path / "events.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.output = self.path / "output.log"
        self.results = self.path / "results.csv"
        self.summary = self.path / "summary.json"
        self.predictions = self.path / "predictions.jsonl"
        self.confusion = self.path / "confusion.svg"
        self.preview = self.path / "preview.json"
        self.report = self.path / "report.html"
        self.loss_picture = self.path / "loss.png"
        self.verification = self.path / "verification.json"
        self.local = self.path / "local.json"
        self.selection = self.path / "selection.json"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.merged = self.path / "merged"

    @classmethod
    def of(cls, run: RunConfig) -> RunDirectory:
        """The directory `run.dir/run.name`; ConfigError if the run has no name, or no folder can be there."""
        if run.name is None:
            raise ConfigError("run.name: missing; name the run, for example run.name=support")
        path = Path(os.path.expanduser(run.dir)) / run.name
        require_possible(path, "run.dir")
        if path.exists() and not path.is_dir():
            raise ConfigError(f"run.name: {path} is a file; choose another run.name")
        return cls(path)

    def result(self, tuning: LoraConfig | FullConfig | PartialConfig) -> Path:
        """The folder of what was trained: an adapter, or a whole model where the model's own weights were."""
        return self.adapter if isinstance(tuning, LoraConfig) else self.merged

    def has_result(self, tuning: LoraConfig | FullConfig | PartialConfig) -> bool:
        """Whether the end of the run, or an earlier end of it, has written that folder."""
        weights = "adapter_model.safetensors" if isinstance(tuning, LoraConfig) else "config.json"
        return (self.result(tuning) / weights).is_file()

    @property
    def name(self) -> str:
        """The run's folder name."""
        return self.path.name

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return os.path.isfile(self.config)  # unlike pathlib's, also false for names that are too long

    def rendered_at(self) -> str | None:
        """The time that the template wrote in the run's rows; None for one that writes none, or that is not known."""
        told = self.read_json(self.data).get("rendered_at")
        try:
            return None if told is None else datetime.fromisoformat(str(told)).isoformat(" ")
        except ValueError:
            raise CheckpointError(f"{self.data}: damaged: rendered_at; delete it or restore it") from None

    def trained_dtype(self) -> str | None:
        """The dtype of the base and the forward pass in training; None where it is not known."""
        try:
            made = self.read_json(self.environment)
        except CheckpointError:  # its other readers name it
            return None
        before = "float32" if made.get("device") == "CPU" else None  # of a version that did not write it down
        return str(made["dtype"]) if "dtype" in made else before

    def read_json(self, path: Path) -> dict[str, object]:
        """One of the run's JSON files, or `{}` if it is not there yet; CheckpointError if it is damaged."""
        try:
            return dict(parse_object(path.read_bytes()))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged: {error}; delete it or restore it") from None

    def read_data_report(self) -> DataReport | None:
        """What became of the rows, from `data.json`; None if it is not there yet, CheckpointError if it is damaged."""
        tree = self.read_json(self.data)
        try:
            return DataReport.from_dict(tree) if tree else None
        except ValueError:
            raise CheckpointError(f"{self.data}: damaged: no counts of rows; delete it or restore it") from None

    def read_selection(self) -> Selection | None:
        """Which rows the run uses; None where its settings alone say it, CheckpointError if the file is damaged."""
        tree = self.read_json(self.selection)
        try:
            return Selection.from_dict(tree) if tree else None
        except ValueError as error:
            raise CheckpointError(f"{self.selection}: damaged: {error}; restore it, or delete this run") from None

    def read_summary(self) -> Summary:
        """`summary.json`; that of a run which has just begun if it is not there; CheckpointError if it is damaged."""
        try:
            return Summary.parse(self.read_json(self.summary))
        except ValueError as error:
            raise CheckpointError(f"{self.summary}: damaged: {error}; delete it or restore it") from None

    def read_verification(self) -> list[list[int]]:
        """The token ids of the rows on which a merge is verified; ModelError if `verification.json` is missing."""
        rows = self.read_json(self.verification).get("sequences")
        if rows and not _are_token_ids(rows):
            raise CheckpointError(f"{self.verification}: damaged: no lists of token ids; restore it")
        if not rows:
            raise ModelError(f"{self.path}: no verification.json, the rows to compare on; run it again to make it")
        return cast("list[list[int]]", rows)

    def read_prompt_lengths(self) -> list[int] | None:
        """How many tokens of each of those rows stand before the answer, 0 in a text; None in an older file."""
        tree = self.read_json(self.verification)
        lengths, rows = tree.get("prompt_tokens"), self.read_verification()
        if lengths is None:
            return None
        if not isinstance(lengths, list) or len(lengths) != len(rows) or not _are_token_ids([[0, *lengths]]):
            raise CheckpointError(f"{self.verification}: damaged: prompt_tokens; restore it")
        return cast("list[int]", lengths)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process, until the block ends or the process dies.

        Raises CheckpointError if another process is writing to this run, ConfigError if the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            opened = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(
                f"run.dir: {self.path} cannot be written ({error.strerror}); permit it or choose another run.dir"
            ) from None
        with opened as file:
            if try_lock(file) is False:
                file.seek(0)
                raise CheckpointError(
                    f"{self.path} is in use by another lmtune process (pid {file.read().strip() or 'unknown'}); "
                    "wait for it, or give this run another run.name"
                )
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)  # where there are no locks, the number is all that says who runs

    def is_running(self) -> bool:
        """Whether a process is writing to this run now; without locks, whether the last one that did still lives."""
        with contextlib.suppress(OSError), open(self.path / ".lock", encoding="utf-8") as file:
            locked = try_lock(file, shared=True)  # let go again when the file is closed
            return _is_alive(file.read(20).strip()) if locked is None else not locked
        return False

    def clean(self) -> None:
        """Remove what a crash in the middle of writing has left; for who holds the lock."""
        for folder in (self.path, self.checkpoints):
            remove_leftovers(folder)

    def archive(self) -> Path:
        """Rename this run to the first free `NAME-old-N`, so that a new one can begin; returns the new path."""
        number = 1
        while (target := self.path.with_name(f"{self.name}-old-{number}")).exists():
            number += 1
        self.path.rename(target)
        return target


def _are_token_ids(rows: object) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, list) and row and all(type(token) is int and token >= 0 for token in row) for row in rows
    )


def require_possible(path: Path, setting: str) -> None:
    """Raise ConfigError, naming `setting`, if no folder can be at `path`: too long a name, or a file in the way."""
    for place in (path, Path(path.name)):  # a name too long is also found where the folder above is not there yet
        try:
            os.lstat(place)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"{setting}: {path}: {error.strerror}; choose another") from None


def _is_alive(process: str) -> bool:
    """Whether the process of this number runs on this machine."""
    try:
        os.kill(int(process), 0)
    except PermissionError:  # another user's
        return True
    except (ValueError, OverflowError, OSError):
        return False
    return True


# --- finding runs ----------------------------------------------------------------------------------------------------


def find_run(target: str | Path, runs_dir: str | Path = "runs") -> RunDirectory | None:
    """The run that `target` names, as a path or as a name in `runs_dir`; None if there is none."""
    name = unicodedata.normalize("NFC", str(target))  # as run names are
    runs = (RunDirectory(Path(target)), RunDirectory(Path(runs_dir) / name))
    return next((run for run in runs if run.exists()), None)


def choose_run(target: str, runs_dir: str | Path = "runs") -> RunDirectory:
    """As `find_run`; ModelError names the nearest ones if there is no such run."""
    run = find_run(target, runs_dir)
    if run is None:
        raise ModelError(f"{target}: no such run; {run_hint(target, runs_dir)}")
    return run


def run_folders(runs_dir: str | Path = "runs") -> list[Path]:
    """The folders in `runs_dir` in which a run was begun, by name."""
    folder = Path(runs_dir)
    return [path for path in sorted(folder.iterdir()) if RunDirectory(path).exists()] if os.path.isdir(folder) else []


def similar_runs(target: str, runs_dir: str | Path = "runs") -> list[str]:
    """The names of runs that `target` may be a misspelling of, the nearest first.

    None for `user/name` where there is no folder `user`: that is how models of the Hub are called.
    """
    parent, name = os.path.split(target)
    if parent and not os.path.isdir(parent):
        return []
    found = difflib.get_close_matches(name, [path.name for path in run_folders(parent or runs_dir)], n=3, cutoff=0.5)
    return [os.path.join(parent, near) for near in found]


def near_runs(target: str, runs_dir: str | Path = "runs") -> list[str]:
    """The paths of runs that are very near to the path `target`, which may be a model of the Hub all the same."""
    paths = [os.path.join(runs_dir, path.name) for path in run_folders(runs_dir)]
    return difflib.get_close_matches(target, paths, n=3, cutoff=0.85)


def run_hint(target: str, runs_dir: str | Path = "runs") -> str:
    """What to say where there is no run of that name: which runs there are."""
    names = [path.name for path in run_folders(runs_dir)]
    if near := (
        similar_runs(target, runs_dir) or near_runs(target, runs_dir) or similar_runs(Path(target).name, runs_dir)
    ):
        return f"did you mean {' or '.join(near)}?"
    if names:
        return f"there {'is' if len(names) == 1 else 'are'} {', '.join(names[:10])}{' …' if len(names) > 10 else ''}"
    return f"{runs_dir}/ holds no run yet; `lmtune quickstart` makes one, or give another folder with --dir"


# --- checkpoint folders ----------------------------------------------------------------------------------------------

ADAPTER, OPTIMIZER, STATE, MANIFEST = (
    "adapter_model.safetensors", "optimizer.safetensors", "state.json", "manifest.json",
)  # fmt: skip
WEIGHTS, MOMENTS = "weights", "optimizer"  # folders, instead of the first two, where processes hold these together


def checkpoint_folders(folder: Path) -> list[Path]:
    """The folders named like checkpoints, oldest step first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit()), key=step_of)


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` is."""
    return folder / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The step of a folder named like a checkpoint."""
    return int(path.name[5:])


def problem_of(path: Path) -> str | None:
    """Why a checkpoint folder cannot be used, or None."""
    try:
        manifest = parse_object((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is damaged ({error})"
    for name in sorted({STATE, *manifest}):
        if not (path / name).is_file():
            return f"{name} is missing"
        if manifest.get(name) != fingerprint(path / name):
            return f"{name} is not what was written (size or checksum differs)"
    return None


def fingerprint(path: Path) -> dict[str, int | str]:
    """What a manifest says of a file: its size and SHA-256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
