"""Which slice a row is in: by the value of one of its fields, by its length, or by the file that it is from.

names = slice_names("topic", ["heldout.jsonl"], results)         # {"heldout.jsonl:1": "returns", …}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmtune.data.readers import read_rows
from lmtune.data.sources import Given, find_files
from lmtune.data.values import listed_keys
from lmtune.errors import ConfigError, DataError
from lmtune.evaluation.results import RowResult
from lmtune.io.text import is_finite_number

_MOST_NUMBERS = 12  # of more different ones ranges are made
_RANGES = 4
MISSING = "(none)"


def slice_names(by: str, paths: Sequence[Given], results: Sequence[RowResult]) -> dict[str, str]:
    """By location the name of the slice of each row, in the order of the slices.

    Args:
        by: a field of the rows, with dots for one inside another; or `length`, in tokens, or `source`, the file. A
            field of the rows goes before these two.
        paths: of the rows.
        results: the rows that were read.

    Raises:
        ConfigError: no row has the field.
        DataError: several rows have one location.
    """
    fields, sources, keys = _read(by, paths)
    _check(by, fields, keys)
    if any(value is not None for value in fields.values()):
        values = {row.location: fields.get(row.location) for row in results}
        return _named(values)
    if by == "source":
        return dict(sorted(((row.location, sources[row.location]) for row in results), key=lambda one: one[1]))
    if any(row.length for row in results):
        return _ranges({row.location: float(row.length) for row in results}, " tokens")
    characters = {row.location: float(len(row.question) + len(row.reference)) for row in results}
    return _ranges(characters, " characters")  # of answers in a file, which has no tokens


def require_field(by: str | None, paths: Sequence[Given]) -> None:
    """Raise as `slice_names` does, before any model is loaded; None is no field."""
    if by is not None:
        fields, _, keys = _read(by, paths)
        _check(by, fields, keys)


def _check(by: str, fields: Mapping[str, Any], keys: Mapping[str, None]) -> None:
    if by not in ("source", "length") and all(value is None for value in fields.values()):
        raise ConfigError(f"--by {by}: no row has this field; expected length, source, or one of {listed_keys(keys)}")


def _read(by: str, paths: Sequence[Given]) -> tuple[dict[str, Any], dict[str, str], dict[str, None]]:
    """By location the field and the file of each row; and every key."""
    fields: dict[str, Any] = {}
    sources: dict[str, str] = {}
    keys: dict[str, None] = {}
    for file in find_files(paths):
        for line, _, row in read_rows(file):
            location = file.place(line)
            value: Any = row
            for part in by.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if fields.setdefault(location, value) != value:
                raise DataError(f"--by {by}: several rows stand on {location}; write one row a line (JSONL)")
            sources[location] = file.portable_name
            keys.update(dict.fromkeys(row if isinstance(row, dict) else ()))
    return fields, sources, keys


def _named(values: Mapping[str, Any]) -> dict[str, str]:
    known = [value for value in values.values() if value is not None]
    if all(map(is_finite_number, known)) and len(set(known)) > _MOST_NUMBERS:
        numbers = {place: float(value) for place, value in values.items() if value is not None}
        return {**_ranges(numbers), **{place: MISSING for place, value in values.items() if value is None}}
    names = {place: MISSING if value is None else _text(value) for place, value in values.items()}
    return dict(sorted(names.items(), key=lambda one: one[1]))


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _ranges(values: Mapping[str, float], unit: str = "") -> dict[str, str]:
    """Equally many rows a range, as far as equal values allow; named by the least and the greatest in it."""
    numbers = np.array(list(values.values()))
    edges = np.unique(np.quantile(numbers, np.arange(1, _RANGES) / _RANGES))
    place = np.searchsorted(edges, numbers)
    names = {}
    for index in np.unique(place):
        inside = numbers[place == index]
        low, high = (f"{edge:,g}" for edge in (inside.min(), inside.max()))
        names[int(index)] = (low if low == high else f"{low} to {high}") + unit
    order = np.argsort(place, kind="stable")
    locations = list(values)
    return {locations[int(index)]: names[int(place[index])] for index in order}
