"""Data files checked before anything heavy is loaded: every bad line, and what is worth knowing of the good ones.

Needs neither torch nor a tokenizer. The result for files without fault is kept in the cache under the hash of their
content, so that checking the same files again costs reading their bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lmtune.config.schema import FinetuneConfig, RowKind, sources_of
from lmtune.data.readers import content_hash
from lmtune.data.reading import FaultyChoice, ReadReport, read_examples
from lmtune.data.report import ContentReport, DuplicateIndex, RowCounter, describe_files, describe_shared, typed
from lmtune.data.sources import Given, find_files, unread_entries
from lmtune.errors import DataError
from lmtune.io.atomic import cache_folder, get_or_build, key_of
from lmtune.io.console import row_progress
from lmtune.io.text import format_list, pluralize

_VERSION = 7
_KEPT = 100  # results, of a few KB
_Paths = Sequence[Given]
_Columns = Mapping[str, str] | None
# What rows with the same prompt differ in.
_OTHER: dict[RowKind, str] = {"answer": "answer", "pair": "pair", "judged": "answer", "labelled": "label"}


@dataclass(kw_only=True)
class PartCheck(ContentReport):
    """What one part of the data, training or validation, holds; `characters` are of a row."""

    num_rows: int
    rows_by_file: dict[str, int]
    characters: dict[str, int]


@dataclass(frozen=True)
class DataCheck:
    """The outcome of a check.

    Attributes:
        train, validation: the parts; `validation` is None if no such files were given.
        also_in_train: rows of validation that stand in train too.
        report: faults; without any, the data is good.
    """

    train: PartCheck
    validation: PartCheck | None
    also_in_train: RowCounter
    report: ReadReport = field(default_factory=ReadReport)

    def raise_for_faults(self, faulty_rows: FaultyChoice | None) -> None:
        """Raise a `DataError` for the faults that stop the work; see `ReadReport.raise_for_faults`."""
        num_usable = min(self.train.num_rows, self.validation.num_rows if self.validation else self.train.num_rows)
        self.report.raise_for_faults(faulty_rows, num_usable)


def check_config(config: FinetuneConfig) -> DataCheck:
    """`check_data` of the files that a config names, as it says, for its objective."""
    data = config.data
    return check_data(
        sources_of(data.train), sources_of(data.validation or ()), data.faulty_rows, config.objective.rows, data.columns
    )


def check_data(
    paths: _Paths, validation: _Paths = (), faulty_rows: FaultyChoice | None = None, rows: RowKind | None = None,
    columns: _Columns = None,
) -> DataCheck:  # fmt: skip
    """Check files (or folders) of training rows, and of validation rows if given, against each other.

    `rows` is the kind that they must be of; None where nothing says what they are for. `columns` is `data.columns`.

    Raises:
        DataError: with the first 20 faults and their number, or with the paths that cannot be read.
    """
    found: list[DataCheck] = []

    def build(folder: Path) -> None:
        check = inspect_data(paths, validation, rows, columns)
        check.raise_for_faults(faulty_rows)
        found.append(check)
        (folder / "check.json").write_text(json.dumps(check_tree(check)), encoding="utf-8")

    hashes = [
        [[file.portable_name, content_hash(file)] for file in find_files(part, split)]
        for part, split in ((paths, "train"), (validation, "validation"))
        if part
    ]
    unread = [*unread_entries(paths), *unread_entries(validation)]
    key = key_of("check", _VERSION, hashes, unread, faulty_rows == "skip", rows, columns)
    entry = get_or_build(cache_folder() / "checks", key, build, keep=_KEPT)
    return found[0] if found else typed(DataCheck, json.loads((entry / "check.json").read_text(encoding="utf-8")))


def inspect_data(
    paths: _Paths, validation: _Paths = (), rows: RowKind | None = None, columns: _Columns = None
) -> DataCheck:
    """As `check_data`, but faults of rows are left in the result's `report`, all of them, and nothing is cached.

    Raises:
        DataError: a path cannot be read at all.
    """
    report = ReadReport()
    train, train_rows = _inspect_part(paths, "train", report, rows, columns)
    if not validation:
        return DataCheck(train, None, RowCounter(), report)
    held_out, held_out_rows = _inspect_part(validation, "validation", report, rows, columns)
    return DataCheck(train, held_out, held_out_rows.shared_with(train_rows), report)


def checked_data(paths: _Paths, columns: _Columns = None) -> DataCheck:
    """The rows of files without a fault, whatever they are for.

    Raises:
        DataError: with the first 20 faults.
    """
    check = inspect_data(paths, columns=columns)
    if faults := check.report.faults:
        raise DataError(f"the data has faults; fix these lines first:\n{format_list(faults)}")
    return check


def _inspect_part(
    paths: _Paths, split: str, report: ReadReport, rows: RowKind | None, columns: _Columns
) -> tuple[PartCheck, DuplicateIndex]:
    part, index = ReadReport(), DuplicateIndex()
    found = ContentReport()
    with row_progress("checking") as progress:
        for example in found.without_zero_weights(
            read_examples(find_files(paths, split), part, rows, columns, split == "train")
        ):
            index.add(example)
            found.add(example)
            progress(len(index))
    report.include(part)
    check = PartCheck(
        num_rows=len(index) + found.zero_weight.count,
        kind=found.kind,
        labels=found.labels,
        zero_weight=found.zero_weight,
        total_weight=found.total_weight,
        turns=found.turns,
        formats=part.formats,
        read_as=part.read_as,
        rows_by_file={file.name: file.num_rows for file in part.files},
        duplicates=index.duplicates(),
        same_prompt=index.same_prompt(),
        characters=index.characters(),
        warnings=[*part.warnings, *unread_entries(paths)],
        faulty=part.faulty,
    )
    return check, index


def check_tree(check: DataCheck) -> dict[str, Any]:
    """The outcome as `lmtune check --json` gives it: num_faults, faults, train, validation, also_in_train."""
    tree = {name: value for name, value in asdict(check).items() if name != "report"}
    return {"num_faults": check.report.num_faults, "faults": check.report.faults, **tree}


def describe_check(check: DataCheck, skips: bool = False) -> str:
    """Rows, formats, lengths and warnings, in a few lines; with `skips`, also the faulty rows that are left out."""
    lines = _describe_part(check.train, skips)
    if check.validation is not None:
        lines += ["validation:", *_describe_part(check.validation, skips), *describe_shared(check.also_in_train)]
    return "\n".join(lines)


def _describe_part(part: PartCheck, skips: bool) -> list[str]:
    lines = describe_files(
        [f"{name}: {pluralize(part.rows_by_file[name])}, {part.format_of(name)}" for name in part.formats]
    )
    lines += part.faulty.describe() if skips else []
    if part.characters:
        lines.append("  characters a row: " + ", ".join(f"{name} {value:,}" for name, value in part.characters.items()))
    lines += [*part.describe_turns(), *part.describe_weights(part.num_rows - part.zero_weight.count)]
    for rows, what in (
        (part.duplicates, "equal to an earlier one, kept"),
        (part.same_prompt, f"with an earlier row's prompt and another {_OTHER[part.kind]}"),
    ):
        if rows.count:
            lines.append(f"  {pluralize(rows.count)} {what}: {rows.examples}")
    return lines + [f"  warning: {warning}" for warning in part.warnings]
