"""An ensemble on disk: which runs or adapters answer together, and how much each counts.

    runs/NAME/ensemble.json  member-1/ member-2/ …       the members may be any runs, by their paths from the folder

Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lmtune.config.load import build_config, load_config
from lmtune.config.schema import FinetuneConfig
from lmtune.errors import ConfigError, ModelError
from lmtune.io.atomic import parse_object, write_json
from lmtune.runs.store import RunDirectory, find_run, run_folders, run_hint

FILE = "ensemble.json"
Method = Literal["mean", "vote"]


@dataclass(frozen=True)
class EnsembleFile:
    """What `ensemble.json` holds.

    Attributes:
        members: `[M]`, runs or adapter folders, by their paths from the folder of the file.
        weights: `[M]`, how much each counts.
        method: `mean` of the probabilities, or `vote` for the most probable.
        made_by: `bagging`, `boosting`, or `runs` that were there.
    """

    members: tuple[str, ...]
    weights: tuple[float, ...]
    method: Method = "mean"
    made_by: Literal["bagging", "boosting", "runs"] = "runs"

    @classmethod
    def read(cls, folder: Path) -> EnsembleFile:
        """That of a folder; ModelError if it is damaged."""
        try:
            found = build_config(cls, dict(parse_object((folder / FILE).read_bytes())), FILE)
        except (OSError, ValueError, ConfigError) as error:
            raise ModelError(f"{folder / FILE}: damaged: {error}; make it again with `lmtune ensemble`") from None
        if len(found.members) != len(found.weights) or len(found.members) < 2 or min(found.weights) <= 0:
            raise ModelError(f"{folder / FILE}: expected two members or more, and for each a weight above 0")
        return found

    def write(self, folder: Path) -> None:
        """Into an existing folder."""
        write_json(folder / FILE, asdict(self))

    def places(self, folder: Path) -> list[Path]:
        """Where the members are."""
        return [Path(os.path.normpath(folder / member)) for member in self.members]


def joined(sources: Sequence[Path], output: Path | None = None, method: Method | None = None) -> Path:
    """Write the ensemble of runs that are there; returns its folder.

    Args:
        sources: runs, by path or name, or a folder of runs, as that of folds.
        output: the folder of the ensemble; of one folder of runs it is that, if not given.
        method: by default `mean`.

    Raises:
        ConfigError: there is no run, or only one; or no folder to write to.
    """
    places: list[Path] = []
    for source in sources:
        run = find_run(source)
        found = [run.path] if run is not None else sorted(run_folders(source), key=_in_order)
        if not found:
            raise ConfigError(f"--from: {source}: expected a run, or a folder of runs; {run_hint(str(source))}")
        places += found
    if output is None and (len(sources) > 1 or find_run(sources[0]) is not None):
        raise ConfigError("--from: several runs make a new ensemble; give its folder: -o runs/NAME")
    if len(places) < 2:
        raise ConfigError(f"--from: {sources[0]}: one run; expected two or more to answer together")
    folder = output or Path(sources[0])
    if RunDirectory(folder).exists():
        raise ConfigError(f"-o: {folder} is a run already; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    members = [os.path.relpath(place, folder) for place in places]
    EnsembleFile(tuple(members), (1.0,) * len(members), method or "mean").write(folder)
    return folder


def _in_order(path: Path) -> list[int | str]:
    """`fold-2` before `fold-10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def shared_config(folder: Path) -> FinetuneConfig | None:
    """A config whose validation rows no member was trained on; None if the members' configs do not tell."""
    configs = [load_config(FinetuneConfig, run.config) for run in runs_of_ensemble(folder)]
    held_out = {(str(one.data), one.train.seed if one.data.validation is None else 0) for one in configs}
    return configs[0] if len(held_out) == 1 else None


def find_ensemble(target: str | Path, runs_dir: str | Path = "runs") -> Path | None:
    """The folder of the ensemble that `target` names, as a path or as a name in `runs_dir`; None if there is none."""
    folders = (Path(target), Path(runs_dir) / unicodedata.normalize("NFC", str(target)))
    return next((folder for folder in folders if os.path.isfile(folder / FILE)), None)


def runs_of_ensemble(folder: Path) -> list[RunDirectory]:
    """The members of an ensemble that are runs."""
    return [run for place in EnsembleFile.read(folder).places(folder) if (run := find_run(place)) is not None]
