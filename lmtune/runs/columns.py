"""Which columns of rows to be scored become which keys: those that a command names, else those of the run's training.

columns = columns_for(run_of("runs/support"), ["heldout.csv"])      # {"Frage": "prompt", "Antwort": "completion"}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig
from lmtune.data.readers import read_rows
from lmtune.data.sources import Given, find_files
from lmtune.data.tables import TableRow
from lmtune.runs.ensembles import find_ensemble, runs_of_ensemble
from lmtune.runs.store import RunDirectory, find_run


def run_of(target: str) -> RunDirectory | None:
    """The run that a model comes from: `target` itself, or the folder above its adapter or merged model.

    Of an ensemble it is that of its first member.
    """
    if (ensemble := find_ensemble(target)) is not None:
        return next(iter(runs_of_ensemble(ensemble)), None)
    found = find_run(target)
    return found if found is not None or not Path(target).is_dir() else find_run(Path(target).resolve().parent)


def columns_for(
    run: RunDirectory | None, paths: Sequence[Given], named: Mapping[str, str] | None = None
) -> dict[str, str] | None:
    """The setting `data.columns` for the rows of `paths`; None where nothing is renamed.

    Args:
        run: where `data.columns` of training is looked up; files that do not have these columns are read without it.
        paths: of the rows.
        named: what the command says, which comes first.

    Raises:
        ConfigError: the settings of the run are damaged.
        DataError: a path cannot be read.
    """
    if named:
        return dict(named)
    trained = None if run is None else load_config(FinetuneConfig, run.config).data.columns
    if not trained:
        return None
    here: set[str] = set()
    for file in find_files(paths):
        _, _, first = next(iter(read_rows(file)), (0, None, None))
        here.update(first.columns if isinstance(first, TableRow) else first if isinstance(first, dict) else ())
    return {column: key for column, key in trained.items() if column in here} or None
