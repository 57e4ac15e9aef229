"""Figures equal scikit-learn's and torchmetrics'; the bootstrap interval covers what it should."""

import numpy as np
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_score, recall_score
from torchmetrics.classification import MulticlassCalibrationError

from letterhead.metrics import classification_figures, f1_macro, f1_macro_ci95


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
        figures = classification_figures(truth, probabilities, list("abcde"), seed)
        assert figures["accuracy"] == accuracy_score(truth, predicted)
        assert abs(figures["f1_macro"] - f1_score(truth, predicted, average="macro")) < 1e-12
        assert abs(figures["precision_macro"] - precision_score(truth, predicted, average="macro")) < 1e-12
        assert abs(figures["recall_macro"] - recall_score(truth, predicted, average="macro")) < 1e-12
        reference = MulticlassCalibrationError(num_classes=5, n_bins=15, norm="l1")
        assert abs(figures["ece"] - reference(torch.tensor(probabilities), torch.tensor(truth)).item()) < 1e-6


def test_macro_f1_of_a_confusion_matrix_is_scikit_learns_also_with_absent_classes():
    for seed in range(20):
        truth, probabilities = drawn(seed, 12, 6, skill=0.3)
        predicted = probabilities.argmax(1)
        confusion = confusion_matrix(truth, predicted, labels=range(6))
        assert abs(f1_macro(confusion) - f1_score(truth, predicted, average="macro", zero_division=0)) < 1e-12


def test_the_interval_is_seeded_and_covers_in_simulation():
    rng = np.random.default_rng(0)
    cells = np.full((4, 4), 0.02)
    np.fill_diagonal(cells, 0.19)
    true_f1 = f1_macro(cells)
    covered = 0
    for trial in range(200):
        confusion = rng.multinomial(500, cells.ravel() / cells.sum()).reshape(4, 4)
        low, high = f1_macro_ci95(confusion, seed=trial)
        covered += low <= true_f1 <= high
    assert 0.90 <= covered / 200 <= 0.99
    assert f1_macro_ci95(confusion, 1) == f1_macro_ci95(confusion, 1)
