"""Steps that drop rows for what stands in them: each a function from a row to the reason, or None for a good row."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmtune.data.prepare.libraries import library
from lmtune.data.prepare.rows import Row
from lmtune.data.prepare.settings import Settings
from lmtune.data.prepare.texts import SPACELESS
from lmtune.errors import ConfigError

Reason = Callable[[Row, Settings], str | None]
_CODE = re.compile(r"```.*?```|`[^`\n]+`|https?://\S+", re.DOTALL)
_WIDE = re.compile(rf"[{SPACELESS}\uac00-\ud7af]")  # a letter says much, words have no bounds


def is_unreadable(row: Row, _: Settings) -> str | None:
    """Characters were lost where the text was converted before."""
    return "�" if any("�" in text for _, text in row.texts()) else None


def is_empty(row: Row, _: Settings) -> str | None:
    """No question, or no answer."""
    for role, text in row.texts():
        if not text.strip() and role != "system":
            return {"user": "no question", "assistant": "no answer"}.get(role, "no text")
    return None


_SHORTEST, _LONGEST = 3, 50_000  # characters, where the user does not say


def is_short(row: Row, settings: Settings) -> str | None:
    """Fewer characters than `min_characters`."""
    length = sum(len(text.strip()) for _, text in row.texts())
    return f"{length} characters" if length < (settings.min_characters or _SHORTEST) else None


def is_long(row: Row, settings: Settings) -> str | None:
    """More characters than `max_characters`."""
    length = sum(len(text) for _, text in row.texts())
    return f"{length:,} characters" if length > (settings.max_characters or _LONGEST) else None


_REPEATED = 0.1
_LONG_ENOUGH = 200  # bytes


def is_repetitive(row: Row, _: Settings) -> str | None:
    """A text that compresses to less than a tenth: it says the same again and again."""
    for role, text in row.texts():
        raw = text.encode()
        if role != "system" and len(raw) >= _LONG_ENOUGH:
            ratio = len(zlib.compress(raw, 1)) / len(raw)
            if ratio < _REPEATED:
                return f"compresses to {ratio:.0%}"
    return None


_SURE = 0.9
_LETTERS, _WIDE_LETTERS = 20, 6


def is_other_language(row: Row, settings: Settings) -> str | None:
    """The question or the answer is in another language, where there is enough text to be sure."""
    for roles in (("user",), ("assistant",), ("text",)):
        text = _CODE.sub(" ", row.joined(*roles))
        letters = sum(map(str.isalpha, text))
        if letters < _LETTERS and len(_WIDE.findall(text)) < _WIDE_LETTERS:
            continue
        code, share = language_of(text)
        if code not in settings.language and share >= _SURE:
            return code
    return None


def language_of(text: str) -> tuple[str, float]:
    """The most likely language, and its probability."""
    code, share = _languages().classify(text[:2000])
    return str(code), float(share)


def check_languages(codes: Sequence[str]) -> None:
    """Raise ConfigError for codes that the library does not know: every row would be in another language."""
    known = set(_languages().labels) if codes else set()
    if unknown := [code for code in codes if code not in known]:
        raise ConfigError(f"--language: {', '.join(unknown)}: not known; known are {', '.join(sorted(known))}")


@functools.cache
def _languages() -> Any:
    module = library("py3langid.langid")
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE, norm_probs=True)


def has_profanity(row: Row, _: Settings) -> str | None:
    """A word of our own short lists."""
    return _first_word(row, _words_pattern(_profanity()))


def has_blocked_word(row: Row, settings: Settings) -> str | None:
    """A word of the user's list."""
    assert settings.blocked is not None  # the step is left out without
    return _first_word(row, _words_pattern(read_words(settings.blocked)))


def _first_word(row: Row, pattern: re.Pattern[str]) -> str | None:
    found = pattern.search(row.joined())
    return found[0] if found else None


@functools.cache
def read_words(path: str) -> tuple[str, ...]:
    """The words of a file, one a line; a line that begins with # is a comment."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--blocked: {path}: cannot be read ({error})") from error
    words = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not words:
        raise ConfigError(f"--blocked: {path}: holds no word; expected one a line")
    return words


@functools.cache
def _words_pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the words: whole ones, but parts where a script has no spaces."""
    return re.compile("|".join(_bounded(word) for word in sorted(words, key=len, reverse=True)), re.IGNORECASE)


def _bounded(word: str) -> str:
    escaped = r"\s+".join(map(re.escape, word.split()))
    if _WIDE.search(word):
        return escaped
    return (r"\b" if word[0].isalnum() else "") + escaped + (r"\b" if word[-1].isalnum() else "")


@functools.cache
def _profanity() -> tuple[str, ...]:
    folder = Path(__file__).parent / "words"
    return tuple(word for path in sorted(folder.glob("profanity.*.txt")) for word in read_words(str(path)))


@functools.cache
def words_of(*names: str) -> frozenset[str]:
    """The words of our own lists of these names."""
    folder = Path(__file__).parent / "words"
    return frozenset(word for name in names for word in read_words(str(folder / f"{name}.txt")))
