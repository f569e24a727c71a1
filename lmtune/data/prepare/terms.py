"""What prepared rows talk about: how often each term occurs, stop words left out; how long rows are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lmtune.data.prepare.filters import words_of
from lmtune.data.prepare.libraries import library
from lmtune.data.prepare.spool import Spool
from lmtune.io.atomic import cache_folder

_SAMPLE = 20_000  # rows; jieba reads about 0.4 MB a second
_SHOWN = 20
_HAN = re.compile(r"[\u3400-\u9fff]+")
_WORD = re.compile(r"[^\W\d_]{2,}(?:['’][^\W\d_]+)?")


def describe_rows(spool: Spool, languages: Sequence[str]) -> dict[str, Any]:
    """Lengths in characters, and the most frequent terms of questions and of answers."""
    import numpy as np

    every = max(1, len(spool) // _SAMPLE)
    lengths = np.empty(len(spool), dtype=np.int64)
    terms: dict[str, Counter[str]] = {"questions": Counter(), "answers": Counter()}
    for number, row in enumerate(spool):
        lengths[number] = sum(len(text) for _, text in row.texts())
        if number % every == 0:
            for role, text in row.texts():
                part = {"user": "questions", "assistant": "answers", "text": "answers"}.get(role)
                if part:
                    terms[part].update(set(terms_of(text)))
    places = np.quantile(lengths, [0, 0.5, 0.95, 1], method="nearest").tolist()
    return {
        "characters": dict(zip(("shortest", "median", "95 %", "longest"), places, strict=True)),
        "terms_from_rows": -(-len(spool) // every),
        "terms": {part: dict(some.most_common(_SHOWN)) for part, some in terms.items() if some},
    }


def terms_of(text: str) -> list[str]:
    """The words of a text without stop words; Chinese is cut into words by jieba."""
    stop_words = words_of(("stop.en", "stop.zh"))
    words = [word.casefold() for word in _WORD.findall(_HAN.sub(" ", text))]
    for run in _HAN.findall(text):
        words += [word for word in _cutter().cut(run) if len(word) > 1]
    return [word for word in words if word not in stop_words]


_made: list[Any] = []


def _cutter() -> Any:
    if not _made:
        jieba = library("jieba")
        jieba.setLogLevel(60)  # it tells how it loads its words
        cutter = jieba.Tokenizer()
        folder = cache_folder() / "jieba"
        folder.mkdir(parents=True, exist_ok=True)
        cutter.tmp_dir = str(folder)
        _made.append(cutter)
    return _made[0]
