"""Show the exact tokens that a model will see of each row, and which of them are trained.

lmtune preview train.jsonl --config qwen3_0.6b --rows 5
lmtune preview train.jsonl --model Qwen/Qwen3-0.6B
"""

from itertools import islice
from typing import Annotated

import typer

from lmtune.config.files import split_data
from lmtune.config.load import command_config
from lmtune.config.schema import FinetuneConfig, sources_of
from lmtune.errors import ConfigError
from lmtune.io.console import err, escape, out, print_json, progress
from lmtune.run import run


def main(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DATA]... [KEY=VALUE]...", help="Files or folders of rows; settings that replace."),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Take model, template and data from this YAML file, or shipped one by name.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A Hub id, a local folder, a GGUF file, or tiny; only its tokenizer loads.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="The same as DATA.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document: model, template, rows.")] = False,
) -> None:
    """Show the tokens of the first rows, trained ones colored, or in brackets without color.

    Example: lmtune preview train.jsonl --config qwen3_0.6b
    """
    settings = chosen(words or [], config, model, data or [])
    kind = settings.objective.rows if config is not None else None
    model_config, data_config, paths = settings.model, settings.data, sources_of(settings.data.train)

    with progress("loading PyTorch and the libraries"):
        from lmtune.data.lengths import fit
        from lmtune.data.preview import parts_of, sequence_tree, show_tokens, why_dropped
        from lmtune.data.reading import ReadReport, read_examples
        from lmtune.data.rendering import ControlText
        from lmtune.data.sources import find_files, unread_entries
        from lmtune.inference.load import build_renderer, load_run_tokenizer

    files = find_files(paths)
    tokenizer = load_run_tokenizer(settings, alone=True)
    renderer = build_renderer(tokenizer, model_config, data_config.template, data_config.system)
    err.print(f"{escape(model_config.name)}: {escape(renderer.description)}")
    shown: list[dict[str, object]] = []
    report, control_text = ReadReport(), ControlText(tokenizer)
    for example in islice(read_examples(files, report, kind, data_config.columns), rows):
        control_text.add(example)
        fitted = fit(example, whole := renderer.render(example), data_config)
        why = why_dropped(example, fitted, data_config.max_length)
        parts = parts_of(example, fitted, whole)
        if as_json:
            about = {"kind": example.kind, "label": example.label, "weight": example.weight}
            found = [sequence_tree(tokenizer, sequence) for _, _, sequence in parts]
            shown.append({"where": example.location, "dropped": why, **about, "documents": found})
            continue
        for name, noted, sequence in parts:
            out.print(f"\n[bold]{escape(name)}[/]: {escape(noted)}")
            out.print(show_tokens(tokenizer, sequence, out.is_terminal and not out.no_color))
        if why:
            out.print(f"[yellow]this row will be dropped: {why}[/]")
    for name, read_as in report.read_as.items():
        err.print(escape(f"{name}: {read_as}"))
    for warning in (*report.warnings, *control_text.warnings(), *unread_entries(paths)):
        err.print(f"[yellow]warning:[/] {escape(warning)}")
    if as_json:
        print_json({"model": model_config.name, "template": renderer.description, "rows": shown})
    report.raise_for_faults(data_config.faulty_rows, rows)


def chosen(words: list[str], config: str | None, model: str | None, data: list[str]) -> FinetuneConfig:
    """The settings that the command line means.

    Raises:
        ConfigError: it does not say which model and which data, or something in it is wrong.
    """
    positional, overrides = split_data(words, "preview")
    given = [*positional, *data]
    if config is None and not (given and model) and not overrides:
        raise ConfigError("say what to show: lmtune preview DATA --config CONFIG, or DATA --model NAME")
    return command_config(config, overrides, model, given, "preview")


if __name__ == "__main__":
    run(main)
