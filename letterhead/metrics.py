"""Classification figures and comparisons, from scikit-learn and statsmodels, and bootstrap intervals."""

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, precision_recall_fscore_support
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

BOOTSTRAP_DRAWS = 2000
PAIRED_DRAWS = 10_000  # more, so that a p-value can survive its correction for many pairs
ECE_BINS = 15
NO_ANSWER = -1


def f1_macro(confusion: np.ndarray) -> np.ndarray:
    """Macro F1 of confusion matrices (rows true, columns predicted), shape (…, classes, columns) → (…).

    Columns beyond the classes are answers that name no class. F1 of a class is 2 TP / (2 TP + FP + FN); the mean is over
    the classes that are true or predicted at least once, as scikit-learn's is.
    """
    return _mean_f1(np.diagonal(confusion, axis1=-2, axis2=-1), _either(confusion))


def _either(confusion: np.ndarray) -> np.ndarray:
    """How often each class is true plus how often it is predicted: 2 TP + FP + FN."""
    return confusion.sum(-1) + confusion.sum(-2)[..., : confusion.shape[-2]]


def _mean_f1(hits: np.ndarray, either: np.ndarray) -> np.ndarray:
    f1 = np.divide(2 * hits, either, out=np.zeros(hits.shape), where=either > 0)
    return f1.sum(-1) / (either > 0).sum(-1)


def f1_macro_ci95(confusion: np.ndarray, seed: int) -> list[float]:
    """95 % percentile bootstrap interval of macro F1 (Efron & Tibshirani 1993, ch. 13).

    To draw rows with replacement is to draw the cells of their confusion matrix from a multinomial distribution.
    """
    n = int(confusion.sum())
    draws = np.random.default_rng(seed).multinomial(n, confusion.ravel() / n, size=BOOTSTRAP_DRAWS)
    return np.percentile(f1_macro(draws.reshape(-1, *confusion.shape)), [2.5, 97.5]).tolist()


def f1_difference(
    truth: np.ndarray, a: np.ndarray, b: np.ndarray, classes: int, seed: int
) -> tuple[float, list[float], float]:
    """Macro F1 of predictions `a` minus that of `b` on the same rows, with a paired bootstrap over rows.

    Parameters
    ----------
    truth, a, b : class numbers, shape (rows,); NO_ANSWER in a prediction names no class

    Returns
    -------
    tuple : the difference; its 95 % percentile interval; the two-sided p-value, twice the smaller share of draws on
        either side of 0, with one added to draws and hits (Davison & Hinkley 1997, §4.2)
    """
    cells, counts = np.unique(np.stack([truth, a, b]), axis=1, return_counts=True)
    true = np.eye(classes)[cells[0]]

    def f1(draws: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        named = np.eye(classes + 1)[predicted][:, :classes]  # NO_ANSWER, -1, falls on the column that is cut off
        return _mean_f1(draws @ (true * named), draws @ (true + named))

    draws = np.random.default_rng(seed).multinomial(len(truth), counts / len(truth), size=PAIRED_DRAWS)
    differences = f1(draws, cells[1]) - f1(draws, cells[2])
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    p = min(1.0, 2 * (tail + 1) / (PAIRED_DRAWS + 1))
    observed = f1(counts[None], cells[1]) - f1(counts[None], cells[2])
    return float(observed[0]), np.percentile(differences, [2.5, 97.5]).tolist(), float(p)


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error in `ECE_BINS` equal-width bins (Naeini et al. 2015); both of shape (rows,).

    The share of rows in a bin times the distance between its accuracy and its mean confidence, summed over the bins. (Ours,
    since to import torchmetrics, which the tests hold this against, takes three seconds of every stage.)
    """
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    return float(np.abs(np.bincount(bins, weights=right - confidence)).sum() / len(right))


def mcnemar_p(a_right: np.ndarray, b_right: np.ndarray) -> float:
    """McNemar's exact test that two methods are right equally often, from booleans a row (McNemar 1947; statsmodels)."""
    table = [[np.sum(a_right & b_right), np.sum(a_right & ~b_right)], [np.sum(~a_right & b_right), 0]]
    return float(mcnemar(table, exact=True).pvalue)


def holm(p_values: list[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979; statsmodels)."""
    return multipletests(p_values, method="holm")[1].tolist() if p_values else []


def classification_figures(
    truth: np.ndarray,
    labels: list[str],
    seed: int,
    probabilities: np.ndarray | None = None,
    predicted: np.ndarray | None = None,
) -> dict:
    """Accuracy, macro precision, recall and F1 with its interval, figures per class, and expected calibration error.

    Parameters
    ----------
    truth : class numbers, shape (rows,)
    labels : the classes' names
    seed : of the bootstrap
    probabilities : shape (rows, classes)
    predicted : class numbers or NO_ANSWER, shape (rows,); without them the most probable class

    Returns
    -------
    dict : keys as in a result file (accuracy, precision_macro, …, per_class, ece), `log_loss`, and `confusion`, whose
        rows are the true classes and whose columns the predicted ones, with one more for rows without an answer, if any
    """
    if predicted is None:
        predicted = probabilities.argmax(axis=1)
    numbers = np.arange(len(labels))
    given = np.where(predicted == NO_ANSWER, len(labels), predicted)
    confusion = confusion_matrix(truth, given, labels=[*numbers, len(labels)])[: len(labels)]
    if not confusion[:, -1].any():
        confusion = confusion[:, :-1]
    present = numbers[_either(confusion) > 0]
    precision, recall, f1, support = precision_recall_fscore_support(truth, given, labels=numbers, zero_division=0)
    macro = precision_recall_fscore_support(truth, given, labels=present, average="macro", zero_division=0)
    ece = entropy = None
    if probabilities is not None:
        ece = calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == truth)
        entropy = float(log_loss(truth, probabilities, labels=numbers))
    return {
        "n": len(truth),
        "accuracy": float(accuracy_score(truth, given)),
        "precision_macro": float(macro[0]),
        "recall_macro": float(macro[1]),
        "f1_macro": float(macro[2]),
        "f1_macro_ci95": f1_macro_ci95(confusion, seed),
        "ece": ece,
        "log_loss": entropy,
        "confusion": confusion.tolist(),
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "n": int(s)}
            for name, p, r, f, s in zip(labels, precision, recall, f1, support, strict=True)
        },
    }
