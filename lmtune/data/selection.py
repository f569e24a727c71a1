"""Which rows a run trains on and is scored on, where its settings alone do not say it: folds, bootstrap, boosting.

    selection = Selection(train=(0, 2, 2, 3), validation=(1,), weights=(1.0, 0.5, 0.5, 2.0))
    data = load_data(config.data, renderer, seed).selected(selection, config.data)

Numbers count the rows that `load_data` gives to train on, from 0. A run with a selection is, bit for bit, the run on a
file that holds these rows in this order.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard


@dataclass(frozen=True)
class Selection:
    """Rows by number.

    Attributes:
        train: to train on, in this order; a row that stands here twice is two examples.
        validation: to be scored on; None leaves what the settings hold out.
        weights: of each of `train`, above 0, times the row's own; None leaves these.
    """

    train: tuple[int, ...]
    validation: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.train or min((*self.train, *(self.validation or ()))) < 0:
            raise ValueError("train: expected rows to train on, by numbers from 0 on")
        weights = self.weights
        if weights is not None and len(weights) != len(self.train):
            raise ValueError(f"weights: got {len(weights)}; expected one for each of {len(self.train)} rows")
        if weights is not None and not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError("weights: expected numbers above 0; leave a row of weight 0 out")

    @property
    def highest(self) -> int:
        """The highest number of a row."""
        return max((*self.train, *(self.validation or ())))

    @property
    def sha256(self) -> str:
        """In hex; equal for equal selections."""
        digest = hashlib.sha256()
        for kind, values in (("q", self.train), ("q", self.validation), ("d", self.weights)):
            digest.update(b"none" if values is None else f"{len(values)} ".encode() + array(kind, values).tobytes())
        return digest.hexdigest()

    def to_dict(self) -> dict[str, object]:
        """As JSON."""
        return {"train": self.train, "validation": self.validation, "weights": self.weights}

    @classmethod
    def from_dict(cls, tree: Mapping[str, object]) -> Selection:
        """The inverse of `to_dict`; ValueError if the tree is no selection."""
        train, validation, weights = (tree.get(name) for name in ("train", "validation", "weights"))
        if not _are(train, int) or not (validation is None or _are(validation, int)):
            raise ValueError("train, validation: expected lists of row numbers")
        if not (weights is None or _are(weights, (int, float))):
            raise ValueError("weights: expected a list of numbers")
        return cls(tuple(train), *(None if part is None else tuple(part) for part in (validation, weights)))


def _are(values: object, kind: type | tuple[type, ...]) -> TypeGuard[list[Any]]:
    return isinstance(values, list) and all(isinstance(value, kind) and value is not True for value in values)
