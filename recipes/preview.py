"""Show the exact tokens that a model will see of each row, and which of them it learns.

lmtune preview train.jsonl --config recipes/configs/support.yaml --rows 5
lmtune preview train.jsonl --model Qwen/Qwen3-0.6B
"""

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from lmtune.cli import run
from lmtune.config import DataConfig, FinetuneConfig, ModelConfig, data_paths, load_config
from lmtune.console import err, escape, out
from lmtune.errors import ConfigError


def main(
    data: Annotated[list[Path] | None, typer.Argument(metavar="DATA", help="Files or folders of rows.")] = None,
    config: Annotated[Path | None, typer.Option(help="Take model, template and data from this YAML file.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A Hub id, a local folder, or tiny; only its tokenizer loads.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 3,
) -> None:
    """Show the tokens of the first rows, the learned ones coloured, or in brackets where there is no colour.

    Example: lmtune preview train.jsonl --config recipes/configs/support.yaml
    """
    settings = load_config(FinetuneConfig, config) if config else None
    if settings is None and not (data and model):
        raise ConfigError("say what to show: lmtune preview DATA --config CONFIG, or DATA --model NAME")
    model_config = ModelConfig(name=model) if model else settings.model if settings else ModelConfig(name="tiny")
    paths = [str(path) for path in data or []] or data_paths(settings.data.train if settings else "")
    data_config = settings.data if settings else DataConfig(train=tuple(paths))

    from lmtune.data.fates import WHY_DROPPED
    from lmtune.data.files import find_files
    from lmtune.data.preview import show_tokens
    from lmtune.data.reading import ReadReport, read_examples
    from lmtune.data.tokenized import fit
    from lmtune.models.inference import build_renderer
    from lmtune.models.loading import load_tokenizer

    files = find_files(paths)
    notes = {"template": data_config.template, "system": data_config.system}
    renderer = build_renderer(load_tokenizer(model_config, alone=True), model_config, notes)
    err.print(f"{escape(model_config.name)}: {escape(renderer.description)}")
    colour = out.is_terminal and not out.no_color
    report = ReadReport()
    for example in islice(read_examples(files, report), rows):
        documents, dropped = fit(example, whole := renderer.render(example), data_config)
        for number, document in enumerate(documents or whole, start=1):
            part = f" (document {number})" if len(whole) > 1 else ""
            counts = f"{len(document.input_ids):,} tokens, {sum(document.trained):,} learned"
            out.print(f"\n[bold]{escape(example.where)}[/]{part}: {counts}")
            out.print(show_tokens(renderer.tokenizer, document.input_ids, document.trained, colour))
        if dropped:
            out.print(f"[yellow]this row will be dropped: {WHY_DROPPED[dropped]} ({data_config.max_length})[/]")
    report.raise_for_faults()


if __name__ == "__main__":
    run(main)
