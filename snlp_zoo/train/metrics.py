"""Scores of predictions against labels, and of the probabilities of a text."""

import math
from collections.abc import Sequence

import numpy as np


def metrics_of(label_names: list[str] | None) -> list[str]:
    """What `score` gives for these classes, or for a regression (None)."""
    if label_names is None:
        return ["pearson", "spearman"]
    return ["accuracy", "macro_f1", "matthews", *(["f1"] if len(label_names) == 2 else [])]


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews correlation for classes (integer labels), of two classes also the F1 of class 1
    (MRPC's measure); Pearson and Spearman correlation for regression.

    Args:
        logits: [examples, classes], or [examples, 1] for regression.
        labels: [examples].
    Returns:
        Metric name -> value in [0, 1] (correlations in [-1, 1]); the first one chooses the best checkpoint, unless
        `train.metric_for_best_model` names another.
    """
    if np.issubdtype(labels.dtype, np.floating):
        from scipy.stats import pearsonr, spearmanr

        predictions = logits[:, 0]
        if predictions.min() == predictions.max() or labels.min() == labels.max():
            return {"pearson": 0.0, "spearman": 0.0}  # undefined; not a number would never be beaten
        return {
            "pearson": float(pearsonr(predictions, labels).statistic),
            "spearman": float(spearmanr(predictions, labels).statistic),
        }
    from sklearn.metrics import f1_score, matthews_corrcoef

    predictions = logits.argmax(-1)
    several = len(np.union1d(labels, predictions)) > 1  # of one class it is 0 too, but scikit-learn warns
    matthews = float(matthews_corrcoef(labels, predictions)) if several else 0.0
    scores = score_classes(predictions, labels) | {"matthews": matthews}
    two = {"f1": float(f1_score(labels, predictions, zero_division=0))} if logits.shape[1] == 2 else {}
    return scores | two


def score_classes(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy and macro F1 of predicted classes."""
    from sklearn.metrics import accuracy_score, f1_score

    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "macro_f1": float(f1_score(labels, predictions, average="macro", zero_division=0)),
    }


def score_language(nats: float, tokens: int, utf8_bytes: int, characters: int) -> dict[str, float]:
    """How well a text was predicted, from the sum of -ln p over its tokens.

    Args:
        utf8_bytes, characters: of the text that the tokens make up; see `data.streams.Stream`.
    Returns:
        negative_loss (minus the mean nats per token, which chooses the best checkpoint), perplexity (per token),
        bits_per_byte, bits_per_character.
    """
    loss, bits = nats / tokens, nats / math.log(2)
    return {
        "negative_loss": -loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,  # beyond the range of a float
        "bits_per_byte": bits / utf8_bytes,
        "bits_per_character": bits / characters,
    }


def bag_of_words_baseline(
    train_texts: list[str], train_labels: Sequence[float], test_texts: list[str], test_labels: Sequence[float]
) -> dict[str, float]:
    """Test scores of TF-IDF word and bigram features with logistic regression: what a spiking model has to beat."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model = make_pipeline(vectorizer, LogisticRegression(C=4.0, max_iter=1000))
    model.fit(train_texts, train_labels)
    return score_classes(np.asarray(model.predict(test_texts)), np.asarray(test_labels))
