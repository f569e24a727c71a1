"""Excel workbooks: each sheet that holds cells is a table of its own, a cell's text is what Excel shows.

An id with the format 00000 keeps its zeros, a date is written as 2026-03-05. A formula has the value that the program
which saved the workbook computed; where it saved none, the row is a fault.
"""

from __future__ import annotations

import datetime
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from lmtune.data.tables import Row, TableRow, check_no_header, checked_header
from lmtune.data.values import RowFault

_FILLED = re.compile(rb"<(?:\w+:)?(?:v|is)[ >]")
_FORMULA = re.compile(rb"<(?:\w+:)?f[ >/]")
_PIECE_BYTES = 1 << 20
_RELATION = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"
_UNREADABLE = (zipfile.BadZipFile, KeyError, ValueError, OSError, ElementTree.ParseError, TypeError, AttributeError)


def sheets_of(path: Path) -> tuple[list[str], list[str]]:
    """The sheets that hold cells, and those of them that are hidden; none if the file is no workbook."""
    shown: list[str] = []
    hidden: list[str] = []
    try:
        with zipfile.ZipFile(path) as archive:
            for name, part, is_hidden in _sheet_parts(archive):
                if _holds(archive, part, _FILLED):
                    (hidden if is_hidden else shown).append(name)
    except _UNREADABLE:
        return [], []
    return shown, hidden


def sheet_rows(path: Path, sheet: str, said: list[str]) -> Iterator[Row]:
    """The rows of a sheet under its header, by their numbers in the sheet."""
    number = 1
    try:
        import openpyxl

        with zipfile.ZipFile(path) as archive:
            parts = {name: part for name, part, _ in _sheet_parts(archive)}
            if sheet not in parts:
                known = ", ".join(parts)
                yield 1, None, RowFault(f"the workbook has no such sheet; it has {known or 'none'}", ends_file=True)
                return
            has_formulas = _holds(archive, parts[sheet], _FORMULA)
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        written = openpyxl.load_workbook(path, read_only=True) if has_formulas else book
        try:
            for number, row in _rows(book[sheet], written[sheet] if has_formulas else None, said):
                yield number, None, row
        finally:
            book.close()
            written.close()
    except _UNREADABLE as error:
        reason = f"the workbook cannot be read ({' '.join(str(error).split())[:200]}); save it again as .xlsx"
        yield number, None, RowFault(reason, ends_file=True)


def _rows(sheet: Any, written: Any, said: list[str]) -> Iterator[tuple[int, TableRow | RowFault]]:
    header: tuple[str, ...] | None = None
    header_number = 1
    for other in (sheet, written):
        if other is not None:
            other.reset_dimensions()  # which some programs write wrong
    formulas = iter(()) if written is None else written.iter_rows(values_only=True)
    for number, cells in enumerate(sheet.iter_rows(), 1):
        formula = next(formulas, ())
        try:
            texts = [_shown(cell, number) for cell in cells]
            for column, content in enumerate(formula):
                if isinstance(content, str) and content.startswith("=") and texts[column] is None:
                    raise RowFault(
                        f"column {_letter(column)} is a formula without a value; open the workbook and save it"
                    )
            while texts and texts[-1] is None:
                texts.pop()
            if not texts:
                continue
            if header is None:
                header, header_number = checked_header([text or "" for text in texts], said), number
                continue
            check_no_header(texts, header)
            if outside := [_letter(place) for place in range(len(header), len(texts)) if texts[place] is not None]:
                raise RowFault(
                    f"column {outside[0]} has a cell here and no name in the header; name it, or clear the cell"
                )
            yield number, TableRow.of(header, texts, header_number)
        except RowFault as fault:
            yield number, fault
            if fault.ends_file:
                return


def _shown(cell: Any, number: int) -> str | None:
    """What Excel shows in a cell, apart from the language of dates and numbers."""
    value = cell.value
    if value is None or value == "":
        return None
    if cell.data_type == "e":
        raise RowFault(
            f"column {_letter(cell.column - 1)} holds the error {value}; correct the formula or clear the cell"
        )
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, (int, float)):
        return shown_number(value, cell.number_format or "General")
    if isinstance(value, datetime.datetime):
        is_date = not re.search("[hs]", re.sub(r'"[^"]*"|\[[^]]*\]', "", cell.number_format or "").lower())
        return str(value.date()) if is_date and value.time() == datetime.time() else str(value)
    return re.sub(r"_x000D_\n?", "\n", str(value))  # a carriage return, as XML spells it


def shown_number(value: float, format: str) -> str:
    """A number in the format of its cell, where this keeps zeros, decimals or a percentage; else its plain digits."""
    pattern = re.sub(r'"([^"]*)"|\\(.)|\[[^]]*\]|_.', lambda found: found[1] or found[2] or "", format.split(";")[0])
    if re.fullmatch(r"0[0\-/ ()]*0", pattern) and value == int(value) >= 0:
        digits, shown = f"{int(value):0{pattern.count('0')}d}", ""
        extra = len(digits) - pattern.count("0")
        rest = iter(digits[extra:])
        for mark in pattern:
            shown += next(rest) if mark == "0" else mark
        return digits[:extra] + shown
    if found := re.fullmatch(r"(#,##)?0(?:\.(0+))?(%?)", pattern):
        number = value * 100 if found[3] else value
        return f"{number:{',' if found[1] else ''}.{len(found[2] or '')}f}{found[3]}"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return str(int(value))
    return f"{value:.15g}"


def _letter(column: int) -> str:
    from openpyxl.utils import get_column_letter

    return str(get_column_letter(column + 1))


def _sheet_parts(archive: zipfile.ZipFile) -> list[tuple[str, str, bool]]:
    """(name, file in the archive, whether hidden) of each sheet with cells, in the workbook's order."""
    relations = ElementTree.fromstring(archive.read("xl/_rels/workbook.xml.rels"))
    targets = {one.get("Id"): str(one.get("Target")) for one in relations}
    found = []
    for element in ElementTree.fromstring(archive.read("xl/workbook.xml")).iter():
        target = targets.get(element.get(_RELATION))
        if element.tag.rpartition("}")[2] == "sheet" and target is not None:
            part = target.lstrip("/") if target.startswith("/") else f"xl/{target}"
            found.append((str(element.get("name")), part, element.get("state", "visible") != "visible"))
    return found


def _holds(archive: zipfile.ZipFile, part: str, pattern: re.Pattern[bytes]) -> bool:
    """Whether `pattern`, of a few bytes, is in a file of the archive."""
    with archive.open(part) as file:
        rest = b""
        while piece := file.read(_PIECE_BYTES):
            if pattern.search(rest + piece):
                return True
            rest = piece[-20:]
    return False
