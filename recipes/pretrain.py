"""Train a small language model and its tokenizer from scratch, on plain text.

lmtune pretrain pretrain_tiny
"""

from pathlib import Path
from typing import Annotated

import typer

from lmtune.config.load import load_config
from lmtune.errors import ConfigError
from lmtune.io.console import command, err, escape, out, progress
from lmtune.run import run
from lmtune.runs.store import expand_home, require_possible
from lmtune.training.pretrain_config import PretrainConfig


def main(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that is in output.dir.")] = False,
) -> None:
    """Train a model and a tokenizer from scratch on .txt files: a folder (data.path), or the built-in small world.

    Each file is a document; with data.split: paragraph each paragraph is one. Some documents are held out, and the
    perplexity on them is measured at the end. Ctrl-C ends training early and saves what was learned.

    Example: lmtune pretrain pretrain_tiny output.dir=my-tiny
    """
    config = load_config(PretrainConfig, config_file, overrides or [])
    folder = expand_home(config.output.dir, "output.dir")
    require_possible(folder, "output.dir")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise ConfigError(f"output.dir: {folder} is there already; choose another folder, or replace it: --overwrite")

    with progress("loading PyTorch and the libraries"):
        from lmtune.training.corpus import read_corpus, tokenize, train_tokenizer
        from lmtune.training.pretrain_card import model_card
        from lmtune.training.pretraining import build_model, pretrain, save_pretrained

    with progress("reading the documents"):
        corpus = read_corpus(config.data)
    err.print(f"{len(corpus.train):,} documents to learn, {len(corpus.validation):,} held out")
    with progress("training the tokenizer"):
        tokenizer = train_tokenizer(corpus.train, config.tokenizer.vocabulary_size)
    with progress("tokenizing"):
        stream, validation = tokenize(corpus.train, tokenizer), tokenize(corpus.validation, tokenizer)
    err.print(f"{len(stream):,} tokens, of a vocabulary of {len(tokenizer):,}")
    model = build_model(config.model, tokenizer, config.train.seed)
    err.print(f"{config.model.architecture}, {model.num_parameters():,} parameters")
    result = pretrain(model, stream, validation, config)
    card = model_card(config, result, model.num_parameters(), len(tokenizer), config_file)
    save_pretrained(model, tokenizer, card, config)
    out.print(f"perplexity on held-out text: {result.perplexity:.2f}")
    out.print(f"the model is in {escape(str(folder))}; talk to it: {escape(command('chat', folder))}")
    if result.exit_code:
        err.print(f"stopped after step {result.steps} of {result.total_steps}; what was learned until then is saved")
        raise typer.Exit(result.exit_code)


if __name__ == "__main__":
    run(main)
