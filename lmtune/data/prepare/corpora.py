"""Which files `prepare` is given, and as what each is read.

prepare rows.csv                     rows, as training reads them
prepare chat.txt  result.json  export/   a chat as a program exports it
prepare Posts.xml  RC_2024.zst  cornell/ posts that answer each other, as they are published
prepare book.txt                     plain text, a row for each paragraph or line
prepare rt.pos=positive rt.neg=negative  labelled lines
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lmtune.data.columns import Columns, columns_of
from lmtune.data.encodings import Detected, reads_as_western
from lmtune.data.prepare import chats, published
from lmtune.data.prepare.pairing import Counts, Message, RawRow, conversations, rows_of
from lmtune.data.prepare.settings import Settings
from lmtune.data.prepare.threads import Post, Threads
from lmtune.data.readers import detected, open_text, read_rows
from lmtune.data.sources import DataFile, find_files
from lmtune.data.tables import TableRow, not_utf8, typed
from lmtune.data.values import RowFault, listed_keys, quoted
from lmtune.errors import ConfigError, DataError

_MOST_BYTES = 1 << 30  # of an export that is one JSON document, which is read whole
_LOOKED_AT = 20  # rows, to see what a file holds
_TEXTS = (".txt", ".text", ".log", ".xml")


@dataclass
class Source:
    """Files that are read together.

    Attributes:
        read_as: what they are taken for.
        notes: what was found out and left out, filled while `rows` is read.
    """

    files: Sequence[DataFile]
    read_as: str
    rows: Iterator[RawRow]
    notes: list[str] = field(default_factory=list)


class Sources:
    """What `paths` (files or folders) hold; `folder` takes databases, which this process alone uses."""

    def __init__(self, paths: Sequence[str], settings: Settings, folder: Path) -> None:
        self._settings, self._folder = settings, folder
        self._columns = Columns(columns_of(settings.columns), needs_rows=False)
        self._posts: dict[str, list[tuple[DataFile, Iterator[Post]]]] = {}
        self._skipped = chats.Skipped()
        self._faults: list[RawRow] = []  # records that cannot be read
        self._paths = paths

    def __iter__(self) -> Iterator[Source]:
        """Every source in order; those of posts last, since posts of several files answer each other.

        Raises:
            DataError: a path cannot be read.
        """
        for given in self._paths:
            path, label = _labelled(given)
            if label is not None:
                (file,) = find_files([path])
                yield self._text(file, label)
            elif os.path.isdir(path):
                yield from self._in_folder(Path(path), path)
            else:
                for file in find_files([path]):
                    yield from self._of_file(file)
        for number, (name, some) in enumerate(self._posts.items()):
            source = Source([file for file, _ in some], f"posts of {name}", iter(()))
            source.rows = self._threads(number, [posts for _, posts in some], source.notes)
            yield source
        if self._columns.unseen:
            raise ConfigError(f"--columns: no row has {listed_keys(sorted(self._columns.unseen))}; remove it")

    def _in_folder(self, path: Path, given: str) -> Iterator[Source]:
        names = sorted(os.listdir(path))
        if set(published.CORNELL) <= set(names):
            yield from self._cornell(path)
        elif "users.json" in names and (logs := sorted(path.glob("*/*.json"))):
            yield self._slack(path, find_files([str(log) for log in logs]))
        else:
            texts = [str(path / name) for name in names if name.lower().endswith(_TEXTS)]
            others = not texts or any(not name.lower().endswith(_TEXTS) for name in names)
            for file in chain(find_files(texts) if texts else (), find_files([given]) if others else ()):
                yield from self._of_file(file)

    def _of_file(self, file: DataFile) -> Iterator[Source]:
        """One file, or nothing if it holds posts, which come later."""
        name = file.path.name
        if name in published.CORNELL and all((file.path.parent / other).is_file() for other in published.CORNELL):
            yield from self._cornell(file.path.parent)
        elif file.kind == "json" and published.is_stack_exchange(file.path):
            posts = published.stack_exchange_posts(file.path, file.portable_name, self._skipped)
            self._posts.setdefault("Stack Exchange", []).append((file, posts))
        elif file.kind == "json" and not name.lower().endswith((".json", ".jsonl", ".ndjson", ".gz", ".zst")):
            yield self._text(file, None)
        elif (document := _document(file)) is not None:
            yield self._document(file, document)
        else:
            yield from self._rows(file)

    # --- posts

    def _cornell(self, folder: Path) -> Iterator[Source]:
        files = find_files([str(folder / name) for name in published.CORNELL])
        name = "Cornell movie dialogues"
        if name not in self._posts:
            posts = published.cornell_posts(folder, files[0].portable_name, self._skipped)
            self._posts[name] = [(files[0], posts), (files[1], iter(()))]
        yield from ()

    def _threads(self, number: int, posts: Sequence[Iterator[Post]], notes: list[str]) -> Iterator[RawRow]:
        threads = Threads(self._folder / f"posts{number}.db", chain.from_iterable(posts))
        try:
            yield from threads.rows(self._settings, notes)
            yield from self._taken_faults()
            notes += self._skipped.describe()
            self._skipped.counts.clear()  # another corpus counts its own
        finally:
            threads.close()

    def _record_posts(self, records: Iterable[tuple[str, Any]], export: chats.Export) -> Iterator[Post]:
        for place, record in records:
            if self._is_faulty(place, record):
                continue
            message = chats.record_message(place, record, export, self._skipped)
            if message is not None and message.text:
                parent, score, id = export.parent(record), export.score(record), export.id(record)
                if id is None:
                    self._faults.append(RawRow(place, RowFault("the post has no id")))
                    continue
                yield Post(str(id), None if parent is None else str(parent), message, _number(score))

    def _is_faulty(self, place: str, record: Any) -> bool:
        """Whether a record cannot be read; it comes behind the rows, as one of them.

        Raises:
            DataError: nor can what follows.
        """
        if isinstance(record, dict):
            return False
        fault = record if isinstance(record, RowFault) else RowFault("a record must be an object")
        if fault.ends_file:
            raise DataError(f"{place}: {fault}")
        self._faults.append(RawRow(place, fault))
        return True

    def _taken_faults(self) -> list[RawRow]:
        """The faults since the last call."""
        taken, self._faults = self._faults, []
        return taken

    # --- chats

    def _chat(self, messages: Iterator[Message], source: Source, skipped: chats.Skipped) -> Iterator[RawRow]:
        """The rows of messages in their order."""
        counts, name = Counts(), source.files[0].portable_name
        for said in conversations(messages, self._settings):
            yield from rows_of(said, self._settings, f"{name} {said[0].place}", counts)
        yield from self._taken_faults()
        if (wanted := self._settings.assistant) is not None and wanted not in counts.authors:
            others = ", ".join(sorted(counts.authors)[:10])
            raise ConfigError(f"--assistant: {wanted}: nobody of this name in {name}; there are {others}")
        source.notes += [*skipped.describe(), *counts.describe()]

    def _records(
        self, records: Iterable[tuple[str, Any, str]], read_as: str, files: Sequence[DataFile],
        needed: chats.Export | None = None,
    ) -> Source:  # fmt: skip
        """The records (place, record, conversation) of an export; they are held in memory, to be put in order.

        `needed` is the form that each must have; None where records of another form are what a program says.
        """
        source, skipped = Source(files, read_as, iter(())), chats.Skipped()

        def messages() -> Iterator[Message]:
            found: dict[str, list[Message]] = {}
            for place, record, conversation in records:
                if self._is_faulty(place, record):
                    continue
                export = chats.export_of(record)
                message = chats.record_message(place, record, export, skipped) if export else None
                if export is None and needed is not None:
                    missing = sorted(needed.keys - record.keys())
                    fault = RowFault(f"the message has no {' and no '.join(missing)}, as others of this chat have")
                    self._faults.append(RawRow(place, fault))
                elif export is None:
                    skipped.add(chats.NOTICES)
                if message is not None:
                    found.setdefault(f"{conversation}\0{message.conversation}", []).append(message)
            for name, some in found.items():
                if all(message.time is not None for message in some):
                    some.sort(key=lambda message: message.time or 0.0)
                yield from (Message(one.place, one.author, one.text, one.time, name) for one in some)

        source.rows = self._chat(messages(), source, skipped)
        return source

    def _document(self, file: DataFile, document: dict[str, Any]) -> Source:
        """An export that is one JSON document: a list of messages, or of chats with such lists."""
        found = list(_message_lists(document))
        records = [
            (f"{file.portable_name}:{chat if len(found) > 1 else ''}message {number}", record, str(conversation))
            for conversation, (chat, messages) in enumerate(found) for number, record in enumerate(messages, start=1)
        ]  # fmt: skip
        known = next(export.name for _, record, _ in records if (export := chats.export_of(record)))
        return self._records(records, f"chat ({known})", [file])

    def _slack(self, folder: Path, logs: Sequence[DataFile]) -> Source:
        """A folder for each channel, a file for each day."""
        names = {
            str(user.get("id")): str(user.get("real_name") or user.get("name"))
            for user in json.loads((folder / "users.json").read_text(encoding="utf-8")) if isinstance(user, dict)
        }  # fmt: skip

        def records() -> Iterator[tuple[str, Any, str]]:
            for log in logs:
                for number, item, record in read_rows(log):
                    if isinstance(record, dict) and isinstance(record.get("text"), str):
                        text = chats.with_names(record["text"], names)
                        record = {
                            **record,
                            "text": text,
                            "user": names.get(str(record.get("user")), record.get("user")),
                        }
                    yield _place(log, number, item), record, log.path.parent.name

        return self._records(records(), "chat (Slack)", logs)

    # --- text

    def _text(self, file: DataFile, label: str | None) -> Source:
        """A chat, or plain text: labelled lines, or paragraphs."""
        source = Source([file], "lines, labelled" if label is not None else "text", iter(()))
        if label is not None:
            lines = ((number, line.strip()) for number, line in enumerate(_lines(file, source.notes), start=1))
            source.rows = (RawRow(file.place(n), {"text": line, "label": label}) for n, line in lines if line)
            return source
        head = chats.chat_head(islice(_lines(file, []), 200))
        if head is not None:
            source.read_as, skipped = "chat", chats.Skipped()
            month_first = chats.has_month_first(_lines(file, []), head)
            lines_again = _lines(file, source.notes)
            messages = chats.text_messages(lines_again, file.portable_name, head, month_first, skipped)
            source.rows = self._chat(messages, source, skipped)
            return source
        paragraphs = any(not line.strip() for line in islice(_lines(file, []), 1000))
        source.read_as = "text, a row for each paragraph" if paragraphs else "text, a row for each line"
        pieces = _paragraphs(_lines(file, source.notes), paragraphs)
        source.rows = (RawRow(file.place(number), {"text": text}) for number, text in pieces)
        return source

    # --- rows

    def _rows(self, file: DataFile) -> Iterator[Source]:
        """Rows, or records of an export in a table."""
        rows = read_rows(file, notes := list[str]())
        first = list(islice(rows, _LOOKED_AT))
        found = [chats.export_of(row) for _, _, row in first if isinstance(row, dict)]
        known = [one for one in found if one is not None]
        export = known[0] if known and (len(known) == len(found) or _is_mostly(known, found)) else None
        every = ((_place(file, number, item), row) for number, item, row in chain(first, rows))
        if export is not None and export.has_threads:
            self._posts.setdefault(export.name, []).append((file, self._mixed_posts(every, export)))
        elif export is not None:
            lacking = None if export.is_of_program else export
            yield self._records(((place, row, "") for place, row in every), f"chat ({export.name})", [file], lacking)
        else:
            rename = self._columns.of_file(notes)
            yield Source([file], "rows", (RawRow(place, _renamed(row, rename)) for place, row in every), notes)

    def _mixed_posts(self, records: Iterable[tuple[str, Any]], usual: chats.Export) -> Iterator[Post]:
        """Posts of a file in which questions and answers may have other keys."""
        for place, record in records:
            yield from self._record_posts([(place, record)], chats.export_of(record) or usual)


def _is_mostly(known: Sequence[chats.Export], found: Sequence[object]) -> bool:
    """Whether a file is a chat though not every record is a message of it."""
    return not known[0].is_of_program and len(known) * 2 > len(found)


def _renamed(row: Any, rename: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """The row under its columns' new names, or the fault in them."""
    try:
        row = rename(row) if isinstance(row, dict) else row
        return typed(row) if isinstance(row, TableRow) else row
    except RowFault as fault:
        return fault


def _place(file: DataFile, number: int, item: int | None) -> str:
    return file.place(number) + (f" (item {item})" if item else "")


def _labelled(given: str) -> tuple[str, str | None]:
    """`FILE=LABEL` as file and label."""
    path, sign, label = given.rpartition("=")
    if sign and not os.path.exists(os.path.expanduser(given)) and os.path.isfile(os.path.expanduser(path)):
        if not label:
            raise ConfigError(f"{given}: no label after =; write FILE=LABEL")
        return path, label
    return given, None


def _lines(file: DataFile, said: list[str]) -> Iterator[str]:
    """The lines of a text, in whatever encoding; single lines in another one are read as Windows-1252.

    Raises:
        DataError: the file is not UTF-8, or a line reads badly as Windows-1252.
    """
    damaged, found = 0, Detected()
    with open_text(file.path, said) as text:
        for number, raw in enumerate(text):
            try:
                yield (raw.removeprefix(b"\xef\xbb\xbf") if number == 0 else raw).decode()
            except UnicodeDecodeError as error:
                damaged += 1
                found = detected(file.path) if damaged == 1 else found
                if not (found.damaged and reads_as_western(raw)):
                    fault = not_utf8(error, found.advice(file.path.name))
                    raise DataError(f"{file.place(number + 1, shown=True)}: {fault}") from None
                yield raw.decode("cp1252", "replace")
    if damaged:
        said.append(f"{damaged:,} of the lines are not UTF-8 and are read as Windows-1252")


def _paragraphs(lines: Iterable[str], paragraphs: bool) -> Iterator[tuple[int, str]]:
    """(number of the first line, text) of each paragraph, or of each line."""
    begin, current = 0, list[str]()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            begin = begin or number
            current.append(line.rstrip("\r\n"))
        if current and (not paragraphs or not line.strip()):
            yield begin, "\n".join(current)
            begin, current = 0, []
    if current:
        yield begin, "\n".join(current)


def _document(file: DataFile) -> dict[str, Any] | None:
    """The object that fills a JSON file, if it holds chats; None for a file of rows."""
    if file.kind != "json" or file.path.suffix.lower() != ".json" or file.path.stat().st_size > _MOST_BYTES:
        return None
    with open_text(file.path, [], detects=False) as text:
        first = text.readline()
        if not first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
            return None
        rest = text.peek(1).strip()
        if rest and _parsed(first) is not None:
            return None  # one row a line
        tree = _parsed(first + text.read())
    is_chat = tree is not None and any(chats.export_of(one) for _, some in _message_lists(tree) for one in some)
    return tree if is_chat else None


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        tree = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None


def _message_lists(tree: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """(its chat, as a part of a place; the list) for each `messages` of a document, or of the chats in it."""
    for key, value in tree.items():
        if key == "messages" and isinstance(value, list):
            yield f"chat {quoted(str(tree.get('name') or tree.get('id') or 'without a name'))}, ", value
        elif isinstance(value, dict):
            yield from _message_lists(value)
        elif isinstance(value, list) and key != "messages":
            for item in value:
                if isinstance(item, dict):
                    yield from _message_lists(item)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0
