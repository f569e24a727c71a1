"""Train and score k folds: what a score would be with other rows of the same kind, and how far it spreads.

lmtune crossval support --folds 5
lmtune crossval support data.train=augmented.jsonl run.name=augmented --against runs/support
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from lmtune.config import options
from lmtune.config.load import command_config
from lmtune.config.metrics import deciding_metric
from lmtune.data.checking import check_config
from lmtune.errors import ConfigError
from lmtune.io.console import err, escape, out, print_json, progress
from lmtune.io.text import pluralize
from lmtune.run import run
from lmtune.runs.store import RunDirectory, Summary


def main(
    config_file: options.ConfigFile = None,
    overrides: options.Overrides = None,
    folds: Annotated[int, typer.Option(min=2, max=100, help="How many parts; each is scored once.")] = 5,
    group: Annotated[
        str | None, typer.Option(metavar="FIELD", help="A key of rows; rows of equal values stay in one fold.")
    ] = None,
    other: Annotated[
        str | None, typer.Option("--against", metavar="FOLDER", help="A cross-validation of the same rows to compare.")
    ] = None,
    model: options.BaseModel = None,
    data: options.TrainRows = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document: each score of each fold.")] = False,
) -> None:
    """Score every row once, by a model that was not trained on it; the same command goes on where it stopped.

    Labels are spread evenly. Rows of one prompt, and copies made by `lmtune augment`, stay in one fold. Each fold is an
    ordinary run in runs/NAME/fold-N.

    Example: lmtune crossval support --folds 5
    """
    config = command_config(config_file, overrides or [], model, data or [], "crossval")
    before = None if other is None else _folder_of(other, config.run.dir)
    if before == RunDirectory.of(config.run).path:
        raise ConfigError("--against: this very cross-validation; give this one another run.name")
    check_config(config)  # before any model is loaded
    with progress("loading PyTorch and the libraries"):
        from lmtune.search.crossval import CrossValidation, against, check_crossval, cross_validate
        from lmtune.search.tables import crossval_sentence, crossval_tables

    check_crossval(config, folds, group)
    known = None if before is None else CrossValidation.read(before)
    metric, _ = deciding_metric(config.evaluation.metric, config.objective.kind)

    def said(fold: int, summary: Summary) -> None:
        score = (summary.tuned or {}).get(metric)
        err.print(f"fold {fold} of {folds}: {metric} {score:.4f}" if score is not None else f"fold {fold} of {folds}")

    result = cross_validate(config, folds, group, said)
    apart = {} if known is None else against(result, known)
    if as_json:
        tree: dict[str, Any] = result.to_dict()
        print_json({**tree, **({"against": {name: vars(one) for name, one in apart.items()}} if known else {})})
        return
    for table in crossval_tables(result, apart, known):
        out.print(table)
        out.print("")
    folder = RunDirectory.of(config.run).path
    out.print(f"over {pluralize(result.rows)} in {folds} folds, each scored once; 95 % intervals of the mean")
    if known is not None:
        out.print(escape(crossval_sentence(result, apart, known)))
    err.print(f"the folds are runs in {escape(str(folder))}; the figures in {escape(str(folder / 'crossval.json'))}")


def _folder_of(target: str, runs_dir: str) -> Path:
    """The folder that `--against` names, by its path or its name among the runs."""
    path = Path(target)
    return path if path.is_dir() else Path(runs_dir) / target


if __name__ == "__main__":
    run(main)
