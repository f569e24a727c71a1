"""Tables of text: CSV and TSV, Parquet. A cell is a text as it is written, an empty cell a key that the row lacks.

Excel workbooks are in `workbooks.py`. What a CSV is written with (delimiter, encoding) is found and said.
"""

from __future__ import annotations

import csv
import datetime
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any
from uuid import UUID

from lmtune.data.values import RowFault, listed_keys, quoted

DELIMITERS = {",": '","', ";": '";"', "\t": "tab", "|": '"|"'}
MAX_CELL_CHARACTERS = 32 << 20
_SAMPLE_LINES = 200
_BATCH_ROWS = 1000
# Keys whose cells are JSON: always, or where a list of turns or labels stands there and not a text.
_JSON = ("messages", "conversations", "history", "tools", "preferred_output", "non_preferred_output")
_PERHAPS_JSON = ("prompt", "chosen", "rejected", "completion", "input", "label")
_WITH_TOOLS = (*_JSON, *_PERHAPS_JSON, "functions")
_NULLS = "null in tools and calls left out, as tables write it for keys that a row does not have"
_AS_TEXT = (Decimal, datetime.date, datetime.time, datetime.timedelta, UUID)
_SCALARS = ("label", "weight")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")

Row = tuple[int, int | None, Any]


class TableRow(dict[str, Any]):
    """A row by column.

    Attributes:
        columns: all that the table has, also those that are empty here.
        header: the number of the header row.
    """

    columns: tuple[str, ...] = ()
    header: int = 1

    @classmethod
    def of(cls, columns: tuple[str, ...], cells: Iterable[Any], header: int = 1) -> TableRow:
        """The cells that are filled and have a column of a name."""
        row = cls((name, cell) for name, cell in zip(columns, cells, strict=False) if name and cell not in (None, ""))
        row.columns, row.header = columns, header
        return row

    def with_cells(self, cells: Mapping[str, Any]) -> TableRow:
        """Another row of the same table."""
        row = TableRow(cells)
        row.columns, row.header = self.columns, self.header
        return row


def typed(row: TableRow) -> TableRow:
    """`row` with JSON where a key holds lists, and numbers and truths as labels and weights.

    Raises:
        RowFault: what must be JSON is none.
    """
    for name in (*_JSON, *_PERHAPS_JSON):
        text = row.get(name)
        if not isinstance(text, str) or not text.lstrip().startswith(("[", "{")):
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            if name in _PERHAPS_JSON:
                continue
            raise RowFault(
                f"{name} is no JSON ({error}); write the list with json.dumps, not as Python prints it"
            ) from None
        if name in _JSON or _is_listed(value):
            row[name] = value
    for name in _SCALARS:
        text = row.get(name)
        if isinstance(text, str) and text.lower() in ("true", "false"):
            row[name] = text.lower() == "true"
        elif isinstance(text, str) and _NUMBER.fullmatch(text):
            row[name] = json.loads(text)
    return row


def _is_listed(value: Any) -> bool:
    """Turns, OpenAI's `input` of a pair, or several labels."""
    if isinstance(value, dict):
        return "messages" in value
    if not isinstance(value, list) or not value:
        return False
    turn = all(isinstance(item, dict) and item.keys() & {"role", "from"} for item in value)
    return turn or all(isinstance(item, str) for item in value)


def checked_header(cells: Iterable[str], said: list[str]) -> tuple[str, ...]:
    """The columns' names; a column without one is not read, which is said.

    Raises:
        RowFault: a name stands twice, or there is none.
    """
    names = tuple(cell.strip() for cell in cells)
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise RowFault(
            f"the header names {listed_keys(twice)} twice; give each column a name of its own", ends_file=True
        )
    if not any(names):
        raise RowFault("the header row is empty; write the names of the columns into the first row", ends_file=True)
    if unnamed := names.count(""):
        said.append(f"{unnamed} column{'s' * (unnamed > 1)} without a name not read")
    return names


def check_no_header(cells: Iterable[str | None], header: tuple[str, ...]) -> None:
    """Raise a RowFault for a row that is the header again, as in files that were joined."""
    found = [(cell or "").replace("\ufeff", "").strip().casefold() for cell in cells]
    names = [name.casefold() for name in header]
    if found == names:
        raise RowFault("the header stands here again; remove this row")
    if sorted(found) == sorted(names):
        raise RowFault(
            "here the header stands again, in another order; put the rows from here on into a file of their own",
            ends_file=True,
        )


# --- CSV


def csv_rows(file: IO[bytes], said: list[str], advice: str = "") -> Iterator[Row]:
    """The rows of a CSV in UTF-8, each with the line where it begins; `advice` says what to do where it is not."""
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    lines = _Lines(file, advice)
    sample = list(islice(lines, _SAMPLE_LINES))
    first, delimiter = 0, None
    if sample and (given := re.fullmatch(r"sep=(.)\r?\n", sample[0])):  # Excel's own way to name it
        first, delimiter = 1, given[1]
    delimiter = delimiter or _delimiter(sample)
    said.append(f"delimiter {DELIMITERS.get(delimiter, quoted(delimiter))}")
    reader = csv.reader(chain(sample[first:], lines), delimiter=delimiter, strict=True)
    header: tuple[str, ...] | None = None
    header_line, begin = 1, first
    while True:
        line, begin = begin + 1, 0
        try:
            cells = next(reader, None)
            begin = first + reader.line_num
            damaged = lines.damaged(line, begin)
            if cells is None:
                return
            if damaged is not None:
                raise damaged
            if not any(cells):
                continue
            if header is None:
                header, header_line = checked_header(cells, said), line
            else:
                yield line, None, _checked(cells, header, header_line)
        except csv.Error as error:
            yield line, None, RowFault(_csv_advice(str(error)), ends_file=True)
            return
        except RowFault as fault:
            yield line, None, fault
            if fault.ends_file:
                return


class _Lines:
    """The lines of a file as text; those that are not UTF-8 are noted, and read with what can be read of them."""

    def __init__(self, file: IO[bytes], advice: str) -> None:
        self._file, self._number, self._advice = file, 0, advice
        self._damaged: dict[int, RowFault] = {}

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self._file.readline(MAX_CELL_CHARACTERS)
        if not raw:
            raise StopIteration
        self._number += 1
        raw = raw.removeprefix(b"\xef\xbb\xbf")  # also on a later line, where files were joined
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self._damaged[self._number] = not_utf8(error, self._advice)
            return raw.decode(errors="replace")

    def damaged(self, first: int, last: int) -> RowFault | None:
        """What is wrong with the encoding of these lines."""
        found = [self._damaged.pop(line) for line in list(self._damaged) if first <= line <= last]
        return found[0] if found else None


def not_utf8(error: UnicodeDecodeError, advice: str, ends_file: bool = False) -> RowFault:
    """Told once: a whole file is in another encoding more often than single lines are damaged."""
    return RowFault(
        f"byte {error.start + 1} (0x{error.object[error.start]:02x}) is not UTF-8; save the file as UTF-8: {advice}",
        once="encoding",
        ends_file=ends_file,
    )


def _checked(cells: list[str], header: tuple[str, ...], header_line: int) -> TableRow:
    if len(cells) != len(header):
        raise RowFault(
            f"{len(cells)} cells, but the header names {len(header)} columns; a cell that holds the delimiter or a "
            'line end stands in quotation marks: "…"'
        )
    if any(cell.endswith(f"\ufeff{header[0]}") for cell in cells):
        raise RowFault("the first row of another file follows without a line end; put a line end between the files")
    check_no_header(cells, header)
    return TableRow.of(header, cells, header_line)


def _csv_advice(error: str) -> str:
    if "unexpected end" in error or "field larger" in error:
        return 'a cell that begins here with a quotation mark does not end; close it, and double the marks inside: ""'
    if "new-line" in error:
        return "lines end in \\r alone; save the file with \\n"
    return f'not CSV ({error}); double the quotation marks inside a cell: ""'


def _delimiter(sample: Sequence[str]) -> str:
    """What parts the header, and the rows behind it, into the same number of cells."""
    best, found = (0.0, 0), ","
    for delimiter in DELIMITERS:
        rows = []
        try:
            rows += [row for row in csv.reader(sample, delimiter=delimiter) if row]
        except csv.Error:
            continue
        width = len(rows[0]) if rows else 0
        alike = sum(len(row) == width for row in rows) / max(1, len(rows))
        if width > 1 and (alike, width) > best:
            best, found = (alike, width), delimiter
    return found


# --- Parquet


def parquet_rows(path: Path, said: list[str]) -> Iterator[Row]:
    """The rows of a Parquet file, counted from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as table:
            names = class_names(_features(table.schema_arrow.metadata), said)
            for batch in table.iter_batches(_BATCH_ROWS):
                for row in arrow_rows(batch, said, names):
                    number += 1
                    yield number, None, row
    except (pa.ArrowException, OSError) as error:
        reason = f"the file cannot be read ({' '.join(str(error).split())[:200]}); write it again"
        yield number + 1, None, RowFault(reason, ends_file=True)


def arrow_rows(batch: Any, said: list[str], classes: Mapping[str, Sequence[str]] | None = None) -> Iterator[TableRow]:
    """The rows of an Arrow batch; of a column in `classes` the names of its numbers.

    An object in such a table has every key that some other row has, as null. These keys are left out again. In a tool
    or a call a null may be meant, so there it is said.
    """
    import pyarrow as pa

    names = tuple(batch.schema.names)
    columns = []
    for column in batch.columns:
        kind = column.type
        if pa.types.is_timestamp(kind) and kind.unit == "ns":  # Python's own times end at microseconds
            column = column.cast(pa.timestamp("us", kind.tz), safe=False)
        elif pa.types.is_float16(kind) or pa.types.is_float32(kind):  # 0.1 is not 0.10000000149011612
            column = pa.array([None if one is None else float(str(one)) for one in column.to_numpy(False)])
            columns.append([None if one != one else one for one in column.to_pylist()])
            continue
        columns.append(column.to_pylist())
    named = [(classes or {}).get(name) for name in names]
    for cells in zip(*columns, strict=True):
        yield TableRow.of(
            names,
            (
                cell_text(cell if of is None else class_name(cell, of), said, name in _WITH_TOOLS)
                for name, cell, of in zip(names, cells, named, strict=True)
            ),
        )


def class_names(features: Mapping[str, Any], said: list[str]) -> dict[str, Sequence[str]]:
    """By column the names of classes that are stored as numbers, from the `features` of the `datasets` library."""
    found: dict[str, Sequence[str]] = {}
    for column, feature in features.items():
        one = feature.get("feature", feature) if isinstance(feature, Mapping) else feature
        one = feature[0] if isinstance(feature, list) and feature else one
        names = one.get("names") if isinstance(one, Mapping) and one.get("_type") == "ClassLabel" else None
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            found[column] = names
            said.append(f"{column} by the names of its classes: {listed_keys(names)}")
    return found


def _features(metadata: Mapping[bytes, bytes] | None) -> Mapping[str, Any]:
    """What the `datasets` library notes in a Parquet file."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def class_name(value: Any, names: Sequence[str]) -> Any:
    """The name of a class by its number, or of several; a number that names none (-1: not known) is no label."""
    if isinstance(value, list):
        return [class_name(one, names) for one in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def cell_text(value: Any, said: list[str] | None = None, with_tools: bool = False) -> Any:
    """A cell's text; lists and objects stay what they are, without the keys that a table adds to objects as null.

    `said` takes that such a key was in a tool or call, which a column `with_tools` may hold.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value != value:
        return None  # what pandas writes for an empty cell
    if isinstance(value, bytes):
        return _decoded(value)
    if isinstance(value, (int, float, *_AS_TEXT)):
        return str(value)
    if with_tools and said is not None and _NULLS not in said and _holds_null(value):
        said.append(_NULLS)
    return without_nulls(value)


def _holds_null(value: Any, inside: bool = False) -> bool:
    """Whether a key of a tool's parameters or of a call's arguments is null."""
    if isinstance(value, dict):
        return any(
            (item is None and inside) or _holds_null(item, inside or key in ("arguments", "parameters"))
            for key, item in value.items()
        )
    return isinstance(value, (list, tuple)) and any(_holds_null(item, inside) for item in value)


def without_nulls(value: Any) -> Any:
    """`value` without the keys of its objects that are null; dates and exact numbers in it as text."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(item) for item in value]
    return cell_text(value) if isinstance(value, (*_AS_TEXT, bytes)) else value


def _decoded(value: bytes) -> Any:
    """Spark writes texts as bytes."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value
