"""Check data files: every bad line with its reason, and what is worth knowing of the good ones. Loads no model.

lmtune check train.jsonl
lmtune check --config support
lmtune check train.jsonl --skip-faulty
"""

from typing import Annotated

import typer

from lmtune.config.files import split_data
from lmtune.config.load import command_config
from lmtune.config.schema import sources_of
from lmtune.data.checking import check_tree, describe_check, inspect_data
from lmtune.errors import ConfigError, DataError
from lmtune.io.console import command, escape, out, print_json
from lmtune.io.text import pluralize
from lmtune.run import run


def main(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA]... [KEY=VALUE]...", help="Files, folders or hub:NAME; settings, as data.columns."
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Check the data that this YAML file, or shipped one by name, gives.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="The same as DATA.")] = None,
    skip_faulty: Annotated[
        bool,
        typer.Option("--skip-faulty", help="Leave faulty rows out, as data.faulty_rows: skip does, and count them."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Check data files (or those of --config) line by line; exit code 2 if a line is wrong.

    --json gives faults, num_faults, train and validation (num_rows, formats, duplicates, warnings, …), also_in_train.

    Example: lmtune check train.jsonl
    """
    positional, overrides = split_data(words or [], "check")
    given = [*positional, *(data or [])]
    if not given and config is None:
        raise ConfigError("say what to check: lmtune check DATA, or lmtune check --config CONFIG")
    whole = command_config(config, overrides, None if config else "tiny", given, "check")
    settings, knows_use = whole.data, config is not None or any(word.startswith("objective.") for word in overrides)
    validation = sources_of(settings.validation) if settings.validation else ()
    rows = whole.objective.rows if knows_use else None
    check = inspect_data(sources_of(settings.train), validation, rows, settings.columns)
    skips = skip_faulty or settings.faulty_rows == "skip"
    if as_json:
        print_json(check_tree(check))
    else:
        for fault in check.report.faults:
            out.print(escape(fault))
        if described := describe_check(check, skips):
            out.print(escape(described))
    num_faults = check.report.num_faults
    if skips:
        check.raise_for_faults("skip")
    elif num_faults:
        what = "fix the lines named above" if num_faults > 1 else "fix the line named above"
        rest = "" if check.report.fatal else "; what is left without faulty rows: lmtune check --skip-faulty"
        raise DataError(f"{pluralize(num_faults, 'fault')} in the data; {what}{rest}")
    if as_json:
        return
    shown = command("preview", *given, *overrides, *(("--config", config) if config else ("--model", "tiny")))
    other = "" if config else " (or another model's name)"
    left = "no fault" if not num_faults else f"{pluralize(check.train.num_rows)} left"
    out.print(f"[green]{left}[/]; tokens are shown by: {escape(shown)}{other}")


if __name__ == "__main__":
    run(main)
