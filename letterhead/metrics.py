"""Classification figures, from scikit-learn and torchmetrics, and a bootstrap interval for macro F1."""

import numpy as np
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from torchmetrics.functional.classification import multiclass_calibration_error

BOOTSTRAP_DRAWS = 2000
ECE_BINS = 15


def f1_macro(confusion: np.ndarray) -> np.ndarray:
    """Macro F1 of confusion matrices (rows true, columns predicted), shape (…, classes, classes) → (…).

    F1 of a class is 2 TP / (2 TP + FP + FN); the mean is over the classes that are true or predicted at least once, as
    scikit-learn's is.
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    either = confusion.sum(-1) + confusion.sum(-2)  # 2 TP + FP + FN
    f1 = np.divide(2 * hits, either, out=np.zeros(hits.shape), where=either > 0)
    return f1.sum(-1) / (either > 0).sum(-1)


def f1_macro_ci95(confusion: np.ndarray, seed: int) -> list[float]:
    """95 % percentile bootstrap interval of macro F1 (Efron & Tibshirani 1993, ch. 13).

    To draw rows with replacement is to draw the cells of their confusion matrix from a multinomial distribution.
    """
    n = int(confusion.sum())
    draws = np.random.default_rng(seed).multinomial(n, confusion.ravel() / n, size=BOOTSTRAP_DRAWS)
    return np.percentile(f1_macro(draws.reshape(-1, *confusion.shape)), [2.5, 97.5]).tolist()


def classification_figures(truth: np.ndarray, probabilities: np.ndarray, labels: list[str], seed: int) -> dict:
    """Accuracy, macro precision, recall and F1 with its interval, figures per class, and expected calibration error.

    Parameters
    ----------
    truth : class numbers, shape (rows,)
    probabilities : shape (rows, classes); the prediction is the most probable class
    labels : the classes' names
    seed : of the bootstrap

    Returns
    -------
    dict : keys as in a result file (accuracy, precision_macro, …, per_class, confusion, ece)
    """
    predicted = probabilities.argmax(axis=1)
    numbers = np.arange(len(labels))
    confusion = confusion_matrix(truth, predicted, labels=numbers)
    precision, recall, f1, support = precision_recall_fscore_support(truth, predicted, labels=numbers, zero_division=0)
    macro = precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0)
    ece = multiclass_calibration_error(
        torch.from_numpy(probabilities), torch.from_numpy(truth), num_classes=len(labels), n_bins=ECE_BINS, norm="l1"
    )
    return {
        "n": len(truth),
        "accuracy": float(accuracy_score(truth, predicted)),
        "precision_macro": float(macro[0]),
        "recall_macro": float(macro[1]),
        "f1_macro": float(macro[2]),
        "f1_macro_ci95": f1_macro_ci95(confusion, seed),
        "ece": float(ece),
        "confusion": confusion.tolist(),
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "n": int(s)}
            for name, p, r, f, s in zip(labels, precision, recall, f1, support, strict=True)
        },
    }
