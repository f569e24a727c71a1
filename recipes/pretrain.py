"""Train a small language model and its tokenizer from scratch, on plain text.

lmtune pretrain pretrain_tiny
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from lmtune.config import options
from lmtune.config.load import load_config
from lmtune.config.pretrain import PretrainConfig
from lmtune.errors import ConfigError
from lmtune.io.console import command, err, escape, out, progress
from lmtune.run import run
from lmtune.runs.store import require_possible


def main(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped one.")],
    overrides: options.Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model that is in output.dir.")] = False,
) -> None:
    """Train a model and a tokenizer from scratch on text: .txt files, or files of rows (data.path).

    Each .txt file is a document; with data.split: paragraph each paragraph is one. Some documents are held out, and the
    perplexity on them is measured at the end. Ctrl-C ends training early and saves the model.

    Example: lmtune pretrain pretrain_tiny data.path=my-texts output.dir=my-tiny
    """
    config = load_config(PretrainConfig, config_file, overrides or [])
    folder = Path(os.path.expanduser(config.output.dir))
    require_possible(folder, "output.dir")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise ConfigError(f"output.dir: {folder} is there already; choose another folder, or replace it: --overwrite")

    with progress("loading PyTorch and the libraries"):
        from lmtune.training.corpus import Blocks, read_corpus, tokenize, train_tokenizer
        from lmtune.training.pretrain import build_model, model_card, pretrain, save_pretrained

    with progress("reading the documents"):
        corpus = read_corpus(config.data)
    for name, said in corpus.read_as.items():
        err.print(escape(f"{name}: {said}"))
    err.print(f"{len(corpus.train):,} documents to train on, {len(corpus.validation):,} held out")
    with progress("training the tokenizer"):
        tokenizer = train_tokenizer(corpus.train, config.tokenizer.vocabulary_size)
    with progress("tokenizing"):
        blocks, validation = (
            Blocks(tokenize(documents, tokenizer), config.train.block_length)
            for documents in (corpus.train, corpus.validation)
        )
    err.print(f"{blocks.num_tokens:,} tokens, of a vocabulary of {len(tokenizer):,}")
    model = build_model(config.model, tokenizer, config.train.seed)
    err.print(f"{config.model.architecture}, {model.num_parameters():,} parameters")
    result = pretrain(model, blocks, validation, config)
    card = model_card(config, result, model.num_parameters(), len(tokenizer), config_file)
    save_pretrained(model, tokenizer, card, config)
    out.print(f"perplexity on held-out text: {result.perplexity:.2f}")
    out.print(f"the model is in {escape(str(folder))}; talk to it: {escape(command('chat', folder))}")
    if result.exit_code:
        err.print(f"stopped after step {result.state.step} of {result.total_steps}; the model of that step is saved")
        raise typer.Exit(result.exit_code)


if __name__ == "__main__":
    run(main)
