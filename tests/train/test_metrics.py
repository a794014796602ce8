import math

import numpy as np
import pytest

from snlp_zoo.train.metrics import bag_of_words_baseline, metrics_of, score


def test_classes_by_hand():
    logits = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    found = score(logits, np.array([0, 1, 2, 2]))
    assert next(iter(found)) == "accuracy"  # the first one chooses the best checkpoint
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_correlations_by_hand():
    found = score(np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0]))
    assert next(iter(found)) == "pearson"
    assert found["pearson"] == pytest.approx(3 / math.sqrt(2 * 14 / 3))
    assert found["spearman"] == pytest.approx(1)


def test_constant_predictions_of_a_regression_are_a_score_like_any_other():
    """Not a number would never be beaten by a later, better checkpoint."""
    found = score(np.ones((4, 1), dtype=np.float32), np.array([0.0, 1.0, 2.0, 3.0], dtype=np.float32))
    assert found == {"pearson": 0.0, "spearman": 0.0}


def test_the_baseline_learns_from_words():
    texts, labels = ["good fine", "bad poor", "fine good", "poor bad"] * 4, [1, 0, 1, 0] * 4
    found = bag_of_words_baseline(texts, labels, ["good", "poor"], [1, 0])
    assert found == {"accuracy": 1.0, "macro_f1": 1.0}


def test_two_classes_by_hand():
    """3 true positives, 1 false one, 2 true negatives, 1 false one."""
    predicted, labels = [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 1]
    found = score(np.eye(2)[predicted], np.array(labels))
    assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert found["matthews"] == pytest.approx((3 * 2 - 1 * 1) / math.sqrt(4 * 4 * 3 * 3))
    assert "f1" not in score(np.eye(3)[predicted], np.array(labels))
    assert score(np.eye(2)[[1, 1]], np.array([0, 1]))["matthews"] == 0.0  # undefined: one class alone is predicted


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_metrics_of_a_task(classes):
    logits = np.eye(6, classes) if classes > 1 else np.arange(6.0)[:, None]
    labels = np.arange(6) % classes if classes > 1 else np.arange(6.0)
    assert list(score(logits, labels)) == metrics_of(None if classes == 1 else ["x"] * classes)


def test_one_class_alone_is_scored_without_a_warning():
    everything = {"accuracy": 1.0, "macro_f1": 1.0, "matthews": 0.0}
    assert score(np.eye(2)[[1, 1, 1]], np.array([1, 1, 1])) == everything | {"f1": 1.0}
    assert score(np.eye(2)[[0, 0, 0]], np.array([0, 0, 0])) == everything | {"f1": 0.0}
