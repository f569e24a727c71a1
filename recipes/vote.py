"""Ask a person which of two models answers better, without telling which is which.

lmtune vote runs/a runs/b --prompts questions.jsonl
"""

from pathlib import Path
from typing import Annotated

import typer

from lmtune.data.columns import columns_of
from lmtune.evaluation.options import ColumnNames, NewTokens
from lmtune.io.console import err, escape, out, print_json, progress
from lmtune.io.questions import read_key
from lmtune.run import run

TARGET = "A run, model or Hub id; or a file that `predict` wrote."


def main(
    first: Annotated[str, typer.Argument(metavar="FIRST", help=TARGET)],
    second: Annotated[str, typer.Argument(metavar="SECOND", help=TARGET)],
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rows with prompts; by default those of a file of answers.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The votes.")] = Path("votes.jsonl"),
    rows: Annotated[int, typer.Option(min=1, help="Prompts to ask about.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the sides on which the answers stand.")] = 0,
    max_new_tokens: NewTokens = 256,
    columns: ColumnNames = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON document.")] = False,
) -> None:
    """Show a prompt and both answers, and take a key: 1, 2, or 0 where neither is better; q leaves.

    The same command continues. Which model is which, and the win rate, is told when all votes are there.

    Example: lmtune vote runs/a runs/b --prompts questions.jsonl -o votes.jsonl
    """
    from lmtune.evaluation.answer_files import answers_of_file, is_answer_file, prompt_of_row, read_prompts
    from lmtune.evaluation.kept import KeptLines
    from lmtune.evaluation.vote import Ballot, KeptAnswers, ask_votes, identity, prompts_file, questions_of

    named, file = columns_of(columns or []), prompts_file(prompts, (first, second))
    examples = read_prompts(file, named)[:rows]
    asked = [(example.location, prompt_of_row(example)) for example in examples]

    def answers(target: str) -> list[str]:
        if is_answer_file(target):
            return answers_of_file(target, [prompt for _, prompt in asked], named)
        with progress("loading PyTorch and the libraries"):
            from lmtune.evaluation.predict import answer_prompts
            from lmtune.inference.load import load_for_inference

        return answer_prompts(load_for_inference(target), examples, max_new_tokens)

    depends = {"first model": identity(first), "second model": identity(second), "prompts": identity(str(file))}
    depends |= {"--rows": str(rows), "--max-new-tokens": str(max_new_tokens)}
    kept = KeptAnswers(output.with_suffix(".answers.json"), depends)
    given = [kept.get(side, lambda target=target: answers(target)) for side, target in
             (("first", first), ("second", second))]  # fmt: skip
    ballot = Ballot(questions_of(asked, *given), KeptLines(output), seed)
    if not ask_votes(ballot, read_key):
        err.print(f"{len(ballot.left)} left; the same command continues ({escape(str(output))})")
        return
    found = ballot.result
    if as_json:
        print_json({"first": first, "second": second, **found.as_dict()})
        return
    told = f"{first} (first): {found.losses} votes; {second} (second): {found.wins}; neither: {found.ties}"
    out.print(escape(told))
    if found.same:
        out.print(f"{found.same} of these ties are equal answers, which were not shown")
    out.print(escape(found.sentence(second)))


if __name__ == "__main__":
    run(main)
