"""Train several models from one config that answer together, or join runs that are there.

lmtune ensemble reviews.yaml --members 5 --method boosting
lmtune ensemble --from runs/reviews-folds
"""

from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from lmtune.config import options
from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig
from lmtune.data.checking import check_config
from lmtune.errors import ConfigError
from lmtune.io.console import command, err, escape, out, print_json, progress, warn
from lmtune.run import run
from lmtune.runs.ensembles import joined, shared_config

Way = Literal["bagging", "boosting"]
Combination = Literal["linear", "ties", "dare"]


def main(
    config_file: options.ConfigFile = None,
    overrides: options.Overrides = None,
    members: Annotated[int, typer.Option(min=2, help="Models to train; boosting may end before.")] = 5,
    method: Annotated[
        str, typer.Option(help="bagging: bootstrap samples of the rows; boosting: SAMME weights of rows with classes.")
    ] = "bagging",
    source: Annotated[
        list[Path] | None, typer.Option("--from", help="Runs that are there, or the folder of folds; trains nothing.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="With --from: the folder to write; else that of the folds.")
    ] = None,
    vote: Annotated[
        bool | None, typer.Option("--vote/--mean", help="Count votes, or take the mean of probabilities.")
    ] = None,
    combine: Annotated[
        str | None, typer.Option(help="Make one adapter of the members, too: linear, ties or dare.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document: members, ensemble, gain.")] = False,
) -> None:
    """Members on one base that answer together, scored on the validation rows beside the best of them.

    The ensemble is runs/NAME, which evaluate, predict, compare and chat take. The same command resumes. Bagging takes
    the mean of the members' probabilities, boosting their votes, each by its weight.

    Example: lmtune ensemble reviews.yaml --members 5 --method boosting

    Example: lmtune ensemble --from runs/reviews-folds --combine ties
    """
    for option, value, known in (("--method", method, Way), ("--combine", combine, Combination)):
        if value is not None and value not in get_args(known):
            raise ConfigError(f"{option}: {value}; expected {' or '.join(get_args(known))}")
    if (config_file is None) == (not source):
        raise ConfigError("expected a CONFIG to train members of, or --from RUNS that are there")
    chosen = None if vote is None else "vote" if vote else "mean"
    config = None if config_file is None else load_config(FinetuneConfig, config_file, overrides or [])
    if source:
        folder = joined(source, output, chosen)
        config = shared_config(folder)
    elif config is not None:
        check_config(config)
    with progress("loading PyTorch and the libraries"):
        from lmtune.search.ensemble import score_ensemble, train_ensemble
        from lmtune.search.ensemble_report import as_dict, describe

    if not source:
        folder = train_ensemble(config, members, method, chosen)
    scores = None if config is None else score_ensemble(folder, config, combine)
    if scores is None:
        hint = command("evaluate", folder, "FILE")
        warn(f"no row is known that no member was trained on, so nothing is scored; score others: {hint}")
    if as_json:
        print_json({"folder": str(folder), **({} if scores is None else as_dict(scores))})
        return
    for line in () if scores is None else describe(scores):
        out.print(line)
    err.print(f"the ensemble is in {escape(str(folder))}; use it: {escape(command('predict', folder, 'FILE'))}")


if __name__ == "__main__":
    run(main)
