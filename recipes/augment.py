"""Make further training rows: words of questions or labelled texts deleted, swapped, or replaced by a table.

lmtune augment train.jsonl -o more.jsonl --delete 0.1 --copies 2
lmtune augment train.jsonl -o more.jsonl --replace synonyms.tsv --swap 1
"""

from pathlib import Path
from typing import Annotated

import typer

from lmtune.data.columns import columns_of
from lmtune.data.encodings import Guess
from lmtune.data.prepare.augmenting import Changes, augment, read_replacements
from lmtune.io.console import command, escape, out, warn
from lmtune.io.text import pluralize
from lmtune.run import run


def main(
    data: Annotated[str, typer.Argument(metavar="IN", help="A file of training rows.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, JSONL; never replaced.")],
    delete: Annotated[float, typer.Option(min=0.0, max=0.9, help="Probability to delete each word.")] = 0.0,
    swap: Annotated[int, typer.Option(min=0, help="How many times two words change places.")] = 0,
    table: Annotated[
        str | None, typer.Option("--replace", help="A table: in each line a word, a tab, and words for it.")
    ] = None,
    copies: Annotated[int, typer.Option(min=1, max=100, help="New rows for each row.")] = 1,
    seed: Annotated[int, typer.Option(help="Which words are changed.")] = 0,
    columns: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=KEY", help="A column under another name: review=text.")
    ] = None,
) -> None:
    """Write the rows of IN and changed copies of them; answers stay as they are, and so do numbers.

    Each copy names its origin in augmented_from, so that it is never scored, and is not trained if its row is held out.

    Example: lmtune augment train.jsonl -o more.jsonl --delete 0.1 --copies 2
    """
    changes = Changes(delete, swap, read_replacements(table) if table else {}, copies, seed)
    made = augment(data, output, changes, columns_of(columns or []))
    for said in made.said:
        warn(f"{data}: {said.warning}") if isinstance(said, Guess) else out.print(escape(f"{data}: {said}"))
    few = f"; {pluralize(made.unchanged)} had too few words for every copy" if made.unchanged else ""
    out.print(f"{pluralize(made.rows)} and {made.copies:,} copies{few}: [bold]{escape(str(output))}[/]. Next:")
    out.print(f"  [bold]{escape(command('check', output))}[/]")


if __name__ == "__main__":
    run(main)
