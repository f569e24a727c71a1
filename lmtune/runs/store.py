"""The run directory: where a run's files are, and who may write there.

    runs/NAME/  config.yaml  environment.json  data.json  metrics.jsonl  results.csv  summary.json
                answers.jsonl  verification.json  checkpoints/  adapter/  merged/

Nothing here imports torch, so that listing runs answers at once.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from lmtune.config.schema import RunConfig
from lmtune.data.report import DataReport
from lmtune.errors import CheckpointError, ConfigError, ModelError
from lmtune.io.atomic import remove_leftovers, try_lock
from lmtune.io.text import is_finite_number

STATUSES = ("running", "interrupted", "failed", "complete")  # what `summary.json` may say
_MAX_NAME_BYTES = 255  # of a file or folder, on every common file system


class RunDirectory:
    """The paths of one run. Creating the object touches nothing on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.data = self.path / "data.json"
        self.metrics = self.path / "metrics.jsonl"
        self.results = self.path / "results.csv"
        self.summary = self.path / "summary.json"
        self.answers = self.path / "answers.jsonl"
        self.verification = self.path / "verification.json"
        self.local = self.path / "local.json"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.merged = self.path / "merged"

    @classmethod
    def of(cls, run: RunConfig) -> RunDirectory:
        """The directory `run.dir/run.name`.

        Raises:
            ConfigError: the run has no name; or its folder is a link, holds one, lies outside `run.dir`, or holds a
                folder where a run writes a file.
        """
        if run.name is None:
            raise ConfigError("run.name: missing; name the run, for example run.name=support")
        parent = home_expanded(run.dir, "run.dir")
        path = parent / run.name
        require_possible(path, "run.dir")
        if path.is_symlink() or not path.resolve().is_relative_to(parent.resolve()):
            raise ConfigError(f"run.name: {path} leads out of {parent}; a run is a plain folder in run.dir")
        if path.exists() and not path.is_dir():
            raise ConfigError(f"run.name: {path} is a file; choose another run.name")
        if path.is_dir() and (links := sorted(inner for inner in path.iterdir() if inner.is_symlink())):
            raise ConfigError(f"run.name: {links[0]} is a link, which a run writes to no other place; remove it")
        made = cls(path)
        files = (made.config, made.environment, made.data, made.metrics, made.results, made.summary, made.answers)
        for file in (*files, made.verification, made.local, path / ".lock"):
            if file.exists() and not file.is_file():
                what = "a folder" if file.is_dir() else "no plain file"
                raise ConfigError(f"run.name: {file} is {what}, where a run writes a file; remove it")
        for folder in (made.checkpoints, made.adapter):
            if folder.is_file():
                raise ConfigError(f"run.name: {folder} is a file, where a run writes a folder; remove it")
        return made

    @property
    def name(self) -> str:
        """The run's folder name."""
        return self.path.name

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return os.path.isfile(self.config)  # unlike pathlib's, also false for names that are too long

    def rendered_at(self) -> str | None:
        """The time that the template wrote in the run's rows; None for one that writes none, or that is not known."""
        try:
            told = self.read_json(self.data).get("rendered_at")
            return None if told is None else datetime.fromisoformat(told).isoformat(" ")
        except (CheckpointError, ValueError, TypeError):  # a damaged file is told where the run is resumed
            return None

    def read_json(self, path: Path) -> dict[str, Any]:
        """One of the run's JSON files, or `{}` if it is not there yet.

        Raises:
            CheckpointError: the file is damaged.
        """
        if not path.exists():
            return {}
        if not path.is_file():
            raise CheckpointError(f"{path}: damaged: is no plain file; delete it or restore it")
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            json.dumps(tree, ensure_ascii=False).encode("utf-8")  # not half a character, which cannot be printed
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not valid JSON ({error}); delete it or restore it") from None
        if not isinstance(tree, dict):
            raise CheckpointError(
                f"{path}: damaged: holds {type(tree).__name__}, not an object; delete it or restore it"
            )
        return tree

    def read_data_report(self) -> DataReport | None:
        """What became of the rows, from `data.json`; None if it is not there yet.

        Raises:
            CheckpointError: the file is damaged.
        """
        tree = self.read_json(self.data)
        try:
            return DataReport.from_dict(tree) if tree else None
        except ValueError:
            raise CheckpointError(f"{self.data}: damaged: no counts of rows; delete it or restore it") from None

    def read_summary(self) -> dict[str, Any]:
        """`summary.json`, or `{}` if it is not there yet.

        Its status is a known one, its scores are numbers or null, and all its numbers can be computed with.

        Raises:
            CheckpointError: the file is damaged.
        """
        summary = self.read_json(self.summary)
        if fault := _summary_fault(summary):
            raise CheckpointError(f"{self.summary}: damaged: {fault}; delete it or restore it")
        return summary

    def read_verification(self, vocabulary: int) -> list[list[int]]:
        """The tokens of the rows on which a merge is verified, for a model that knows `vocabulary` tokens.

        Raises:
            ModelError: `verification.json` is missing, or holds anything else.
        """
        file = self.verification
        if not file.exists():
            raise ModelError(f"{self.path}: no verification.json, the rows to compare on; run it again to make it")
        rows: Any = self.read_json(file).get("sequences")
        if not (isinstance(rows, list) and rows and all(isinstance(row, list) and row for row in rows)):
            raise ModelError(f"{file}: damaged: sequences is no list of rows of tokens; restore it from a copy")
        for number, row in enumerate(rows, start=1):
            if not all(type(token) is int and 0 <= token < vocabulary for token in row):
                raise ModelError(
                    f"{file}: damaged: row {number} of sequences holds what is no token, a whole number from 0 to "
                    f"{vocabulary - 1:,}; restore it from a copy"
                )
        return rows

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; a second process is refused, and a crash lets go by itself.

        Raises:
            CheckpointError: another process is writing to this run.
            ConfigError: the folder cannot be written.
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

    def is_held(self) -> bool:
        """Whether a process is writing to this run now; without locks, whether the last one that did still lives."""
        lock = self.path / ".lock"
        if not lock.is_file():  # a pipe would wait for who writes into it
            return False
        with contextlib.suppress(OSError), open(lock, encoding="utf-8") as file:
            held = try_lock(file, shared=True)  # let go again when the file is closed
            return not held if held is not None else _lives(file.read(20).strip())
        return False

    def clean(self) -> None:
        """Remove what a crash in the middle of writing has left; for who holds the lock."""
        for folder in (self.path, self.checkpoints):
            remove_leftovers(folder)

    def set_aside(self) -> Path:
        """Rename this run to the first free `NAME-old-N`, so that a new one can begin; returns the new path."""
        number = 1
        while (target := self.path.with_name(f"{self.name}-old-{number}")).exists():
            number += 1
        self.path.rename(target)
        return target


def home_expanded(path: str | Path, setting: str) -> Path:
    """`path` with a `~` at its beginning as the home folder that a shell would make of it.

    Raises:
        ConfigError: there is no such person; names `setting`.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{setting}: {path}: {str(error).rstrip('.')}; write the folder out") from None


def require_possible(path: Path, setting: str) -> None:
    """Raise ConfigError, naming `setting`, if no folder can be at `path`: too long a name, or a file in the way."""
    try:
        too_long = any(len(os.fsencode(part)) > _MAX_NAME_BYTES for part in path.parts)
        if not too_long:
            os.lstat(path)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}: {path}: {getattr(error, 'strerror', None) or error}; choose another") from None
    if too_long:
        raise ConfigError(f"{setting}: {path}: a name of over {_MAX_NAME_BYTES} bytes; choose a shorter one")


def _lives(process: str) -> bool:
    """Whether the process of this number runs on this machine."""
    try:
        os.kill(int(process), 0)
    except PermissionError:  # another user's
        return True
    except (ValueError, OverflowError, OSError):
        return False
    return True


def _summary_fault(summary: dict[str, Any]) -> str | None:
    """What in a summary no run writes, or None."""
    if (status := summary.get("status", "running")) not in STATUSES:
        found = repr(status[:60]) if isinstance(status, str) else type(status).__name__
        return f"status is {found}; should be {' or '.join(STATUSES)}"
    for key, value in summary.items():
        if not all(map(is_finite_number, _numbers_in(value))):
            return f"{key[:60]} is, or holds, a number that is not finite or too large"
    for key in ("base", "tuned"):
        scores = summary.get(key)
        if scores is not None and not (isinstance(scores, dict) and all(map(_is_score, scores.values()))):
            return f"{key} holds no scores"
    return None if isinstance(summary.get("steps", 0), int) else "steps is no number"


def _numbers_in(tree: object) -> Iterator[int | float]:
    """Every number in a JSON tree, however deep."""
    waiting = [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (dict, list)):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield value


def _is_score(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def find_run(target: str | Path, runs_dir: str | Path = "runs") -> RunDirectory | None:
    """The run that `target` names, as a path or as a name in `runs_dir`; None if it is no run."""
    composed = unicodedata.normalize("NFC", str(target))  # as run names are
    for path in (Path(target), Path(runs_dir) / str(target), Path(runs_dir) / composed):
        run = RunDirectory(path)
        if run.exists():
            return run
    return None


def run_folders(runs_dir: str | Path = "runs") -> list[Path]:
    """The folders in `runs_dir` in which a run was begun, by name."""
    folder = Path(runs_dir)
    return [path for path in sorted(folder.iterdir()) if RunDirectory(path).exists()] if os.path.isdir(folder) else []


def similar_runs(target: str, runs_dir: str | Path = "runs") -> list[str]:
    """The names of runs that `target` may be a misspelling of, the nearest first.

    `user/name` is none, where there is no folder `user`: that is how models of the Hub are called.
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
    """What to say of a run that is not there: which ones are."""
    names = [path.name for path in run_folders(runs_dir)]
    if (
        near := similar_runs(target, runs_dir)
        or near_runs(target, runs_dir)
        or difflib.get_close_matches(Path(target).name, names, n=3, cutoff=0.5)
    ):
        return f"did you mean {' or '.join(near)}?"
    if names:
        return f"there {'is' if len(names) == 1 else 'are'} {', '.join(names[:10])}{' …' if len(names) > 10 else ''}"
    return f"{runs_dir}/ holds no run yet; `lmtune quickstart` makes one, or give another folder with --dir"


ADAPTER, OPTIMIZER, STATE, MANIFEST = (
    "adapter_model.safetensors", "optimizer.safetensors", "state.json", "manifest.json",
)  # fmt: skip


def checkpoint_folders(folder: Path) -> list[Path]:
    """The folders named like checkpoints, oldest step first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit()), key=step_of)


def step_of(path: Path) -> int:
    """The step of a folder named like a checkpoint."""
    return int(path.name[5:])


def problem_of(path: Path) -> str | None:
    """Why a checkpoint folder cannot be used, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} is damaged ({error})"
    if not isinstance(manifest, dict):
        return f"{MANIFEST} is damaged (no mapping)"
    for name in (ADAPTER, OPTIMIZER, STATE):
        if not (path / name).is_file():
            return f"{name} is missing"
        if manifest.get(name) != fingerprint(path / name):
            return f"{name} is not what was written (size or checksum differs)"
    return None


def fingerprint(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: its size and SHA-256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
