"""One page that explains a run, or several beside each other: curves, scores, answers, rows, settings.

lmtune report support
lmtune report first second -o both.html
"""

from pathlib import Path
from typing import Annotated

import typer

from lmtune.errors import ConfigError
from lmtune.io.console import err, escape, print_json
from lmtune.run import run
from lmtune.runs.store import choose_run


def main(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs: names, or folders.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; of one run, report.html in its folder.")
    ] = None,
    runs_dir: Annotated[Path, typer.Option("--dir", help="Where runs are kept.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document: the files written.")] = False,
) -> None:
    """Write one HTML page that holds everything: it loads nothing and can be sent to somebody. Also the loss as PNG.

    A run writes its page itself when it ends. For one that is still running, this writes it as far as it got.

    Example: lmtune report support

    Example: lmtune report first second -o both.html
    """
    runs = [choose_run(name, runs_dir) for name in names]
    if output is None and len(runs) > 1:
        raise ConfigError("--output: missing; several runs have one page, for example -o both.html")
    page = runs[0].report if output is None else output
    if page.suffix not in (".html", ".htm"):
        raise ConfigError(f"--output: {page}; expected a name that ends in .html")
    if not page.parent.is_dir():
        raise ConfigError(f"--output: {page.parent} is not a folder; make it, or give another --output")

    from lmtune.evaluation.answer_metrics import token_f1
    from lmtune.runs.report import write_report

    picture = write_report(runs, page, token_f1)
    if as_json:
        print_json({"page": str(page), "picture": str(picture), "bytes": page.stat().st_size})
    else:
        err.print(f"{escape(str(page))} and {escape(str(picture))}: open the page in a browser")


if __name__ == "__main__":
    run(main)
