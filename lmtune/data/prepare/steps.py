"""The steps of `prepare`, in the order in which they are proposed. A step is a function from rows to rows.

    Step("near", "are near duplicates of an earlier row", "drop", drop_near)

It counts in `found` what it changes or drops, and shows three examples. A step that needs all rows at once (`whole`)
gets them as a `Spool`; others see them one by one, so that several of them take one pass.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

from lmtune.data.prepare import duplicates, filters, personal, texts
from lmtune.data.prepare.affixes import Side, common_marks, without_marks
from lmtune.data.prepare.found import Found
from lmtune.data.prepare.rows import Row
from lmtune.data.prepare.settings import Settings
from lmtune.data.prepare.spool import Spool
from lmtune.data.report import label_name
from lmtune.data.types import RowKind, hash64

Rows = Iterable[Row]


@dataclass(frozen=True)
class Context:
    """What a step is given beside the rows.

    Attributes:
        kind: of the rows.
        held_out: validation rows that the user has already.
    """

    settings: Settings
    kind: RowKind = "answer"
    held_out: Spool | None = None


Apply = Callable[[Rows, Context, Found], Rows]  # which may be the rows given, where nothing changes


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: as `--steps` and the plan name it.
        what: completes "37 rows …".
        action: the question.
        apply: takes the rows; counts and changes them.
        recommended: whether the answer proposed is yes.
        least_share: of the rows, below which it is no.
        needs: whether the step has something to do under these settings and with these rows.
        whole: `apply` reads the rows more than once.
    """

    name: str
    what: str
    action: str
    apply: Apply
    recommended: Callable[[Context], bool] = lambda context: True
    least_share: float = 0.0
    needs: Callable[[Context], bool] = lambda context: True
    whole: bool = False


def _never(context: Context) -> bool:
    return False


def _each_text(change: Callable[[str], str], calls: bool = False) -> Apply:
    """A step that changes every text; those in the arguments of `calls` too."""

    def apply(rows: Rows, context: Context, found: Found) -> Iterator[Row]:
        for row in rows:
            found.total += 1
            changed = row.with_texts(lambda role, text: text if role == "call" and not calls else change(text))
            if changed is not row:
                found.changed(row, changed)
            yield changed

    return apply


def _without(reason: filters.Reason) -> Apply:
    """A step that drops the rows that have a reason."""

    def apply(rows: Rows, context: Context, found: Found) -> Iterator[Row]:
        for row in rows:
            found.total += 1
            if why := reason(row, context.settings):
                found.dropped(row, why)
                found.kinds[why] += 1
            else:
                yield row

    return apply


def _mask(rows: Rows, context: Context, found: Found) -> Rows:
    def count(kind: str) -> None:
        found.kinds[kind] += 1

    return _each_text(lambda text: personal.mask_personal(text, count), calls=True)(rows, context, found)


def _take_off(side: Side) -> Apply:
    def apply(rows: Rows, context: Context, found: Found) -> Rows:
        marks = common_marks(cast(Spool, rows), side)
        return _without_marks(rows, marks, side, found) if marks else rows

    return apply


def _without_marks(rows: Rows, marks: dict[str, str], side: Side, found: Found) -> Iterator[Row]:
    for row in rows:
        found.total += 1
        changed = without_marks(row, marks, side)
        if changed is not row:
            found.changed(row, changed)
        yield changed


def _drop_equal(rows: Rows, context: Context, found: Found) -> Rows:
    import numpy as np

    keys = np.fromiter(cast(Spool, rows).contents(), dtype=np.uint64)
    return _first_ones(rows, duplicates.first_of_each(keys), "=", found)


def _drop_near(rows: Rows, context: Context, found: Found) -> Rows:
    family = duplicates.near_families(cast(Spool, rows), context.settings.similarity)
    return _first_ones(rows, duplicates.first_of_each(family), "≈", found)


def _first_ones(rows: Rows, first: duplicates.Numbers, sign: str, found: Found) -> Rows:
    """Those rows of which `first` says that they are the first of their kind."""
    import numpy as np

    later = np.flatnonzero(first != np.arange(len(first)))
    return _without_later(rows, first, later, sign, found) if len(later) else rows


def _without_later(
    rows: Rows, first: duplicates.Numbers, later: duplicates.Numbers, sign: str, found: Found
) -> Iterator[Row]:
    shown = {int(first[number]): "" for number in later[:3].tolist()}
    for number, (row, kept) in enumerate(zip(rows, first.tolist(), strict=True)):
        found.total += 1
        if kept == number:
            if number in shown:
                shown[number] = row.place
            yield row
        else:
            found.dropped(row, f"{sign} {shown.get(kept)}")


def _drop_leaks(rows: Rows, context: Context, found: Found) -> Iterator[Row]:
    """A family that holds a validation row is not trained."""
    import numpy as np

    spool, held_out = cast(Spool, rows), context.held_out
    assert held_out is not None  # the step is left out without
    family = duplicates.near_families(spool, context.settings.similarity, held_out)
    leaks = np.isin(family[: len(spool)], family[len(spool) :]).tolist()
    for number, row in enumerate(spool):
        found.total += 1
        if leaks[number]:
            found.dropped(row)
        else:
            yield row


def _drop_contradictions(rows: Rows, context: Context, found: Found) -> Iterator[Row]:
    """Of different answers to one question the most frequent stays, of equally frequent ones the first."""
    import numpy as np

    hashes = np.array([(hash64([row.question]), _answer_hash(row)) for row in rows], dtype=np.uint64).reshape(-1, 2)
    several, first, counts = np.unique(hashes, axis=0, return_index=True, return_counts=True)
    is_asked_again = np.zeros(len(several), dtype=bool)
    is_asked_again[1:] |= several[1:, 0] == several[:-1, 0]
    is_asked_again[:-1] |= several[1:, 0] == several[:-1, 0]
    best: dict[int, tuple[int, int, int]] = {}
    for index in np.flatnonzero(is_asked_again).tolist():
        question, answer = several[index].tolist()
        best[question] = max(best.get(question, (0, 0, 0)), (int(counts[index]), -int(first[index]), answer))
    for (question, answer), row in zip(hashes.tolist(), rows, strict=True):
        found.total += 1
        if row.answer is not None and question in best and best[question][2] != answer:
            found.dropped(row, f"label {_label(row)}" if "label" in row.fields else "")
        else:
            yield row


def _answer_hash(row: Row) -> int:
    return hash64([json.dumps(row.answer, ensure_ascii=False)])


_FEW = 0.5  # of the rows that each label would have if all had the same number


def _balance(rows: Rows, context: Context, found: Found) -> Iterator[Row]:
    """No label has more rows than twice the rarest one; the first rows of each stay."""
    labels = Counter(
        _label(row) for row in rows if "label" in row.fields and not isinstance(row.fields["label"], float)
    )
    most = 2 * min(labels.values(), default=0)
    kept: Counter[str] = Counter()
    for row in rows:
        found.total += 1
        label = _label(row)
        if most and len(labels) > 1 and label in labels and kept[label] >= most:
            found.dropped(row, f"label {label}: {labels[label]:,} rows of {found.total:,}")
            found.kinds[label] += 1
        else:
            kept[label] += 1
            yield row


def _label(row: Row) -> str:
    label = row.fields.get("label")
    return label_name(tuple(label) if isinstance(label, list) else label) if label is not None else ""


def _has_shortest(context: Context) -> bool:
    return context.settings.min_characters is not None


def _has_longest(context: Context) -> bool:
    return context.settings.max_characters is not None


def _is_labelled(context: Context) -> bool:
    """One text has one label; a question may have several good answers."""
    return context.kind == "labelled"


STEPS = (
    Step("encoding", "hold text in a wrong encoding", "repair", _each_text(texts.repair_encoding)),
    Step(  # few rows with tags are about HTML, many are pages
        "html", "hold HTML", "write it as plain text", _each_text(texts.strip_html), least_share=0.05
    ),
    Step(
        "spaces", "hold control characters or needless white space", "remove", _each_text(texts.clean_spaces)
    ),
    Step(
        "punctuation", "hold full-width or typographic characters", "write them as ASCII",
        _each_text(texts.plain_punctuation), _never,
    ),
    Step("beginnings", "begin with a mark that most of them have", "take it off", _take_off("beginning"), whole=True),
    Step("ends", "end with a mark that most of them have", "take it off", _take_off("end"), whole=True),
    Step("personal", "hold personal data", "mask", _mask),
    Step("links", "hold addresses of web pages", "mask", _each_text(personal.mask_links, calls=True), _never),
    Step(
        "capitals", "are written in capitals", "write them in small letters", _each_text(texts.lower_capitals), _never
    ),
    Step("unreadable", "hold characters that a conversion has lost", "drop", _without(filters.is_unreadable)),
    Step("empty", "have no question or no answer", "drop", _without(filters.is_empty)),
    Step("short", "are too short", "drop", _without(filters.is_short), _has_shortest),
    Step("long", "are too long", "drop", _without(filters.is_long), _has_longest),
    Step(
        "language", "are in another language", "drop", _without(filters.is_other_language),
        needs=lambda context: bool(context.settings.language),
    ),
    Step("repetition", "say the same again and again", "drop", _without(filters.is_repetitive)),
    Step("profanity", "hold profanity", "drop", _without(filters.has_profanity), _never),
    Step(
        "blocked", "hold a blocked word", "drop", _without(filters.has_blocked_word),
        needs=lambda context: context.settings.blocked is not None,
    ),
    Step("duplicates", "are equal to an earlier row", "drop", _drop_equal, whole=True),
    Step(
        "contradictions", "answer a question otherwise than most rows do", "drop", _drop_contradictions,
        _is_labelled, whole=True,
    ),
    Step("near", "are near duplicates of an earlier row", "drop", _drop_near, whole=True),
    Step(
        "leaks", "are near duplicates of a validation row", "drop", _drop_leaks,
        needs=lambda context: context.held_out is not None, whole=True,
    ),
    Step("labels", "are more than twice the rarest label has", "drop", _balance, _never, whole=True),
)  # fmt: skip
