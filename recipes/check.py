"""Check data files: every bad line with its reason, and what is worth knowing of the good ones. Loads no model.

lmtune check train.jsonl
lmtune check --config recipes/configs/support.yaml
"""

from pathlib import Path
from typing import Annotated

import typer

from lmtune.cli import run
from lmtune.config import FinetuneConfig, data_paths, load_config
from lmtune.console import escape, out
from lmtune.data.checking import describe_check, inspect_data
from lmtune.data.survey import counted
from lmtune.errors import ConfigError, DataError


def main(
    data: Annotated[list[Path] | None, typer.Argument(metavar="DATA", help="Files or folders of rows.")] = None,
    config: Annotated[Path | None, typer.Option(help="Check the data that this YAML file names.")] = None,
) -> None:
    """Check data files (or those of --config) line by line; exit code 2 if a line is wrong.

    Example: lmtune check train.jsonl
    """
    settings = load_config(FinetuneConfig, config).data if config else None
    paths = [str(path) for path in data or []] or (list(data_paths(settings.train)) if settings else [])
    if not paths:
        raise ConfigError("say what to check: lmtune check DATA, or lmtune check --config CONFIG")
    validation = data_paths(settings.validation) if settings and settings.validation else ()
    check = inspect_data(paths, validation)
    for fault in check.report.faults:
        out.print(escape(fault))
    out.print(escape(describe_check(check)))
    if check.report.num_faults:
        raise DataError(f"{counted(check.report.num_faults, 'fault')} in the data; mend the lines named above")
    how = f"--config {escape(str(config))}" if config else "--model NAME"
    out.print(f"[green]no fault[/]; tokens are shown by: lmtune preview {escape(' '.join(paths))} {how}")


if __name__ == "__main__":
    run(main)
