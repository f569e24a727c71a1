"""Write a config that fits this machine, every setting explained: three questions, or flags.

lmtune init
lmtune init --model Qwen/Qwen3-0.6B --data my.jsonl
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from lmtune.config.files import run_name
from lmtune.config.json_schema import commented_yaml
from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig, Quantization
from lmtune.data.checking import DataCheck, checked_data, describe_check
from lmtune.data.columns import columns_of
from lmtune.errors import ConfigError
from lmtune.io.atomic import require_absent, write_text
from lmtune.io.console import command, err, escape, out, progress
from lmtune.io.questions import ask, choose
from lmtune.proposal import described, known_model, propose, propose_quantization, this_machine
from lmtune.run import run

QUANTIZATIONS: tuple[Quantization, ...] = ("none", "nf4", "int8")
MODEL = "Qwen/Qwen3-0.6B"  # what is suggested: small, and good for its size


def main(
    model: Annotated[str | None, typer.Option(help="A Hub id, a model folder, or tiny.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Files or folders of rows.")] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=KEY", help="What a column of another name is, as question=prompt."),
    ] = None,
    quantization: Annotated[
        Quantization | None, typer.Option(help="How the base's weights are held; what fits, if not given.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write; named after the data if not given.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing; take what is proposed.")] = False,
) -> None:
    """Write a YAML config for your model and data that fits this machine; ask for what the flags do not say.

    It holds every setting with its meaning and default. A file that is there already is never replaced.

    Example: lmtune init --model Qwen/Qwen3-0.6B --data my.jsonl
    """
    asks = sys.stdin.isatty() and not yes
    named = columns_of(columns or [])
    missing = [flag for flag, value in (("--model", model), ("--data", data)) if not value]
    if missing and not asks:
        raise ConfigError(
            f"{' and '.join(missing)}: missing; questions need a terminal, so write "
            "`lmtune init --model MODEL --data FILE`; also --quantization, --output FILE"
        )
    if output is not None:
        require_absent(output)
    elif data and data[0].strip():
        require_absent(Path(f"{run_name(data[0])}.yaml"))
    check = checked_data(data, named) if data else None
    with progress("looking at this machine"):
        machine = this_machine()
    question = "Model: a Hub id, a folder, or tiny, the demonstration"
    model, known = (model, known_model(model)) if model else ask(question, MODEL, known_model)
    paths, check = (data, check) if data and check else asked_data(named)
    if quantization is None and asks:
        proposed, why = propose_quantization(known.parameters, machine)
        err.print(f"[dim]{escape(str(machine))}; {escape(why)}[/]")
        quantization = choose("Quantization", QUANTIZATIONS, proposed)
    path = output or Path(f"{run_name(paths[0])}.yaml")
    require_absent(path)
    values, reasons = propose(model, paths, quantization, check.train.num_rows, machine, known, check.train.kind, named)
    write_text(path, described(path, str(machine), commented_yaml(values, reasons)))
    load_config(FinetuneConfig, path)
    out.print(escape(describe_check(check)))
    out.print(f"\nwrote [bold]{escape(str(path))}[/] for this machine ({escape(str(machine))}). Next:")
    for words, purpose in (
        (("check", "--config", path), "every row, line by line"),
        (("preview", "--config", path), "the tokens that the model sees, the trained ones marked"),
        (("plan", path), "memory and time"),
        (("finetune", path), "train; the same command resumes where it stopped"),
    ):
        out.print(f"  [bold]{escape(command(*words))}[/]\n      {purpose}")


def asked_data(named: dict[str, str]) -> tuple[list[str], DataCheck]:
    """The answer to the question for data; what lies here is proposed."""
    found = next((str(path) for path in sorted(Path().glob("*.jsonl"))), None)
    path, check = ask("Data: a file or folder of rows", found, lambda path: checked_data([path], named))
    return [path], check


if __name__ == "__main__":
    run(main)
