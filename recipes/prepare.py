"""Turn what people have, rows, tables, corpora or chats, into a clean file of rows; every change is counted and shown.

lmtune prepare raw.jsonl -o my.jsonl
lmtune prepare chat.txt -o my.jsonl --pair conversations --assistant Mia --yes
"""

from pathlib import Path
from typing import Annotated

import typer

from lmtune.data.prepare.deciding import Decided, chosen_settings
from lmtune.data.prepare.libraries import require_libraries
from lmtune.data.prepare.plan import read_plan, require_jsonl
from lmtune.data.prepare.preparing import prepare
from lmtune.data.prepare.report import described
from lmtune.data.prepare.settings import Pairing
from lmtune.errors import ConfigError
from lmtune.io.console import escape, out, warn
from lmtune.run import run


def main(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="IN...", help="Files or folders; FILE=LABEL labels the lines of a text."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; never replaced.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Apply every recommended step; ask nothing.")] = False,
    no: Annotated[bool, typer.Option("--no", help="Apply no step: only read, pair and write.")] = False,
    steps: Annotated[str | None, typer.Option(help="Apply these steps only, as near,personal; ask nothing.")] = None,
    replay: Annotated[Path | None, typer.Option(help="Do what an OUT.prepare.json says.")] = None,
    validation: Annotated[
        str | None, typer.Option(help="Share of rows to hold out, as 0.1; or a file of rows that are held out already.")
    ] = None,
    language: Annotated[str | None, typer.Option(help="Languages of the rows, as zh,en.")] = None,
    blocked: Annotated[str | None, typer.Option(help="A file of words, one a line, that no row may hold.")] = None,
    min_characters: Annotated[int | None, typer.Option(min=1, help="Shorter rows are dropped.")] = None,
    max_characters: Annotated[int | None, typer.Option(min=1, help="Longer rows are dropped.")] = None,
    similarity: Annotated[
        float | None, typer.Option(min=0.5, max=1.0, help="Share of common phrases of near duplicates; 0.8.")
    ] = None,
    pair: Annotated[Pairing | None, typer.Option(help="What messages of a chat or forum become; qa.")] = None,
    assistant: Annotated[str | None, typer.Option(help="Who of a chat the model shall be; else who answers.")] = None,
    gap: Annotated[
        float | None, typer.Option(min=0.0, help="Minutes of silence after which a chat begins anew; 60.")
    ] = None,
    columns: Annotated[list[str] | None, typer.Option(help="Another name of a key, as question=prompt.")] = None,
    seed: Annotated[int | None, typer.Option(help="Which rows are held out; 0.")] = None,
) -> None:
    """Read files of any form, propose one cleaning step after the other, and write rows to train on.

    Example: lmtune prepare raw.jsonl -o my.jsonl
    """
    if output is None or not (inputs or replay):
        raise ConfigError("say what to read and what to write: lmtune prepare IN… -o OUT.jsonl")
    given = {
        "language": language, "blocked": blocked, "min_characters": min_characters, "max_characters": max_characters,
        "similarity": similarity, "validation": validation, "pair": pair, "assistant": assistant, "gap_minutes": gap,
        "columns": columns, "seed": seed,
    }  # fmt: skip
    require_jsonl(output)
    if not no and steps is None:  # before rows are read and questions asked
        require_libraries()
    earlier = read_plan(replay) if replay else None
    settings = chosen_settings(given, earlier)
    decided = Decided.of(yes, no, steps, earlier)
    plan = prepare(inputs or list(earlier.sha256 if earlier else ()), output, settings, decided)
    for one in plan.inputs if earlier else ():
        if earlier and earlier.sha256.get(one.name, one.sha256) != one.sha256:
            warn(f"{one.name}: its content is not that of the plan")
    for line in described(plan, output):
        out.print(escape(line))


if __name__ == "__main__":
    run(main)
