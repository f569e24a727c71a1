"""Posts that answer each other, by the id of the post that each answers: Reddit, Twitter, Cornell, Stack Exchange.

They lie in a database on disk, since an answer may stand far from its question, or in another file. Of several answers
to one post the accepted one is taken, else the best liked, of equally liked ones the earliest.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lmtune.data.prepare.pairing import Counts, Message, RawRow, rows_of
from lmtune.data.prepare.settings import Settings


@dataclass(frozen=True, slots=True)
class Post:
    """A message that may answer another one, its `parent`; `accepted` is the answer that its author took."""

    id: str
    parent: str | None
    message: Message
    score: float = 0.0
    accepted: str | None = None


_TABLE = """CREATE TABLE posts (
    number INTEGER PRIMARY KEY, id TEXT UNIQUE, parent TEXT, author TEXT, text TEXT, place TEXT, score REAL,
    accepted TEXT, conversation TEXT)"""
_Record = tuple[str, str, str, str, str | None, str]  # id, author, text, place, accepted, conversation
_QUESTIONS = """SELECT id, author, text, place, accepted, conversation FROM posts q
    WHERE EXISTS (SELECT 1 FROM posts a WHERE a.parent = q.id) ORDER BY number"""
_FIRST = """SELECT id, author, text, place, accepted, conversation FROM posts r
    WHERE NOT EXISTS (SELECT 1 FROM posts q WHERE q.id = r.parent) ORDER BY number"""
# Who answers a post of their own goes on talking.
_BEST = """SELECT id, author, text, place, accepted, conversation FROM posts WHERE parent = ? AND author <> ?
    ORDER BY (id IS ?) DESC, score DESC, number LIMIT 1"""
_PARENT = "SELECT q.id FROM posts a JOIN posts q ON q.id = a.parent WHERE a.id = ?"


class Threads:
    """Posts in a database, as rows."""

    def __init__(self, path: Path, posts: Iterable[Post]) -> None:
        """Put `posts` into the new file `path`; of two with one id the first stays."""
        self._path, self._given = path, 0
        path.unlink(missing_ok=True)
        self._database = sqlite3.connect(path, isolation_level=None)
        for statement in ("PRAGMA journal_mode = OFF", "PRAGMA synchronous = OFF", _TABLE, "BEGIN"):
            self._database.execute(statement)
        self._database.executemany(
            "INSERT OR IGNORE INTO posts VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                (
                    post.id, post.parent, post.message.author, post.message.text, post.message.place, post.score,
                    post.accepted, post.message.conversation,
                )
                for self._given, post in enumerate(posts, start=1)
            ),
        )  # fmt: skip
        self._database.execute("COMMIT")
        self._database.execute("CREATE INDEX answers ON posts (parent)")

    def close(self) -> None:
        """Delete the database."""
        self._database.close()
        self._path.unlink()

    def rows(self, settings: Settings, notes: list[str]) -> Iterator[RawRow]:
        """Each post with its best answer, or each thread along its best answers."""
        count = 0
        for group, said in self._threads() if settings.pair == "conversations" else self._answered():
            for row in rows_of(said, settings, group, Counts()):
                count += 1
                yield row
        (posts,) = self._database.execute("SELECT COUNT(*) FROM posts").fetchone()
        notes.append(
            f"{posts:,} posts gave {count:,} rows; of several answers to one, the accepted or best liked is taken"
        )
        if self._given > posts:
            notes.append(f"{self._given - posts:,} left out: posts with the id of an earlier one")

    def _answered(self) -> Iterator[tuple[str, list[Message]]]:
        for question in self._database.execute(_QUESTIONS):
            if (answer := self._best_answer(question)) is not None:
                yield question[5] or self._root(question[0]), [_message(question), _message(answer)]

    def _threads(self) -> Iterator[tuple[str, list[Message]]]:
        for post in self._database.execute(_FIRST):
            said, seen, answer = [_message(post)], {post[0]}, self._best_answer(post)
            while answer is not None and answer[0] not in seen:
                seen.add(answer[0])
                said.append(_message(answer))
                answer = self._best_answer(answer)
            yield post[0], said

    def _best_answer(self, post: _Record) -> _Record | None:
        found: _Record | None = self._database.execute(_BEST, (post[0], post[1], post[4])).fetchone()
        return found

    def _root(self, id: str) -> str:
        """The post that a thread begins with."""
        seen = {id}
        while (found := self._database.execute(_PARENT, (id,)).fetchone()) is not None and found[0] not in seen:
            id = found[0]
            seen.add(id)
        return id


def _message(post: _Record) -> Message:
    return Message(post[3], post[1], post[2])
