"""Further training rows from those that there are: words of a question or a labelled text deleted, swapped, replaced.

    {"text": "the lamp came broken", "label": "complaint"}
    {"text": "lamp came the broken", "label": "complaint", "augmented_from": "5f0c9a…"}

After Wei and Zou, EDA, 2019. Answers stay as they are, since they are trained word by word. A script without spaces is
changed character by character. What holds a digit stays, because the answer depends on it, and so does punctuation.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmtune.data.columns import Columns
from lmtune.data.formats import ORIGIN, detect_format, kind_of_format, parse_row
from lmtune.data.prepare.plan import require_jsonl
from lmtune.data.prepare.texts import SPACELESS
from lmtune.data.readers import read_rows
from lmtune.data.sources import DataFile, find_files
from lmtune.data.types import Example, prompt_hash
from lmtune.data.values import RowFault, listed_keys
from lmtune.errors import ConfigError, DataError
from lmtune.io.atomic import new_files
from lmtune.io.console import row_progress

_TRIES = 5  # to make a copy that differs from the row and from its other copies
_REPLACED = 0.5  # of the words that have another
_PIECE = re.compile(rf"([{SPACELESS}]|[^\s{SPACELESS}]+)(\s*)")
_SPACELESS = re.compile(f"[{SPACELESS}]")


@dataclass(frozen=True)
class Changes:
    """What is done to a text.

    Attributes:
        delete: the probability of each word.
        swap: how many times two words change places.
        replacements: other words for a word, which is in small letters.
        copies: of each row.
    """

    delete: float = 0.0
    swap: int = 0
    replacements: Mapping[str, Sequence[str]] = field(default_factory=dict)
    copies: int = 1
    seed: int = 0


@dataclass
class Augmented:
    """How many rows were read and made; `unchanged` had too few words to make every copy; `said` is of the file."""

    rows: int = 0
    copies: int = 0
    unchanged: int = 0
    kind: str = "answer"
    said: list[str] = field(default_factory=list)


def read_replacements(path: str) -> dict[str, tuple[str, ...]]:
    """A table of words: in each line a word and others for it, apart by tabs.

    Raises:
        ConfigError: it cannot be read, or a line names no other word.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--replace: {path}: cannot be read ({error})") from error
    found: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        word, *others = (part.strip() for part in line.split("\t"))
        if not word or not any(others):
            raise ConfigError(f"--replace: {path}:{number}: expected a word, a tab, and other words apart by tabs")
        key = word.casefold()
        found[key] = (*found.get(key, ()), *(other for other in others if other))
    if not found:
        raise ConfigError(f"--replace: {path}: holds no word")
    return found


class Changer:
    """Changes texts; each call takes its own random numbers."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        parts = sorted(filter(_SPACELESS.search, changes.replacements), key=len, reverse=True)
        words = [r"[^\W\d_]+(?:['’-][^\W\d_]+)*"] if len(parts) < len(changes.replacements) else []
        self._replaced = re.compile("|".join([*map(re.escape, parts), *words])) if changes.replacements else None

    def __call__(self, text: str, random: random.Random) -> str:
        """The text with changes."""
        if self._replaced is not None:
            text = self._replaced.sub(lambda found: self._other(found[0], random), text)
        lead = text[: len(text) - len(text.lstrip())]
        pieces = [(found[1], found[2]) for found in _PIECE.finditer(text)]
        free = [index for index, (word, _) in enumerate(pieces) if not _is_kept(word)]
        for _ in range(self._changes.swap if len(free) > 1 else 0):
            one, other = random.sample(free, 2)
            pieces[one], pieces[other] = (pieces[other][0], pieces[one][1]), (pieces[one][0], pieces[other][1])
        gone = {index for index in free if random.random() < self._changes.delete}
        if len(gone) == len(pieces):
            gone.discard(random.choice(sorted(gone)) if gone else -1)
        kept = [word + space for index, (word, space) in enumerate(pieces) if index not in gone]
        return lead + ("".join(kept).rstrip() if gone else "".join(kept))

    def _other(self, word: str, random: random.Random) -> str:
        others = self._changes.replacements.get(word.casefold(), ())
        if not others or random.random() >= _REPLACED:
            return word
        other = random.choice(others)
        return other[:1].upper() + other[1:] if word[:1].isupper() else other


def _is_kept(word: str) -> bool:
    """Numbers, punctuation, and what `prepare` has masked."""
    return any(map(str.isdigit, word)) or not any(map(str.isalpha, word)) or re.search(r"\[[A-Z]+\]", word) is not None


def augment(given: str, output: Path, changes: Changes, columns: Mapping[str, str] | None = None) -> Augmented:
    """Write the rows of `given`, each with its copies behind it; `columns` is `data.columns`.

    Raises:
        ConfigError: `output` is there already, or nothing is to be done.
        DataError: a row cannot be used, or holds no text to change.
    """
    if not (changes.delete or changes.swap or changes.replacements):
        raise ConfigError("say what to change: --delete SHARE, --swap NUMBER, --replace TABLE")
    if Path(given).name.lower().endswith(".validation.jsonl"):
        raise ConfigError(f"{given}: these rows are held out; validation rows are not augmented")
    require_jsonl(output)
    made, changer = Augmented(), Changer(changes)
    with new_files(output) as folder, open(folder / output.name, "w", encoding="utf-8") as file:
        with row_progress("augmenting") as progress:
            for place, row, example in _rows(find_files([given]), columns, made.said):
                made.rows += 1
                made.kind = example.kind
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                if ORIGIN not in row:
                    copies = list(_copies(place, row, example, changes, changer))
                    made.copies += len(copies)
                    made.unchanged += len(copies) < changes.copies
                    file.writelines(json.dumps(copy, ensure_ascii=False) + "\n" for copy in copies)
                progress(made.rows)
        if not made.copies:
            raise DataError(f"{given}: no row could be changed; raise --delete or --swap, or give another --replace")
    return made


def _rows(
    files: Sequence[DataFile], columns: Mapping[str, str] | None, said: list[str]
) -> Iterator[tuple[str, dict[str, Any], Example]]:
    """(place, the row under the keys that training reads, what it says)."""
    renamed = Columns(columns)
    for file in files:
        for number, _, row in read_rows(file, said, renamed):
            place = file.place(number, shown=True)
            try:
                if isinstance(row, RowFault):
                    raise row
                if not isinstance(row, dict):
                    raise RowFault("a row must be an object")
                format = detect_format(row)
                parsed = parse_row(row, format)
                if format == "text":
                    raise RowFault("a plain text is trained word by word; only questions and labelled texts change")
            except RowFault as fault:
                raise DataError(f"{place}: {fault}") from None
            yield place, row, Example(
                file.portable_name, number, parsed.messages, parsed.text, parsed.rejected, parsed.label,
                kind=kind_of_format(format),
            )  # fmt: skip
    if renamed.unseen:
        raise ConfigError(f"--columns: no row has {listed_keys(sorted(renamed.unseen))}; remove it")


def _copies(
    place: str, row: dict[str, Any], example: Example, changes: Changes, changer: Changer
) -> Iterator[dict[str, Any]]:
    """Up to `copies` changed rows, no two of them equal."""
    numbers = random.Random(f"{changes.seed} {prompt_hash(example)} {place}")
    known = [row]
    for _ in range(changes.copies):
        for _ in range(_TRIES):
            copy = with_questions(row, lambda text: changer(text, numbers))
            if copy not in known:
                known.append(copy)
                yield {**copy, ORIGIN: f"{prompt_hash(example):016x}"}
                break


_QUESTION_KEYS = ("text", "prompt", "instruction", "input", "messages", "conversations")
_ASKING = ("user", "human", "prompter")


def with_questions(row: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The row with `change` of each text that is asked or labelled; answers and system prompts stay."""
    changed = dict(row)
    for key in _QUESTION_KEYS:
        value = row.get(key)
        if isinstance(value, str):
            changed[key] = change(value)
        elif isinstance(value, list):
            changed[key] = [_turn(turn, change) for turn in value]
        elif isinstance(value, dict):  # OpenAI's pairs
            changed[key] = with_questions(value, change)
    return changed


def _turn(turn: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    role, key = str(turn.get("role", turn.get("from"))).lower(), "content" if "content" in turn else "value"
    is_asked = role in _ASKING and isinstance(turn[key], str)
    return {**turn, key: change(turn[key])} if is_asked else turn
