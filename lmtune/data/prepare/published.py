"""Corpora as they are published: Cornell's movie dialogues, and the posts of Stack Exchange."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.parsers import expat

from lmtune.data.prepare.chats import NO_TEXT, Skipped
from lmtune.data.prepare.pairing import Message
from lmtune.data.prepare.texts import html_to_text
from lmtune.data.prepare.threads import Post
from lmtune.errors import DataError

# --- Cornell movie dialogues (Danescu-Niculescu-Mizil and Lee, 2011) -------------------------------------------------

CORNELL = ("movie_lines.txt", "movie_conversations.txt")
_FIELD = " +++$+++ "


def cornell_posts(folder: Path, name: str, skipped: Skipped) -> Iterator[Post]:
    """Every line of a film, which answers the one before it in its conversation."""
    parents: dict[str, tuple[str | None, str]] = {}
    for line in _latin_lines(folder / CORNELL[1]):
        ids = re.findall(r"'(L\d+)'", line.rpartition(_FIELD)[2])
        if line and not ids:
            skipped.add(f"conversations without the ids of their lines, in {CORNELL[1]}")
        for before, id in zip([None, *ids], ids, strict=False):
            parents[id] = before, ids[0]
    for number, line in enumerate(_latin_lines(folder / CORNELL[0]), start=1):
        fields = line.split(_FIELD)
        if len(fields) != 5:
            if line:
                skipped.add(f"lines without five fields, in {CORNELL[0]}")
        elif not fields[4].strip():
            skipped.add(NO_TEXT)
        elif fields[0] not in parents:
            skipped.add(f"lines of no conversation, in {CORNELL[0]}")
        else:
            parent, first = parents[fields[0]]
            yield Post(fields[0], parent, Message(f"{name}:{number}", fields[1], fields[4].strip(), None, first))


def _latin_lines(path: Path) -> Iterator[str]:
    with open(path, encoding="cp1252", errors="replace", newline="\n") as file:
        for line in file:
            yield line.rstrip("\r\n")


# --- Stack Exchange --------------------------------------------------------------------------------------------------


def is_stack_exchange(path: Path) -> bool:
    """Whether a file is a `Posts.xml`."""
    with open(path, "rb") as file:
        head = file.read(4096)
    return b"<posts" in head and b"<row " in head


def stack_exchange_posts(path: Path, name: str, skipped: Skipped) -> Iterator[Post]:
    """Questions with their titles, and answers, of which the accepted one counts most. Texts are HTML there."""
    for number, row in _xml_rows(path):
        text, id, place = html_to_text(row.get("Body", "")), str(row.get("Id")), f"{name}:{number}"
        score = float(row.get("Score") or 0)
        if row.get("PostTypeId") == "1":
            asked = f"{row.get('Title', '').strip()}\n\n{text}".strip()
            yield Post(id, None, Message(place, "question", asked, None, id), score, row.get("AcceptedAnswerId"))
        elif row.get("PostTypeId") != "2":
            skipped.add("neither a question nor an answer (wikis, notices)")
        elif not text:
            skipped.add(NO_TEXT)
        else:
            question = str(row.get("ParentId"))
            yield Post(id, question, Message(place, "answer", text, None, question), score)


def _xml_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, attributes) of each `row` element, in bounded memory."""
    parser = expat.ParserCreate()
    rows: list[tuple[int, dict[str, str]]] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        if name == "row":
            rows.append((parser.CurrentLineNumber, attributes))

    def refuse(*_: Any) -> None:
        raise DataError(f"{path.name}:{parser.CurrentLineNumber}: declares entities, which no dump of posts does")

    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = refuse
    with open(path, "rb") as file:
        while True:
            piece = file.read(1 << 20)
            try:
                parser.Parse(piece, not piece)
            except expat.ExpatError as error:
                raise DataError(
                    f"{path.name}:{error.lineno}: not XML ({error}); unpack or download it again"
                ) from error
            yield from rows
            rows.clear()
            if not piece:
                return
