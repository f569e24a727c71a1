"""Sources with shares: which rows of each source are in an epoch.

    mixture = Mixture.of(source_of_row, shares=[0.7, 0.3])
    mixture.rows(seed=0, epoch=2)          # row numbers; 70 % of them are of the first source

A share is of examples. An epoch is the largest number of examples in which the shares hold and no row stands twice. So
the source that is scarce for its share is used whole, and of every other one an epoch takes a part: the next part of a
random order of its rows, so that later epochs bring rows that earlier ones left out. All of this derives from
`(seed, source, epoch)`, like the order of rows, so a resumed run takes the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lmtune.config.schema import DataSource
from lmtune.errors import DataError

Int64 = npt.NDArray[np.int64]
_ORDER = 0x50BC  # keeps these random numbers apart from those of the order of rows


@dataclass(frozen=True, eq=False)
class Mixture:
    """How N rows of S sources are mixed.

    Attributes:
        source: int `[N]`, of each row.
        taken: examples of each source in an epoch.
    """

    source: npt.NDArray[np.integer]
    taken: tuple[int, ...]

    @property
    def sizes(self) -> list[int]:
        """Rows of each source."""
        return [len(members) for members in self._members]

    @property
    def num_rows(self) -> int:
        """Examples of an epoch."""
        return sum(self.taken)

    @cached_property
    def _members(self) -> list[Int64]:
        return [np.flatnonzero(self.source == source) for source in range(len(self.taken))]

    def rows(self, seed: int, epoch: int) -> Int64:
        """The rows of an epoch, source after source."""
        parts = []
        for source, (members, count) in enumerate(zip(self._members, self.taken, strict=True)):
            epochs = len(members) // count  # that one order of the rows serves without a row twice
            order = np.random.default_rng([seed, _ORDER, source, epoch // epochs]).permutation(len(members))
            first = epoch % epochs * count
            parts.append(members[order[first : first + count]])
        return np.concatenate(parts)


def mix(sources: Sequence[DataSource], source: npt.NDArray[np.integer]) -> Mixture | None:
    """The mixture that the shares of `sources` ask for; None if none has a share. `source` is that of each row.

    Raises:
        DataError: a source is left without rows, or has too few for its share to be one example.
    """
    if all(one.share is None for one in sources):
        return None
    sizes = np.bincount(source, minlength=len(sources)).tolist()
    for one, size in zip(sources, sizes, strict=True):
        if not size:
            raise DataError(f"{one.path}: no row is left of this source; remove it, or give it rows")
    given = sum(one.share or 0.0 for one in sources)
    rest = sum(size for one, size in zip(sources, sizes, strict=True) if one.share is None)
    shares = [
        one.share if one.share is not None else (1 - given) * size / rest
        for one, size in zip(sources, sizes, strict=True)
    ]
    total = min(size / share for size, share in zip(sizes, shares, strict=True))
    taken = tuple(min(size, int(total * share + 0.5)) for size, share in zip(sizes, shares, strict=True))
    for one, share, count in zip(sources, shares, taken, strict=True):
        if not count:
            raise DataError(
                f"{one.path}: a share of {share:g} is not one of the {int(total)} examples of an epoch, which are so "
                "few because another source is small; raise the share, or leave this source out"
            )
    return Mixture(source, taken)
