"""Rows that a program holds in memory, as a file of rows: lists, DataFrames and Datasets take the way that files take.

    path = rows_file([{"prompt": "…", "completion": "…"}], Path("runs/.rows"))

The file is named by its content, so that equal rows are the same file, and a run over them resumes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable
from uuid import UUID

from lmtune.data.tables import class_name, class_names, without_nulls
from lmtune.errors import DataError
from lmtune.io.atomic import write_text


@runtime_checkable
class Table(Protocol):
    """What a pandas DataFrame has, and a Dataset, which yields its rows itself, has not."""

    def iterrows(self) -> Any:
        """Its rows with their labels."""

    def to_dict(self, orient: Any = ...) -> Any:
        """Its rows, for `orient="records"`."""


Row: TypeAlias = Mapping[str, Any]
# A path, several, or rows: a list of dicts, a pandas DataFrame, a Dataset of `datasets`.
Data: TypeAlias = str | os.PathLike[str] | Iterable[Row] | Iterable[str | os.PathLike[str]] | Table


_SOURCE = {"path", "split", "share"}  # the keys of a source in `data.train`; no row has them alone


def paths_or_rows(data: Data, name: str = "data") -> tuple[str | Row, ...] | list[Row]:
    """`data` as paths or sources if it names files, else as rows; `name` is what the caller calls it.

    Raises:
        DataError: it is neither; says what is expected.
    """
    if isinstance(data, (str, os.PathLike)):
        return (os.fspath(data),)
    if _is_source(data):
        return (dict(data),)  # type: ignore[arg-type]
    if isinstance(data, Mapping):  # a DatasetDict, or columns
        keys = ", ".join(str(key) for key in list(data)[:5])
        raise DataError(
            f"{name}: a mapping with the keys {keys}; expected rows; give one part of it, as {name}['train']"
        )
    if any(part.__module__.startswith("datasets.") for part in type(data).__mro__):
        data = _python_rows(data)
    rows = data.to_dict(orient="records") if isinstance(data, Table) else data
    if not isinstance(rows, Iterable):
        raise DataError(f"{name}: {type(data).__name__}; expected a path, a list of dicts, a DataFrame or a Dataset")
    items: list[Any] = list(rows)
    if items and all(isinstance(item, (str, os.PathLike)) or _is_source(item) for item in items):
        return tuple(dict(item) if _is_source(item) else os.fspath(item) for item in items)
    for index, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise DataError(
                f"{name}[{index}]: {type(item).__name__}; expected a dict such as {{'prompt': …, 'completion': …}}"
            )
    if not items:
        raise DataError(f"{name}: no rows")
    return items


def _is_source(item: object) -> bool:
    return isinstance(item, Mapping) and "path" in item and item.keys() <= _SOURCE


def rows_file(rows: Iterable[Row], folder: Path, name: str = "data") -> Path:
    """Write `rows` as JSONL into `folder`, unless the same rows are there already; row `i` is line `i + 1`.

    Raises:
        DataError: a value has no form in JSON; names the row and the key.
    """
    text = "".join(_lines(rows, name))
    path = folder / f"{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}.jsonl"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return path


def _python_rows(data: Any) -> Any:
    """The rows of a Dataset as dicts of Python values, whatever it is formatted as; of classes the names."""
    from datasets import Dataset, IterableDataset  # whoever has such an object has imported the library

    if isinstance(data, Dataset) and data.format["type"] == "custom":  # a transform stays
        return data
    columns = {} if isinstance(data, IterableDataset) else {"columns": data.format["columns"]}
    names = class_names(data.features.to_dict() if data.features else {}, [])
    return (
        {key: without_nulls(class_name(value, names[key]) if key in names else value) for key, value in row.items()}
        for row in data.with_format(None, **columns)
    )


def _lines(rows: Iterable[Row], name: str) -> Iterator[str]:
    for index, row in enumerate(rows):
        members = []
        for key, value in row.items():
            if _is_missing(value):  # a table has a value for every column: what a row lacks stands there as None or NaN
                continue
            try:
                member = json.dumps(value, ensure_ascii=False, default=_plain)
            except (TypeError, ValueError) as error:
                expected = "expected text, numbers, lists and dicts"
                raise DataError(f"{name}[{index}].{key}: {error}; {expected}") from None
            members.append(f"{json.dumps(str(key), ensure_ascii=False)}: {member}")
        yield "{" + ", ".join(members) + "}\n"


def _is_missing(value: Any) -> bool:
    if type(value).__name__ in ("NaTType", "NAType"):  # pandas' own
        return True
    return value is None or (isinstance(value, float) and math.isnan(value))


def _plain(value: Any) -> Any:
    """NumPy's arrays and scalars as lists and numbers, points in time and exact numbers as text."""
    if isinstance(value, (date, time, timedelta, Decimal, UUID)):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__}")
