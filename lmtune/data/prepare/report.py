"""What prepared rows hold: their lengths, labels and most frequent terms, stop words left out; and what to do next."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmtune.data.prepare.filters import words_of
from lmtune.data.prepare.libraries import library
from lmtune.data.prepare.plan import Plan, validation_path
from lmtune.data.prepare.spool import Spool
from lmtune.data.report import LabelCounts
from lmtune.data.types import RowKind
from lmtune.io.atomic import cache_folder
from lmtune.io.console import command
from lmtune.io.text import pluralize

_SAMPLE = 20_000  # rows; jieba reads about 0.4 MB a second
_SHOWN = 20
_HAN = re.compile(r"[\u3400-\u9fff]+")
_WORD = re.compile(r"[^\W\d_]{2,}(?:['’][^\W\d_]+)?")


def describe_rows(spool: Spool, languages: Sequence[str]) -> dict[str, Any]:
    """Lengths in characters, and the most frequent terms of questions and of answers."""
    import numpy as np

    every = max(1, len(spool) // _SAMPLE)
    lengths = np.empty(len(spool), dtype=np.int64)
    terms: dict[str, Counter[str]] = {"questions": Counter(), "answers": Counter(), "texts": Counter()}
    labels = LabelCounts()
    for number, row in enumerate(spool):
        if (label := row.fields.get("label")) is not None:
            labels.add(tuple(label) if isinstance(label, list) else label)
        lengths[number] = sum(len(text) for _, text in row.texts())
        if number % every == 0:
            for role, text in row.texts():
                part = {"user": "questions", "assistant": "answers", "text": "texts"}.get(role)
                if part:
                    terms[part].update(set(terms_of(text)))
    places = np.quantile(lengths, [0, 0.5, 0.95, 1], method="nearest").tolist()
    return {
        "characters": dict(zip(("shortest", "median", "95 %", "longest"), places, strict=True)),
        "labels": labels.counts if len(labels.counts) <= _SHOWN else {},
        "terms_from_rows": -(-len(spool) // every),
        "terms": {
            part: dict(sorted(some.items(), key=lambda one: (-one[1], one[0]))[:_SHOWN])
            for part, some in terms.items()
            if some
        },
    }


def terms_of(text: str) -> list[str]:
    """The words of a text without stop words; Chinese is cut into words by jieba."""
    stop_words = words_of("stop.en", "stop.zh")
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


_OBJECTIVE: dict[RowKind, tuple[str, ...]] = {
    "answer": (), "pair": ("objective.kind=dpo",), "judged": ("objective.kind=kto",),
    "labelled": ("objective.kind=classification",),
}  # fmt: skip
_MODEL = "Qwen/Qwen3-0.6B"  # small, and good for its size


def described(plan: Plan, output: Path) -> list[str]:
    """What was written, and the next commands."""
    rows, report, held_out = plan.rows, plan.report, validation_path(output)
    seen = report["terms_from_rows"]
    sample = f" in {seen:,} of the rows" if seen < rows["written"] else ""
    counts = {"labels": report["labels"]}
    counts |= {f"terms of {part}{sample}": terms for part, terms in report["terms"].items()}
    counts["characters a row"] = report["characters"]
    lines = [
        f"{what}: {', '.join(f'{name} {count:,}' for name, count in some.items())}"
        for what, some in counts.items() if some
    ]  # fmt: skip
    done = f"{pluralize(rows['read'])} read; {pluralize(rows['written'])} written: {output}"
    if rows["held_out"]:
        done += f"; {pluralize(rows['held_out'])} held out: {held_out}"
    if rows["copies_left_out"]:
        done += f"; {rows['copies_left_out']:,} copies of these left out"
    given = plan.settings.validation
    validation = given if isinstance(given, str) else held_out if rows["held_out"] else None
    settings = [*([f"data.validation={validation}"] if validation else []), *_OBJECTIVE[plan.kind]]
    next_ones = (("check", output), ("finetune", "--model", _MODEL, "--data", output, *settings))
    return [*lines, f"{done}. Next:", *(f"  {command(*words)}" for words in next_ones)]
