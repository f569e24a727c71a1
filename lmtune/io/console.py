"""Where text for people goes: results to stdout, progress and warnings to stderr.

Rich picks the width and drops colors when the output is not a terminal, so piping a result never mixes with progress.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.errors import MarkupError

HUB_TOKEN = "hf_[A-Za-z0-9]{20,}"
_SECRET = re.compile(rf"{HUB_TOKEN}|(?<=://)[^\s/@]+(?=@)")  # an address may hold a name and a password
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class _Console(Console):
    """Rich's, on which no text can command the terminal, and brackets that are not markup do not end the program."""

    def print(self, *objects: Any, **options: Any) -> None:
        shown = [_clean(one) if isinstance(one, str) else one for one in objects]
        try:
            super().print(*shown, **options)
        except MarkupError:
            super().print(*shown, **{**options, "markup": False})


def _clean(text: str) -> str:
    """`text` without secrets, its control characters but tab and line end written out."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), without_secrets(text))


def without_secrets(text: str) -> str:
    """`text` with an ellipsis for each token of the Hub and each password in an address."""
    return _SECRET.sub("…", text)


# Without `emoji`, or Rich would make one of the line in `rows:100: no JSON`
out = _Console(highlight=False, soft_wrap=True, emoji=False)
err = _Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def command(*words: object) -> str:
    """A command of lmtune as a shell runs it here: `lmtune chat runs/a`, or `.venv/bin/lmtune chat runs/a`."""
    return " ".join([program(), *(shlex.quote(str(word)) for word in words)])


def program() -> str:
    """What calls this program again: `lmtune` where the shell finds it by that name, else the path of its script."""
    called = sys.argv[0] if os.path.basename(sys.argv[0]) == "lmtune" else ""
    script = called if os.path.isfile(called) else os.path.join(os.path.dirname(sys.executable), "lmtune")
    if not os.path.isfile(script):
        return f"{shlex.quote(sys.executable)} -m lmtune"
    found = shutil.which("lmtune")
    if found is not None and os.path.samefile(found, script):
        return "lmtune"
    inside = os.path.relpath(script)
    return shlex.quote(script if inside.startswith(os.pardir) else inside)


class Progress:
    """Something that may take long; `progress` makes one.

    On a terminal a line with a spinner appears, and a bar where the total is known; elsewhere a plain line, and another
    every half minute while `advance` or `at` is called.
    """

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self.what, self.total, self.unit = what, total, unit
        self._done, self._ended, self._said_at = 0, False, 0.0
        self._bar: Any = None
        self._lock = threading.Lock()

    def advance(self, count: int = 1) -> None:
        """`count` more are done."""
        self.at(self._done + count)

    def at(self, done: int) -> None:
        """So many are done in all."""
        self._done = done
        if self._bar is not None:
            self._bar.update(0, description=escape(self._text()), completed=done)
        elif self._said_at and time.monotonic() - self._said_at >= _LINE_EVERY_SECONDS:
            self._say(self._text())

    def show(self) -> None:
        """Appear, unless it has ended."""
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        with self._lock:
            if self._ended:
                return
            if not err.is_terminal:
                self._say(f"{self.what} …")
                return
            columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
            if self.total is not None:
                columns.insert(2, BarColumn(bar_width=20))
            self._bar = Bar(*columns, console=err, transient=True, redirect_stdout=False, redirect_stderr=False)
            self._bar.add_task(escape(self._text()), total=self.total, completed=self._done)
            self._bar.start()

    def end(self) -> None:
        """Disappear."""
        with self._lock:
            self._ended = True
            if self._bar is not None:
                self._bar.stop()

    def _say(self, text: str) -> None:
        self._said_at = time.monotonic()
        err.print(escape(text))

    def _text(self) -> str:
        if not self._done and self.total is None:
            return self.what
        count = f"{self._done:,}" + (f" of {self.total:,}" if self.total is not None else "")
        return f"{self.what}: {count} {self.unit}".rstrip()


_AFTER_SECONDS = 2.0
_LINE_EVERY_SECONDS = 30.0


@contextlib.contextmanager
def progress(what: str, total: int | None = None, unit: str = "") -> Iterator[Progress]:
    """Show that the block is under way, if it takes over two seconds.

        with progress("scoring the base", total=len(rows)) as shown:
            for row in rows: …; shown.advance()

    Of several processes the first one shows it; a program that imports lmtune sees nothing (`quiet`).
    """
    shown = Progress(what, total, unit)
    if err.quiet or os.environ.get("RANK", "0") != "0":
        yield shown
        return
    timer = threading.Timer(_AFTER_SECONDS, shown.show)
    timer.daemon = True
    timer.start()
    try:
        yield shown
    finally:
        timer.cancel()
        shown.end()


_plain_bars = False


@contextlib.contextmanager
def quiet(progress: bool = False, enabled: bool = True) -> Iterator[None]:
    """Print nothing inside the block, as a program that imports lmtune wants it; warnings become Python's.

    Args:
        progress: leave progress bars, as plain text that a notebook shows.
        enabled: false changes nothing.
    """
    global _plain_bars
    before = out.quiet, err.quiet, _plain_bars
    if enabled:
        warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, in a notebook without ipywidgets
        out.quiet = err.quiet = True
        _plain_bars = progress
    try:
        yield
    finally:
        out.quiet, err.quiet, _plain_bars = before


def plain_bars() -> bool:
    """Whether progress is shown by bars of plain text, and nothing else is printed."""
    return _plain_bars


def tolerate_closed_stderr() -> None:
    """From here on work goes on when nobody reads stderr any more, as `lmtune … 2>&1 | tee log` after Ctrl-C."""
    if sys.stderr is not None and not isinstance(sys.stderr, BrokenPipeTolerantStream):
        sys.stderr = BrokenPipeTolerantStream(sys.stderr)


class BrokenPipeTolerantStream:
    """A text stream that forgets what it cannot write."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or turn to nothing for good."""
        try:
            return int(self._stream.write(text))
        except OSError:
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
            return len(text)

    def flush(self) -> None:
        """Flush what there is."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def print_json(value: object) -> None:
    """One JSON document on stdout, as `--json` gives it; nothing else is printed there then."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


_listeners: list[Callable[[str], None]] = []


@contextlib.contextmanager
def warnings_heard_by(listener: Callable[[str], None]) -> Iterator[None]:
    """Tell `listener` each warning of the block, too: a run writes them down."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def warn(message: str) -> None:
    """Say that something is unusual, though the work goes on."""
    for listener in _listeners:
        listener(message)
    if err.quiet:
        warnings.warn(message, stacklevel=2)
        return
    err.print(f"[yellow]warning:[/] {escape(message)}")


def escape(text: str) -> str:
    """`text` with Rich's markup switched off: data and error messages may hold square brackets.

    Control characters but tab and line end are written out, so that no name or row can command the terminal. Tokens of
    the Hub and passwords in an address, which a terminal's log would keep, become an ellipsis.
    """
    from rich.markup import escape as rich_escape

    return rich_escape(_clean(text))


_EVERY_ROWS = 2000


@contextlib.contextmanager
def row_progress(done: str) -> Iterator[Callable[[int], None]]:
    """A function that takes the number of rows so far; `done` is what happens to them, for example `reading`."""
    with progress(done, unit="rows") as shown:

        def show(num_rows: int) -> None:
            if num_rows % _EVERY_ROWS == 0:
                shown.at(num_rows)

        yield show
