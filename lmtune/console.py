"""Where text for people goes: results to stdout, progress and warnings to stderr.

Rich picks the width and drops colours when the output is no terminal, so piping a result never mixes with progress.
"""

from __future__ import annotations

from rich.console import Console

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def warn(message: str) -> None:
    """Say that something is unusual, though the work goes on."""
    err.print(f"[yellow]warning:[/] {escape(message)}")


def escape(text: str) -> str:
    """`text` with Rich's markup switched off: data and error messages may hold square brackets."""
    from rich.markup import escape as rich_escape

    return rich_escape(text)
