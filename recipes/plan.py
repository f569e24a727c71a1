"""Will it fit, and how long will it take: a run's memory, steps, tokens and time, before it is started.

lmtune plan support
lmtune plan --model Qwen/Qwen3-0.6B --data my.jsonl
"""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from lmtune.config import options
from lmtune.config.load import command_config
from lmtune.data.checking import check_config
from lmtune.io.console import out, print_json, progress
from lmtune.run import run


def main(
    config_file: options.ConfigFile = None,
    overrides: options.Overrides = None,
    model: options.BaseModel = None,
    data: options.TrainRows = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes to plan for.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Estimate memory by part, steps, tokens and time of a run, without loading the model's weights.

    Example: lmtune plan support train.batch_size=64

    Example: lmtune plan --model Qwen/Qwen3-0.6B --data my.jsonl
    """
    config = command_config(config_file, overrides or [], model, data or [], "plan")
    check_config(config)

    with progress("loading PyTorch and the libraries"):
        from lmtune.data.store import load_data
        from lmtune.inference.load import build_renderer, load_run_tokenizer
        from lmtune.inference.start_adapter import with_starting_adapter
        from lmtune.models.device import default_device
        from lmtune.training.estimate import forecast

    config = with_starting_adapter(config)
    tokenizer = load_run_tokenizer(config, alone=True)
    renderer = build_renderer(tokenizer, config.model, config.data.template, config.data.system)
    rows = load_data(config.data, renderer, config.train.seed, config.objective.rows)
    held_out = None if rows.validation is None else rows.validation.sequences
    with progress("reading the model's shape"):
        plan = forecast(config, rows.train.sequences, default_device(), processes, held_out)

    if as_json:
        print_json(asdict(plan))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in plan.lines():
        table.add_row(name, value)
    out.print(table)
    for advice in plan.advice:
        out.print(f"- {advice}")


if __name__ == "__main__":
    run(main)
