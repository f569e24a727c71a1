"""Measures of classes and values against figures worked out by hand, and the relations that define them."""

import numpy as np
import pytest

from lmtune.evaluation.measures import confusion_matrix, majority, measure, r_squared, ranks, roc_auc, spearman
from lmtune.models.head import Head

LABELS = ("a", "b", "c")
RIGHT = np.array([0, 0, 0, 1, 1, 2])
TAKEN = np.array([0, 0, 1, 1, 2, 2])


def test_classes_each_for_itself() -> None:
    metrics, each = measure(Head("single_label", LABELS), np.eye(3)[TAKEN], RIGHT.astype(float))
    assert each is not None
    assert each.confusion == ((2, 1, 0), (0, 1, 1), (0, 0, 1))
    assert each.rows == (3, 2, 1)
    assert each.precision == pytest.approx((1, 0.5, 0.5))
    assert each.recall == pytest.approx((2 / 3, 0.5, 1))
    assert each.f1 == pytest.approx((0.8, 0.5, 2 / 3))
    assert metrics == {"macro_f1": pytest.approx((0.8 + 0.5 + 2 / 3) / 3)}


def test_a_class_that_does_not_occur_has_no_part_in_the_mean() -> None:
    metrics, each = measure(Head("single_label", LABELS), np.eye(3)[[0, 0, 1]], np.array([0.0, 1, 1]))
    assert each is not None
    assert each.f1 == pytest.approx((2 / 3, 2 / 3, 0))
    assert metrics["macro_f1"] == pytest.approx(2 / 3)


def test_rows_of_several_classes() -> None:
    right = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=float)
    metrics, each = measure(Head("multi_label", LABELS), np.array([[2, 1, -1], [1, -1, -1], [-1, -1, -1.0]]), right)
    assert each is not None
    assert each.confusion is None
    assert each.f1 == pytest.approx((1, 0, 0))
    assert metrics == {"macro_f1": pytest.approx(0.5)}


def test_auc_is_the_share_of_pairs_in_order() -> None:
    generator = np.random.default_rng(0)
    scores, positive = generator.integers(0, 6, 40).astype(float), generator.random(40) < 0.4
    pairs = [(one > other) + (one == other) / 2 for one in scores[positive] for other in scores[~positive]]
    assert roc_auc(scores, positive) == pytest.approx(np.mean(pairs))
    assert roc_auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])) == 0.75
    assert roc_auc(scores, np.ones(40, dtype=bool)) is None
    two = Head("single_label", ("no", "yes"))
    metrics, _ = measure(two, np.stack([0 * scores, scores], 1), positive.astype(float))
    assert metrics["auc"] == pytest.approx(np.mean(pairs))


def test_values() -> None:
    right, found = np.array([3, -0.5, 2, 7]), np.array([2.5, 0.0, 2, 8])
    assert r_squared(found, right) == pytest.approx(0.948608, abs=1e-6)
    assert r_squared(found, np.ones(4)) is None
    assert spearman(np.array([1.0, 2, 3, 4, 5]), np.array([5.0, 6, 7, 8, 7])) == pytest.approx(0.8207826817)
    assert spearman(found, np.ones(4)) is None
    assert ranks(np.array([10.0, 20, 10, 30])).tolist() == [1.5, 3, 1.5, 4]
    metrics, each = measure(Head("value", ("value",)), found[:, None], right)
    assert metrics == {"r2": pytest.approx(0.948608, abs=1e-6), "spearman": pytest.approx(1.0)}
    assert each is None


def test_the_best_constant_output() -> None:
    """Its classes are the shares in the rows, by weight; its value is the mean."""
    scores = majority(Head("single_label", ("a", "b")), np.array([0.0, 1, 1]), np.array([1.0, 1, 2]))
    assert np.exp(scores) == pytest.approx([0.25, 0.75])
    several = majority(Head("multi_label", ("a", "b")), np.array([[1.0, 1], [0, 1]]), np.ones(2))
    assert 1 / (1 + np.exp(-several)) == pytest.approx([0.5, 1], abs=1e-5)
    assert majority(Head("value", ("value",)), np.array([1.0, 4]), np.array([2.0, 1])).tolist() == [2.0]
    assert confusion_matrix(TAKEN, RIGHT, 3).sum() == 6
