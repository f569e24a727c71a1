"""k folds of a run's rows: every row is scored once, by a model that was not trained on it nor on its family.

    for number, selection in enumerate(fold_selections(data, folds=5, seed=0), start=1): …

Rows of one family are in one fold: those of the same prompt, of the same value of a field (`--group`), and the copies
that `lmtune augment` made of a row. Copies are trained with their family and never scored. Each fold has about as many
rows of each label as every other; of numbers, of each tenth of their range of ranks. Which fold a family is in depends
on its content and the seed alone, so more copies, or the rows in another order, leave the folds as they are.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lmtune.data.readers import read_rows
from lmtune.data.selection import Selection
from lmtune.data.values import RowFault
from lmtune.errors import ConfigError

if TYPE_CHECKING:
    from lmtune.data.store import TokenizedData
    from lmtune.data.types import Label

Int64 = npt.NDArray[np.int64]
_SEED = 0xF01D  # keeps these random numbers apart from those of a run
_MOST_CLASSES = 20  # different numbers; more are quantities
_TENTHS = 10


def fold_selections(
    data: TokenizedData, folds: int, seed: int = 0, groups: Sequence[Hashable] | None = None
) -> list[Selection]:
    """The rows to train on and to score, of each fold.

    Args:
        data: all rows.
        folds: how many.
        seed: of the order in which families are assigned.
        groups: `[N]`, rows of equal values stay together; None as a value is no group.

    Raises:
        ConfigError: there are fewer families than folds.
    """
    family = _families(data, groups)
    usable = family >= 0
    own = usable & ~data.copies
    count = int(family.max()) + 1
    if count < folds:
        raise ConfigError(
            f"--folds: {folds}; the rows make {count} famil{'y' if count == 1 else 'ies'} that must stay together; "
            "expected no more folds than that"
        )
    fold_of = _assign(family[own], _strata([label for label, is_own in zip(data.labels, own, strict=True) if is_own]),
                    folds, seed)  # fmt: skip
    of_row = np.where(usable, fold_of[family], -1)
    return [
        Selection(
            tuple(np.flatnonzero(usable & (of_row != fold)).tolist()),
            tuple(np.flatnonzero(own & (of_row == fold)).tolist()),
        )
        for fold in range(folds)
    ]  # fmt: skip


def group_values(data: TokenizedData, field: str) -> list[Hashable]:
    """`[N]`: the value of `field` in the row of the file that each of `data` is made of; None where it has none.

    Raises:
        ConfigError: no row has the field, or rows cannot be told apart by their lines.
    """
    known: list[dict[int, Hashable]] = []
    keys: dict[str, None] = {}
    for file in data.files:
        values: dict[int, Hashable] = {}
        for number, _, row in read_rows(file):
            if isinstance(row, RowFault) or not isinstance(row, Mapping):
                continue
            keys |= dict.fromkeys(map(str, row))
            value = row.get(field)
            value = None if value is None or value == "" else str(value)
            if values.setdefault(number, value) != value:
                raise ConfigError(
                    f"--group: {file.name}: rows of different {field} stand in line {number}; write one row a line"
                )
        known.append(values)
    if not any(value is not None for values in known for value in values.values()):
        near = difflib.get_close_matches(field, keys, n=1)
        hint = f"did you mean {near[0]}?" if near else f"their keys are {', '.join(list(keys)[:10])}"
        raise ConfigError(f"--group: {field}: no row has a value of this key; {hint}")
    return [known[file].get(line) for file, line in zip(*(part.tolist() for part in data.lines), strict=True)]


def _families(data: TokenizedData, groups: Sequence[Hashable] | None) -> Int64:
    """`[N]`: the family of each row, numbered in the order of their contents; -1 for copies of which none is known.

    Where all rows have one prompt, rows of equal content are a family. A copy names the prompt of its row, which then
    says nothing.
    """
    own = np.flatnonzero(~data.copies)
    one_prompt = len(np.unique(data.prompt[own])) < 2
    names = (data.content if one_prompt else data.prompt).tolist()
    usable = ~data.copies if one_prompt else np.isin(data.prompt, data.prompt[own])
    joined = _Joined(len(names))
    first: dict[Hashable, int] = {}
    for row in np.flatnonzero(usable).tolist():
        joined.join(row, first.setdefault(("family", names[row]), row))
        if groups is not None and groups[row] is not None:
            joined.join(row, first.setdefault(("group", groups[row]), row))
    roots = np.array([joined.root(row) if is_usable else -1 for row, is_usable in enumerate(usable.tolist())])
    least = np.full(len(names), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(least, roots[own], data.content[own])  # so that copies do not change the order
    members = np.unique(roots[own])
    place = np.full(len(names) + 1, -1, dtype=np.int64)  # the last one is that of root -1
    place[members[np.argsort(least[members], kind="stable")]] = np.arange(len(members))
    numbers: Int64 = place[roots]
    return numbers


class _Joined:
    """Sets that are joined two by two."""

    def __init__(self, count: int) -> None:
        self._above = list(range(count))

    def root(self, one: int) -> int:
        """What stands for the set that `one` is in."""
        while self._above[one] != one:
            self._above[one] = one = self._above[self._above[one]]
        return one

    def join(self, one: int, other: int) -> None:
        """Make one set of theirs."""
        self._above[self.root(one)] = self.root(other)


def _strata(labels: Sequence[Label | None]) -> list[tuple[Hashable, ...]]:
    """What each row is to be spread by: its label, each of its labels, the tenth that its number is in, or nothing."""
    numbers = [label for label in labels if isinstance(label, (int, float)) and not isinstance(label, bool)]
    if len(numbers) == len(labels) and len(set(numbers)) > _MOST_CLASSES:
        ranks = np.argsort(np.argsort(np.array(numbers, dtype=np.float64), kind="stable"), kind="stable")
        return [(int(rank),) for rank in ranks * _TENTHS // len(labels)]
    return [label if isinstance(label, tuple) else (label,) for label in labels]


def _assign(family: Int64, strata: Sequence[tuple[Hashable, ...]], folds: int, seed: int) -> Int64:
    """The fold of each family: large ones first, each to the fold that has the fewest of what it brings."""
    number = {name: place for place, name in enumerate(dict.fromkeys(name for row in strata for name in row))}
    brings: list[dict[int, int]] = [{} for _ in range(int(family.max()) + 1)]
    sizes = np.bincount(family)
    for one, names in zip(family.tolist(), strata, strict=True):
        for name in names:
            brings[one][number[name]] = brings[one].get(number[name], 0) + 1
    order = np.random.default_rng([seed, _SEED]).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    have, rows, found = np.zeros((folds, max(1, len(number)))), np.zeros(folds), np.zeros(len(sizes), dtype=np.int64)
    for one in order.tolist():
        brought, counts = list(brings[one]), np.array(list(brings[one].values()), dtype=np.float64)
        cost = have[:, brought] @ counts
        fold = int(np.lexsort((rows, cost))[0])
        have[fold, brought] += counts
        rows[fold] += sizes[one]
        found[one] = fold
    return found
