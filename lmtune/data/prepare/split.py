"""Rows to hold out, chosen by group, so that no training row tells a validation row's answer.

One group are rows with the same question, near duplicates, rows cut from one conversation, and the copies that
`lmtune augment` made of a row.
"""

from __future__ import annotations

from lmtune.data.prepare.duplicates import families, first_of_each, near_families
from lmtune.data.prepare.settings import Settings
from lmtune.data.prepare.spool import Spool
from lmtune.data.types import hash64
from lmtune.errors import DataError


def held_out_rows(spool: Spool, share: float, settings: Settings, no_near: bool) -> list[bool]:
    """For each row whether it is held out.

    Args:
        share: of the rows.
        no_near: near duplicates are dropped already.

    Raises:
        DataError: all rows are one group.
    """
    import numpy as np

    keys = np.array(
        [(hash64([row.question]), hash64([row.group or row.place])) for row in spool], dtype=np.uint64
    ).reshape(-1, 2)  # fmt: skip
    numbers = np.arange(len(keys))
    joined = [np.stack([numbers, first_of_each(keys[:, column])], axis=1) for column in range(2)]
    if not no_near:
        joined.append(np.stack([numbers, first_of_each(near_families(spool, settings.similarity))], axis=1))
    group = families(len(keys), np.concatenate(joined))
    sizes = np.bincount(group)
    if len(sizes) < 2:
        raise DataError("--validation: all rows have one question or are near duplicates; none can be held out")
    wanted = max(1, round(share * len(keys)))
    order = np.random.default_rng([settings.seed, 0x5EED]).permutation(len(sizes))
    fitting = order[sizes[order] <= max(wanted, sizes.min())]
    number = int(np.searchsorted(np.cumsum(sizes[fitting]), wanted)) + 1
    chosen = np.zeros(len(sizes), dtype=bool)
    chosen[fitting[: min(number, len(sizes) - 1)]] = True
    found: list[bool] = chosen[group].tolist()
    return found
