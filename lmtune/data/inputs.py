"""Rows to be read by a model, with a label or an answer or without: what `lmtune predict` takes.

    for example, row in read_inputs(files, report): …      # the row as it stands, to be written out again

A row has `text`, `prompt` (and `completion`, for a reward model), `messages` or `conversations`; or it is a pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmtune.data.columns import Columns
from lmtune.data.formats import Format, parse_row
from lmtune.data.readers import read_rows
from lmtune.data.reading import ReadReport
from lmtune.data.sources import DataFile
from lmtune.data.types import Example, RowKind
from lmtune.data.values import RowFault, listed_keys

# by the keys of a row; the first that fits is taken
_FORMATS: tuple[tuple[tuple[str, ...], Format], ...] = (
    (("chosen", "rejected"), "chosen/rejected"), (("text",), "text/label"), (("messages",), "labelled messages"),
    (("conversations",), "labelled messages"),
    (("prompt", "completion"), "prompt/completion"), (("prompt",), "prompt/label"),
)  # fmt: skip
_NOT_READ = ("label", "weight")
_READ_AS = {"conversations": "messages"}


def read_inputs(
    files: Sequence[DataFile], report: ReadReport, columns: Mapping[str, str] | None = None
) -> Iterator[tuple[Example, dict[str, Any]]]:
    """Every usable row, in order, and what it was made of; faults go to `report`. `columns` is `data.columns`."""
    renamed = Columns(columns, needs_rows=False)
    for file in files:
        for line, item, row in read_rows(file, columns=renamed):
            try:
                yield _example(file, line, row), row
            except RowFault as fault:
                report.add_fault(file.place(line, shown=True), f"item {item}: {fault}" if item else str(fault))


def _example(file: DataFile, line: int, row: Any) -> Example:
    if isinstance(row, RowFault):
        raise row
    if not isinstance(row, dict):
        raise RowFault('a row must be an object like {"text": "…"}')
    filled = {key for key, value in row.items() if value is not None}
    format = next((format for keys, format in _FORMATS if filled.issuperset(keys)), None)
    if format is None:
        raise RowFault(f"keys {listed_keys(row)}; expected text, or prompt, or messages, or conversations, or a pair")
    read = {str(_READ_AS.get(key, key)): value for key, value in row.items() if key not in _NOT_READ}
    if "label" in format or format == "labelled messages":
        read["label"] = "unknown"
    parsed = parse_row(read, format)
    kind: RowKind = "pair" if parsed.rejected else "labelled"
    return Example(
        file.portable_name, line, parsed.messages, parsed.text, parsed.rejected, kind=kind, mark=file.mark,
        tools=parsed.tools,
    )  # fmt: skip
