"""Say what an endpoint serves: the tuned model of a run, its base, another template or end token, or something else.

lmtune verify http://127.0.0.1:8000/v1 runs/support
"""

from typing import Annotated

import typer

from lmtune.config.options import Base
from lmtune.io.console import escape, out, print_json, progress
from lmtune.run import run
from lmtune.runs.store import choose_run

KEYS = ("LMTUNE_VERIFY_KEY", "OPENAI_API_KEY")


def main(
    url: Annotated[str, typer.Argument(metavar="URL", help="As http://127.0.0.1:8000/v1.")],
    target: Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or its name in runs/.")],
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the model there; else the run's, or the only one.")
    ] = None,
    base: Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON document.")] = False,
) -> None:
    """Ask an endpoint that speaks OpenAI's protocol for the run's held-out rows, and compare with both models.

    Says `tuned` and ends with 0; or `base`, `another template`, `another end token`, `neither` or `not told`, with
    the evidence and what to do, and ends with 1. The key is in LMTUNE_VERIFY_KEY or OPENAI_API_KEY.

    Example: lmtune verify http://127.0.0.1:8000/v1 runs/support --model support
    """
    from lmtune.export.asking import choose_model
    from lmtune.export.served import Served
    from lmtune.io.endpoint import Endpoint

    chosen = choose_run(target)
    with Endpoint.at(url, "URL", KEYS, "start the server, or give its address") as endpoint:
        name, listed = choose_model(endpoint, model, chosen.name)
        with progress("loading PyTorch and the libraries"):
            from lmtune.export.verify import verify_endpoint

        found = verify_endpoint(Served(endpoint, name), chosen, listed, base)
        address = endpoint.shown
    if as_json:
        print_json({"url": address, "run": chosen.name, **found.as_dict()})
    else:
        for line in (f"{address}, model {name}, beside {chosen.path}", *found.lines):
            out.print(escape(line))
    if not found.is_right:
        raise typer.Exit(1)


if __name__ == "__main__":
    run(main)
