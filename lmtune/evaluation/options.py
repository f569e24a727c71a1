"""Options that several commands have: what each is called, and what `--help` says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmtune.config.options import Base as Base

TARGET = "A run, model folder or Hub id; or a file of answers that `predict` wrote."
Data = Annotated[list[Path] | None, typer.Argument(metavar="DATA...", help="Files or folders of rows.")]
Metrics = Annotated[
    list[str] | None,
    typer.Option("--metric", help="Of answers: exact, f1, number, chrf, …; the first decides."),
]
By = Annotated[str | None, typer.Option(metavar="FIELD", help="Slices: by a field, `length` or `source`.")]
AnswerRows = Annotated[int, typer.Option(min=0, help="Rows to generate answers for.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Where an answer that does not stop is cut.")]
MaxLength = Annotated[int, typer.Option(min=8, help="Longer rows are dropped and counted.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Rows as JSONL, those that got worse first.")
]
Shown = Annotated[int, typer.Option(min=0, help="Rows that got worse to show.")]
JudgeAddress = Annotated[
    str | None,
    typer.Option("--judge", metavar="URL", help="An OpenAI-compatible endpoint that compares answers; see the docs."),
]
JudgeModel = Annotated[str | None, typer.Option(metavar="NAME", help="The judge's model, if the endpoint has several.")]
ColumnNames = Annotated[
    list[str] | None,
    typer.Option("--columns", help="Another name of a key, as question=prompt; by default those of the run."),
]
JudgeReference = Annotated[
    bool, typer.Option("--judge-reference", help="Let the judge compare with the reference, not with the base.")
]
Drift = Annotated[bool, typer.Option("--drift", help="How far the model is from its base on prompts outside the data.")]
DriftPrompts = Annotated[
    Path | None, typer.Option("--drift-prompts", metavar="FILE", help="Prompts for --drift, in place of its own.")
]
LmEval = Annotated[
    str | None, typer.Option("--lm-eval", metavar="TASKS", help="Tasks of lm-eval: names or YAML files, with commas.")
]
Confusion = Annotated[
    Path | None, typer.Option(metavar="FILE.svg", help="Of a classifier: draw the confusion matrix into this file.")
]
