"""Will it fit, and how long will it take: a run's memory, steps, tokens and time, before it is started.

lmtune plan recipes/configs/support.yaml
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lmtune.cli import run
from lmtune.config import FinetuneConfig, data_paths, load_config
from lmtune.console import err, out
from lmtune.data.checking import check_data


def main(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see recipes/configs.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the file.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes to plan for.")] = 1,
) -> None:
    """Estimate memory by part, steps, tokens and time of a run, without loading the model's weights.

    Example: lmtune plan recipes/configs/support.yaml train.batch_size=64
    """
    config = load_config(FinetuneConfig, config_file, overrides or [])
    check_data(data_paths(config.data.train))
    err.print("reading the rows and the model's shape …")

    from lmtune.data.tokenized import load_data
    from lmtune.models.inference import build_renderer
    from lmtune.models.loading import default_device, load_tokenizer
    from lmtune.training.forecast import forecast

    notes = {"template": config.data.template, "system": config.data.system}
    renderer = build_renderer(load_tokenizer(config.model, alone=True), config.model, notes)
    data = load_data(config.data, renderer, config.train.seed)
    plan = forecast(config, data.train.num_tokens, data.train.num_trained, default_device(), processes)

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in plan.lines():
        table.add_row(name, value)
    out.print(table)
    for advice in plan.advice:
        out.print(f"- {advice}")


if __name__ == "__main__":
    run(main)
