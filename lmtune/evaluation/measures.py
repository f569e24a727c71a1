"""What a classifier's outputs are worth on labelled rows: F1 and confusion of classes, AUC, R² and rank correlation.

Exact and in NumPy; the definitions are those of scikit-learn, https://scikit-learn.org/stable/modules/model_evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmtune.models.head import Head

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassScores:
    """K classes, each for itself.

    Attributes:
        labels: `[K]`, their names.
        precision, recall, f1: `[K]`, shares from 0 to 1; 0 where nothing is there to divide by.
        rows: `[K]`, how many rows have each.
        confusion: `[K][K]`, rows of each class (first index) by the class that was predicted; None where rows have
            several classes.
    """

    labels: tuple[str, ...]
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    f1: tuple[float, ...]
    rows: tuple[int, ...]
    confusion: tuple[tuple[int, ...], ...] | None


def measure(head: Head, scores: Float64, targets: Float64) -> tuple[dict[str, float], ClassScores | None]:
    """Metrics by name, and of classes each for itself.

    Args:
        head: what the outputs are.
        scores: `[N, K]`.
        targets: the class or the value of each row `[N]`, or which classes it has `[N, K]`.
    """
    if not head.is_classes:
        return _defined({"r2": r_squared(scores[:, 0], targets), "spearman": spearman(scores[:, 0], targets)}), None
    count = len(head.labels)
    if head.kind == "single_label":
        confusion: Int64 | None = confusion_matrix(scores.argmax(-1), targets.astype(np.int64), count)
        assert confusion is not None
        right, found, there = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
    else:
        predicted, confusion = scores > 0, None
        right, found, there = (predicted & (targets > 0)).sum(0), predicted.sum(0), (targets > 0).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall, f1 = (np.nan_to_num(x) for x in (right / found, right / there, 2 * right / (found + there)))
    occurring = (found + there) > 0
    metrics: dict[str, float | None] = {"macro_f1": float(f1[occurring].mean()) if occurring.any() else None}
    if head.kind == "single_label" and count == 2:
        metrics["auc"] = roc_auc(scores[:, 1] - scores[:, 0], targets > 0)
    each = ClassScores(
        head.labels, tuple(precision.tolist()), tuple(recall.tolist()), tuple(f1.tolist()), tuple(there.tolist()),
        None if confusion is None else tuple(map(tuple, confusion.tolist())),
    )  # fmt: skip
    return _defined(metrics), each


def confusion_matrix(predicted: Int64, right: Int64, count: int) -> Int64:
    """`[K, K]`: how many rows of each right class (first index) were taken for each class."""
    return np.bincount(right * count + predicted, minlength=count**2).reshape(count, count)


def roc_auc(scores: Float64, positive: npt.NDArray[np.bool_]) -> float | None:
    """The share of pairs, one of each class, in which the positive row has the higher score; equal ones count half.

    None where a class has no row.
    """
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return None
    above = ranks(scores)[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * num_negative))


def r_squared(predicted: Float64, right: Float64) -> float | None:
    """1 less the share of the variance that is left; None where all right values are equal."""
    variance = np.square(right - right.mean()).sum()
    return None if variance == 0 else float(1 - np.square(right - predicted).sum() / variance)


def spearman(one: Float64, other: Float64) -> float | None:
    """The correlation of ranks; None where all values of a side are equal."""
    first, second = (ranks(values) - (len(values) + 1) / 2 for values in (one, other))
    norm = np.sqrt(np.square(first).sum() * np.square(second).sum())
    return None if norm == 0 else float(first @ second / norm)


def ranks(values: Float64) -> Float64:
    """`[N]` from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean: Float64 = np.cumsum(counts) - (counts - 1) / 2
    return mean[place]


def majority(head: Head, targets: Float64, weights: Float64) -> Float64:
    """`[K]`: the outputs that fit rows best which are all given the same: how often each class is, or the mean value.

    Args:
        head: what the outputs are.
        targets: of the training rows, as in `measure`.
        weights: `[N]`, of these rows.
    """
    if not head.is_classes:
        return np.array([np.average(targets, weights=weights)])
    if head.kind == "single_label":
        shares = np.bincount(targets.astype(np.int64), weights, len(head.labels)) / weights.sum()
        return np.asarray(np.log(np.maximum(shares, 1e-6)))
    shares = np.clip(weights @ targets / weights.sum(), 1e-6, 1 - 1e-6)
    return np.asarray(np.log(shares / (1 - shares)))


def _defined(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if value is not None}
