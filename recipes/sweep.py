"""Search over settings: trials that Optuna proposes, each an ordinary run, and the best one's config.

lmtune sweep support --over train.learning_rate=1e-5..1e-3:log tuning.rank=4,16,64 --trials 20 --minutes 30
"""

from dataclasses import asdict
from typing import Annotated

import typer

from lmtune.config import options
from lmtune.config.load import command_config
from lmtune.data.checking import check_config
from lmtune.errors import ConfigError
from lmtune.io.console import command, err, escape, out, print_json, progress
from lmtune.run import run


def main(
    config_file: options.ConfigFile = None,
    overrides: options.Overrides = None,
    over: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=LOW..HIGH[:log|:STEP]|A,B,C...", help="What to search; several behind each other."),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="How many trials the study is to have in all.")] = 20,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="No trial begins after so many.")] = None,
    prune: Annotated[bool, typer.Option("--prune", help="End trials that fall behind.")] = False,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="An Optuna storage, for machines that search together.")
    ] = None,
    model: options.BaseModel = None,
    data: options.TrainRows = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document: all trials.")] = False,
) -> None:
    """Search settings by the score of held-out rows; the same command goes on where it stopped, or joins the search.

    Trials are runs in runs/NAME/trial-NNN. The best one's settings are in best.yaml, which runs as it is.

    Example: lmtune sweep support --over train.learning_rate=1e-5..1e-3:log tuning.rank=4,16,64 --trials 20
    """
    config = command_config(config_file, overrides or [], model, data or [], "sweep")
    if not over:
        raise ConfigError("--over: missing; for example --over train.learning_rate=1e-5..1e-3:log tuning.rank=4,16,64")
    from lmtune.search.space import read_space, shown

    space = read_space(config, over)
    check_config(space.config)  # before any model is loaded
    with progress("loading PyTorch and the libraries"):
        from lmtune.search.results import SweepResult, TrialResult
        from lmtune.search.sweep import BEST, Plan, check_plan, sweep
        from lmtune.search.tables import describe_sweep, sweep_table

    plan = Plan(space, trials, minutes, storage, prune)
    check_plan(plan)
    if combinations := space.combinations(trials):
        err.print(f"{len(combinations)} combinations in all; each is tried once")

    def said(trial: TrialResult, result: SweepResult) -> None:
        score = f"{result.metric} {trial.score:.4f}" if trial.score is not None else f"{trial.status}: {trial.reason}"
        best = f" (best: trial {result.best})" if result.best is not None else ""
        err.print(escape(f"trial {trial.number}: {shown(trial.values)}: {score}{best}"))

    result = sweep(plan, said)
    if as_json:
        print_json(asdict(result))
        return
    out.print(sweep_table(result))
    out.print("\n".join(map(escape, describe_sweep(result))))
    if result.best is not None:
        err.print(f"the best settings as a config: {escape(command('finetune', plan.folder / BEST))}")
        err.print(f"pictures in {escape(str(plan.folder))}: history.svg, importance.svg, coordinates.svg")


if __name__ == "__main__":
    run(main)
