"""Where text for people goes: results to stdout, progress and warnings to stderr.

Rich picks the width and drops colours when the output is no terminal, so piping a result never mixes with progress.
"""

from __future__ import annotations

import re

from rich.console import Console

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
HUB_TOKEN = "hf_[A-Za-z0-9]{20,}"
_SECRET = re.compile(rf"{HUB_TOKEN}|(?<=://)[^\s/@]+(?=@)")  # an address may hold a name and a password
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def warn(message: str) -> None:
    """Say that something is unusual, though the work goes on."""
    err.print(f"[yellow]warning:[/] {escape(message)}")


def escape(text: str) -> str:
    """`text` with Rich's markup switched off: data and error messages may hold square brackets.

    Control characters but tab and line end are written out, so that no name or row can command the terminal. Tokens of
    the Hub and passwords in an address, which a terminal's log would keep, become an ellipsis.
    """
    from rich.markup import escape as rich_escape

    text = _SECRET.sub("…", text)
    return rich_escape(_CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text))
