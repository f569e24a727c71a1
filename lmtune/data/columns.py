"""Which columns of a file become which keys of a row: those that `data.columns` names, or that can mean one thing only.

    columns = Columns({"Frage": "prompt", "Antwort": "completion"})
    rename = columns.of_file(said)          # one for each file
    rename({"Frage": "…", "Antwort": "…"})  # {"prompt": "…", "completion": "…"}

Where no column is named, a file whose keys make no row, but hold one question and one answer under other names, is read
so. What is renamed is said.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lmtune.data.formats import is_complete, known_keys, question_and_answer
from lmtune.data.tables import TableRow
from lmtune.data.values import RowFault, listed_keys, quoted
from lmtune.errors import ConfigError


class Columns:
    """The columns that are renamed.

    Attributes:
        unseen: of those that are named, the ones that no row has had yet.
    """

    def __init__(self, named: Mapping[str, str] | None = None, needs_rows: bool = True) -> None:
        """
        Args:
            named: key by column.
            needs_rows: a table whose columns make no row is at fault as a whole.

        Raises:
            ConfigError: a key is none that a row has, or two columns become one key.
        """
        self.named = dict(named or {})
        self.unseen = set(self.named)
        self._needs_rows = needs_rows
        known, keys = sorted(known_keys()), list(self.named.values())
        problems = [
            f"data.columns.{column}: {key} is no key of a row{_meant(key, known)}; known are {', '.join(known)}"
            for column, key in self.named.items() if key not in known
        ]  # fmt: skip
        problems += [f"data.columns: two columns become {key}" for key in dict.fromkeys(keys) if keys.count(key) > 1]
        if problems:
            raise ConfigError("\n".join(problems))

    def of_file(self, said: list[str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """What renames the rows of one file; its first row decides what is found out and `said`.

        It raises RowFault where named columns are missing that the row needs, or a table has no columns of a row.
        """
        chosen: dict[str, str] | None = None

        def rename(row: dict[str, Any]) -> dict[str, Any]:
            nonlocal chosen
            names = _names(row)
            self.unseen.difference_update(names)
            if chosen is None:
                chosen = self._chosen(names, isinstance(row, TableRow))
                if chosen:
                    said.append("columns " + ", ".join(f"{column} → {key}" for column, key in chosen.items()))
            if not is_complete({chosen.get(name, name) for name in names}):
                self._refuse(names, isinstance(row, TableRow))
            return _renamed(row, chosen) if chosen else row

        return rename

    def _chosen(self, names: Sequence[str], is_table: bool) -> dict[str, str]:
        """The renaming of a file, by the names in its first row."""
        found = {column: key for column, key in self.named.items() if column in names}
        return found if found or is_complete(names) else question_and_answer(names, is_table)

    def _refuse(self, names: Sequence[str], is_table: bool) -> None:
        """Raise for names that make no row, where more can be said of them than the row's own fault does."""
        missing = [f"{quoted(column)}{_meant(column, names)}" for column in self.named if column not in names]
        if missing:
            reason = f"data.columns names {', '.join(missing)}, and there {'is' if is_table else 'are'} "
            raise RowFault(f"{reason}{listed_keys(names)} alone", once="columns", ends_file=is_table)
        if is_table and self._needs_rows:
            one, other = names if len(names) == 2 else ("COLUMN", "COLUMN")
            settings = shlex.join([f"data.columns.{one}=prompt", f"data.columns.{other}=completion"])
            raise RowFault(
                f"the header names {listed_keys(names)}, which make no row; if these are data, write a header above "
                f"them: prompt,completion; else say what they are: {settings}, or --columns COLUMN=KEY where a command "
                "has it",
                ends_file=True,
            )


def columns_of(words: Iterable[str]) -> dict[str, str]:
    """The keys of columns, from `COLUMN=KEY`.

    Raises:
        ConfigError: a word has another form.
    """
    named = [word.partition("=")[::2] for word in words]
    if not all(column and key for column, key in named):
        raise ConfigError("--columns: expected COLUMN=KEY, for example question=prompt")
    return dict(named)


def _names(row: dict[str, Any]) -> list[str]:
    return [name for name in row.columns if name] if isinstance(row, TableRow) else list(row)


def _renamed(row: dict[str, Any], chosen: Mapping[str, str]) -> dict[str, Any]:
    """`row` under the new names; a key that a column becomes is no longer what it was."""
    taken = set(chosen.values()) - chosen.keys()
    renamed = {chosen.get(name, name): value for name, value in row.items() if name not in taken}
    return row.with_cells(renamed) if isinstance(row, TableRow) else renamed


def _meant(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" (is {quoted(near[0])} meant?)" if near else ""
