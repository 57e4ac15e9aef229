"""Figures equal scikit-learn's, scipy's and torchmetrics'; the bootstrap interval covers what it should."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, precision_score, recall_score
from torchmetrics.classification import MulticlassCalibrationError

from letterhead.metrics import NO_ANSWER, classification_figures, f1_difference, f1_macro, f1_macro_ci95, holm, mcnemar_p


def drawn(seed: int, n: int, classes: int, skill: float = 0.7):
    rng = np.random.default_rng(seed)
    truth = rng.integers(classes, size=n)
    score = rng.normal(size=(n, classes))
    score[np.arange(n), truth] += skill * 2
    odds = np.exp(score)
    return truth, odds / odds.sum(1, keepdims=True)


def test_figures_equal_the_references():
    for seed in range(5):
        truth, probabilities = drawn(seed, 200, 5)
        predicted = probabilities.argmax(1)
        figures = classification_figures(truth, list("abcde"), seed, probabilities)
        assert figures["accuracy"] == accuracy_score(truth, predicted)
        assert abs(figures["f1_macro"] - f1_score(truth, predicted, average="macro")) < 1e-12
        assert abs(figures["precision_macro"] - precision_score(truth, predicted, average="macro")) < 1e-12
        assert abs(figures["recall_macro"] - recall_score(truth, predicted, average="macro")) < 1e-12
        assert abs(figures["log_loss"] - log_loss(truth, probabilities)) < 1e-9
        reference = MulticlassCalibrationError(num_classes=5, n_bins=15, norm="l1")
        assert abs(figures["ece"] - reference(torch.tensor(probabilities), torch.tensor(truth)).item()) < 1e-6
        assert abs(figures["ece"] - plain_ece(truth, probabilities)) < 1e-6


def plain_ece(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """Expected calibration error in 15 equal-width bins, from its definition (Naeini et al. 2015)."""
    confidence, right, error = probabilities.max(1), probabilities.argmax(1) == truth, 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


def test_a_certain_prediction_falls_into_the_last_bin_of_the_calibration_error():
    truth, probabilities = drawn(0, 200, 3)
    probabilities[:50] = np.eye(3)[truth[:50]]
    probabilities[50:60] = np.eye(3)[(truth[50:60] + 1) % 3]
    figures = classification_figures(truth, list("abc"), 0, probabilities)
    assert abs(figures["ece"] - plain_ece(truth, probabilities)) < 1e-6


def test_macro_f1_of_a_confusion_matrix_is_scikit_learns_also_with_absent_classes():
    for seed in range(20):
        truth, probabilities = drawn(seed, 12, 6, skill=0.3)
        predicted = probabilities.argmax(1)
        confusion = confusion_matrix(truth, predicted, labels=range(6))
        assert abs(f1_macro(confusion) - f1_score(truth, predicted, average="macro", zero_division=0)) < 1e-12


def test_rows_without_an_answer_are_wrong_and_no_class_of_their_own():
    truth, probabilities = drawn(0, 300, 4)
    predicted = np.where(np.arange(300) % 5 == 0, NO_ANSWER, probabilities.argmax(1))
    figures = classification_figures(truth, list("abcd"), 0, predicted=predicted)
    options = {"labels": range(4), "average": "macro", "zero_division": 0}
    assert figures["accuracy"] == np.mean(predicted == truth)
    assert abs(figures["f1_macro"] - f1_score(truth, predicted, **options)) < 1e-12
    assert abs(figures["recall_macro"] - recall_score(truth, predicted, **options)) < 1e-12
    assert np.array(figures["confusion"]).shape == (4, 5) and np.sum(figures["confusion"]) == 300
    assert abs(f1_macro(np.array(figures["confusion"])) - figures["f1_macro"]) < 1e-12
    assert figures["ece"] is None and figures["f1_macro_ci95"][0] < figures["f1_macro"] < figures["f1_macro_ci95"][1]


def test_the_paired_bootstrap_equals_one_that_draws_rows():
    truth, strong = drawn(1, 250, 3, skill=1.0)
    _, other = drawn(2, 250, 3, skill=0.0)
    a, b = strong.argmax(1), np.where(np.arange(250) % 3, strong.argmax(1), other.argmax(1))
    b[::40] = NO_ANSWER

    def difference(rows):
        options = {"labels": range(3), "average": "macro", "zero_division": 0}
        return f1_score(truth[rows], a[rows], **options) - f1_score(truth[rows], b[rows], **options)

    found, interval, p = f1_difference(truth, a, b, 3, seed=0)
    assert abs(found - difference(np.arange(250))) < 1e-12
    rng = np.random.default_rng(5)
    draws = [difference(rng.integers(250, size=250)) for _ in range(1500)]
    assert np.abs(np.percentile(draws, [2.5, 97.5]) - interval).max() < 0.012
    assert p < 0.01 and f1_difference(truth, a, a, 3, seed=0) == (0.0, [0.0, 0.0], 1.0)


def test_mcnemar_is_the_binomial_test_of_the_rows_on_which_they_differ():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.random(80) < 0.8, rng.random(80) < 0.7
        only_a, only_b = int(np.sum(a & ~b)), int(np.sum(~a & b))
        assert abs(mcnemar_p(a, b) - binomtest(only_a, only_a + only_b, 0.5).pvalue) < 1e-9
    assert mcnemar_p(a, a) == 1


def test_holm_multiplies_by_the_number_of_tests_still_standing():
    assert np.allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


R8 = np.array([1596, 253, 2840, 41, 190, 206, 108, 251]) / 5485  # the mix of its training split


@pytest.mark.parametrize(("mix", "n", "band"), [(np.full(4, 0.25), 2000, (0.93, 0.97)), (R8, 2189, (0.90, 0.97))])
def test_the_interval_covers_in_simulation(mix, n, band):
    """The share of 1,000 simulated test sets whose interval holds the true macro F1; `pytest -s` prints it."""
    rng, classes = np.random.default_rng(0), len(mix)
    shares = np.full((classes, classes), 0.12 / (classes - 1))
    np.fill_diagonal(shares, 0.88)
    cells = mix[:, None] * shares
    covered = 0
    for trial in range(1000):
        low, high = f1_macro_ci95(rng.multinomial(n, cells.ravel()).reshape(classes, classes), seed=trial)
        covered += low <= f1_macro(cells) <= high
    print(f"{classes} classes, n = {n}: {covered / 10:.1f} % covered")
    assert band[0] <= covered / 1000 <= band[1]


def test_the_interval_is_seeded():
    confusion = np.array([[40, 3], [5, 30]])
    assert f1_macro_ci95(confusion, 1) == f1_macro_ci95(confusion, 1) != f1_macro_ci95(confusion, 2)
