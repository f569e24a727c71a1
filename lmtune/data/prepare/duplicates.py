"""Rows that say the same: equal ones, nearly equal ones, and those that are nearly equal to a validation row.

Two rows are near duplicates if they share `similarity` of their shingles: three words that follow each other, or three
characters of a script without spaces (the Jaccard index, Broder 1997). MinHash of the library datasketch finds
candidates: 64 permutations, in bands, so that rows of this similarity share a band. Each candidate is compared by its
shingles themselves. The bands are sorted with NumPy, which takes 4 bytes for a permutation and no table of Python's.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from lmtune.data.prepare.libraries import library
from lmtune.data.prepare.rows import Row
from lmtune.data.prepare.spool import Spool
from lmtune.data.prepare.texts import SPACELESS
from lmtune.io.console import row_progress

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Numbers = npt.NDArray[np.int64]
    Signatures = npt.NDArray[np.uint32]  # [N, P]

PERMUTATIONS = 64
_WORDS = 3
_TOKENS = re.compile(rf"[{SPACELESS}]|[^\W{SPACELESS}]+")
_MOST_CANDIDATES = 8  # of one row in one band


def shingles(text: str) -> set[str]:
    """Stretches of three words, or of as many characters of a script without spaces."""
    tokens = _TOKENS.findall(text.casefold())
    return {" ".join(tokens[start : start + _WORDS]) for start in range(max(1, len(tokens) - _WORDS + 1))}


def similarity(one: set[str], other: set[str]) -> float:
    """The share of shingles that both have, of those that one has."""
    return len(one & other) / len(one | other)


def near_families(spool: Spool, least: float, further: Spool | None = None) -> Numbers:
    """For each row the number of its family, `[N]`; rows are of one family if a chain of near duplicates joins them.

    `further` rows are numbered behind those of `spool`.
    """
    import numpy as np

    pairs = _verified(spool, further, candidates(signatures(spool, further), least), least)
    return families(len(spool) + (len(further) if further else 0), np.array(pairs, dtype=np.int64).reshape(-1, 2))


def families(count: int, pairs: Numbers) -> Numbers:
    """The connected components of `count` rows, of which `pairs` `[E, 2]` are joined."""
    import numpy as np

    library("datasketch")  # which brings SciPy
    graph = library("scipy.sparse").coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, family = library("scipy.sparse.csgraph").connected_components(graph, directed=False)
    found: Numbers = family.astype(np.int64)
    return found


def signatures(spool: Spool, further: Spool | None = None) -> Signatures:
    """The MinHash of each row, `[N, P]`."""
    import numpy as np

    empty = library("datasketch").MinHash(num_perm=PERMUTATIONS, hashfunc=zlib.crc32, scheme="affine32")
    found = np.empty((len(spool) + (len(further) if further else 0), PERMUTATIONS), dtype=np.uint32)
    with row_progress("looking for near duplicates") as progress:
        for number, row in enumerate(_both(spool, further)):
            sketch = empty.copy()
            sketch.update_batch([shingle.encode() for shingle in shingles(row.joined())])
            found[number] = sketch.hashvalues
            progress(number)
    return found


def candidates(found: Signatures, least: float) -> Iterator[Numbers]:
    """Pairs of rows `[E, 2]` that share a band, band after band."""
    import numpy as np

    bands, rows = bands_of(least)
    for band in range(bands):
        keys = np.zeros(len(found), dtype=np.uint64)
        for column in range(band * rows, (band + 1) * rows):  # a polynomial hash, modulo 2^64
            keys = keys * np.uint64(0x9E3779B97F4A7C15) + found[:, column]
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        for distance in range(1, _MOST_CANDIDATES + 1):  # each with the next few of its bucket
            if len(order) <= distance:
                break
            equal = ordered[distance:] == ordered[:-distance]
            if not equal.any():
                break
            yield np.stack([order[:-distance][equal], order[distance:][equal]], axis=1)


def bands_of(least: float) -> tuple[int, int]:
    """How many bands of how many permutations let two rows of similarity `least` share one with 95 % probability."""
    for rows in range(16, 0, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - least**rows) ** bands >= 0.95:
            return bands, rows
    return PERMUTATIONS, 1


def _verified(
    spool: Spool, further: Spool | None, found: Iterable[Numbers], least: float
) -> list[tuple[int, int]]:  # fmt: skip
    """Those of the pairs that are as similar as they must be."""
    import numpy as np

    pairs = np.unique(np.sort(np.concatenate([*found, np.empty((0, 2), dtype=np.int64)]), axis=1), axis=0)
    if not len(pairs):
        return []
    wanted = np.unique(pairs)
    texts = _Texts(spool, further, wanted)
    return [(one, other) for one, other in pairs.tolist() if similarity(texts(one), texts(other)) >= least]


class _Texts:
    """The shingles of chosen rows, read from disk."""

    def __init__(self, spool: Spool, further: Spool | None, wanted: Numbers) -> None:
        self._offset: dict[int, tuple[Spool, int]] = {}
        chosen = set(wanted.tolist())
        number = 0
        for part in (spool, further):
            for offset in part.offsets() if part else ():
                if number in chosen and part is not None:
                    self._offset[number] = part, offset
                number += 1
        self._of = functools.lru_cache(maxsize=20_000)(self._read)

    def __call__(self, number: int) -> set[str]:
        return self._of(number)

    def _read(self, number: int) -> set[str]:
        spool, offset = self._offset[number]
        return shingles(spool.at(offset).joined())


def _both(spool: Spool, further: Spool | None) -> Iterator[Row]:
    yield from spool
    yield from further or ()


def first_of_each(keys: Any) -> Numbers:
    """For each row the number of the first row with the same key, `[N]`."""
    import numpy as np

    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    found: Numbers = first[inverse]
    return found
