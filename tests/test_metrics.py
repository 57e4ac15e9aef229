"""Figures equal scikit-learn's, scipy's and torchmetrics'; intervals cover what they should."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, bootstrap, multinomial, ttest_ind
from sklearn.metrics import accuracy_score, f1_score, log_loss, precision_score, recall_score
from statsmodels.stats.proportion import proportion_confint
from torchmetrics.classification import MulticlassCalibrationError

from letterhead.stats.metrics import (
    NO_ANSWER,
    Metric,
    calibration_error,
    calibration_floor,
    classification_figures,
    f1_loss,
    holm,
    loss,
    macro_f1,
    mcnemar_p,
    plain,
    temperature,
    tempered,
)


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
        assert (
            abs(figures["precision_macro"] - precision_score(truth, predicted, average="macro"))
            < 1e-12
        )
        assert (
            abs(figures["recall_macro"] - recall_score(truth, predicted, average="macro")) < 1e-12
        )
        assert abs(figures["log_loss"] - log_loss(truth, probabilities)) < 1e-9
        reference = MulticlassCalibrationError(num_classes=5, n_bins=15, norm="l1")
        assert (
            abs(figures["ece"] - reference(torch.tensor(probabilities), torch.tensor(truth)).item())
            < 1e-6
        )
        assert abs(figures["ece"] - plain_ece(truth, probabilities)) < 1e-6


def plain_ece(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """Expected calibration error in 15 equal-width bins, from its definition (Naeini et al.
    2015)."""
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


def test_macro_figures_are_means_over_the_classes_that_have_rows():
    """One stray answer that names a class without a row would else cost 1 / classes of the
    score."""
    truth, predicted = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 1, 1, 2, 3])
    figures = classification_figures(truth, list("abcde"), 0, predicted=predicted)
    assert figures["f1_macro"] == f1_score(truth, predicted, labels=[0, 1, 2], average="macro")
    assert figures["f1_macro"] > f1_score(truth, predicted, average="macro")
    assert figures["recall_macro"] == recall_score(
        truth, predicted, labels=[0, 1, 2], average="macro"
    )


def test_rows_without_an_answer_are_wrong_and_no_class_of_their_own():
    truth, probabilities = drawn(0, 300, 4)
    predicted = np.where(np.arange(300) % 5 == 0, NO_ANSWER, probabilities.argmax(1))
    figures = classification_figures(truth, list("abcd"), 0, predicted=predicted)
    options = {"labels": range(4), "average": "macro", "zero_division": 0}
    assert figures["accuracy"] == np.mean(predicted == truth)
    assert abs(figures["f1_macro"] - f1_score(truth, predicted, **options)) < 1e-12
    assert abs(figures["recall_macro"] - recall_score(truth, predicted, **options)) < 1e-12
    assert np.array(figures["confusion"]).shape == (4, 5) and np.sum(figures["confusion"]) == 300
    assert (
        figures["ece"] is None
        and figures["f1_macro_ci95"][0] < figures["f1_macro"] < figures["f1_macro_ci95"][1]
    )


def pair(seed: int, n: int, classes: int):
    """Truth and two sets of predictions that share most of their errors; some rows have no
    answer."""
    truth, strong = drawn(seed, n, classes, skill=1.0)
    _, other = drawn(seed + 1, n, classes, skill=0.0)
    a, b = strong.argmax(1), np.where(np.arange(n) % 3, strong.argmax(1), other.argmax(1))
    b[::40] = NO_ANSWER
    return truth, a, b


def test_standard_errors_are_those_of_scipys_bootstrap_over_rows():
    truth, a, b = pair(1, 800, 3)
    options = {"labels": range(3), "average": "macro", "zero_division": 0}

    def lost(rows) -> float:
        rows = rows.astype(int)
        return f1_score(truth[rows], a[rows], **options) - f1_score(truth[rows], b[rows], **options)

    rows = (np.arange(800),)
    reference = bootstrap(
        rows, lost, n_resamples=1500, rng=np.random.default_rng(0), vectorized=False, method="basic"
    )
    found = f1_loss(truth, b[None], a[None], 3)
    assert (
        abs(found.se / reference.standard_error - 1) < 0.08
        and abs(found.value - lost(rows[0])) < 2e-3
    )

    def f1_of(rows):
        return f1_score(truth[rows.astype(int)], a[rows.astype(int)], **options)

    rng = np.random.default_rng(0)
    one = bootstrap(rows, f1_of, n_resamples=1500, rng=rng, vectorized=False, method="basic")
    assert abs(macro_f1(truth, a[None], 3).se / one.standard_error - 1) < 0.08
    assert found.p < 0.01 and f1_loss(truth, a[None], a[None], 3).p == 1


def test_nothing_has_an_interval_of_no_width():
    truth = np.arange(300) % 4
    for wrong in (0, 1, 6, 15, 60):  # Wilson's bounds, where macro F1 is the accuracy
        predicted = np.where(np.arange(300) < wrong, (truth + 1) % 4, truth)
        wilson = proportion_confint(300 - wrong, 300, method="wilson")
        found = np.clip(macro_f1(truth, predicted[None], 4).interval(0.025), 0, 1)
        assert np.abs(found - wilson).max() < 0.0015
    low, high = f1_loss(truth, truth[None], truth[None], 4).interval(0.025)
    assert -0.02 < low < -0.002 and 0.002 < high < 0.02
    assert (
        classification_figures(truth, list("abcd"), 0, predicted=truth)["f1_macro_ci95"][1] == 1.0
    )


def test_trainings_add_their_spread_to_the_error_of_the_rows():
    """As scipy's Welch test has it where rows say nothing."""
    rng = np.random.default_rng(0)
    truth = np.arange(40_000) % 2
    a, b = (
        [np.where(rng.random(40_000) < share, truth, 1 - truth) for share in of]
        for of in ((0.9, 0.93, 0.96), (0.8, 0.9))
    )
    found = f1_loss(truth, np.array(b), np.array(a), 2)
    values = [[f1_score(truth, one, average="macro") for one in of] for of in (a, b)]
    welch = ttest_ind(*values, equal_var=False)
    assert abs(found.value - (np.mean(values[0]) - np.mean(values[1]))) < 1e-3
    assert abs(found.training_df / welch.df - 1) < 0.02 and abs(found.p / welch.pvalue - 1) < 0.02
    assert f1_loss(truth, np.array(b[:1]), np.array(a[:1]), 2).training_df == np.inf


def test_the_calibration_error_stands_beside_what_a_perfect_one_would_show():
    rng, n = np.random.default_rng(0), 300
    confidence = rng.uniform(0.6, 1.0, n)
    shown = [calibration_error(confidence, rng.random(n) < confidence) for _ in range(300)]
    assert abs(calibration_floor(confidence, 1) - np.mean(shown)) < 0.003 and np.mean(shown) > 0.02


def test_a_temperature_is_found_where_confidence_is_wrong_and_hardly_moves_where_it_is_right():
    truth, probabilities = drawn(0, 2000, 4, skill=1.0)
    calibrated = tempered(probabilities, temperature(truth, probabilities))
    for at in (0.4, 3.0):  # too sure, too modest
        wrong = tempered(calibrated, at)
        found = temperature(truth[:400], wrong[:400])
        assert abs(found * at - 1) < 0.25
        assert log_loss(truth[400:], tempered(wrong, found)[400:]) < log_loss(
            truth[400:], wrong[400:]
        )
        assert (wrong.argmax(1) == tempered(wrong, found).argmax(1)).all()
    assert abs(temperature(truth, calibrated) - 1) < 0.01


def test_few_rows_hardly_move_a_temperature_and_all_right_makes_nobody_certain():
    truth, probabilities = drawn(0, 2000, 4, skill=1.0)
    few = [abs(math.log(temperature(truth[:n], probabilities[:n]))) for n in (0, 5)]
    assert few[0] == 0 and few[1] < 0.5
    right = np.full((50, 4), 0.05)
    right[np.arange(50), np.arange(50) % 4] = 0.85
    assert 0.3 < temperature(np.arange(50) % 4, right) < 0.7


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


@pytest.mark.parametrize(
    ("mix", "right", "n", "band"),
    [
        (np.full(4, 0.25), 0.88, 2000, (0.93, 0.97)),
        (R8, 0.88, 2189, (0.91, 0.97)),
        (R8, 0.95, 400, (0.88, 0.99)),
        (np.full(4, 0.25), 0.995, 300, (0.93, 1.0)),
    ],
)
def test_the_interval_covers_in_simulation(mix, right, n, band):
    """The share of 1,000 simulated test sets whose interval holds the true macro F1; `pytest -s`
    prints it."""
    rng, classes = np.random.default_rng(0), len(mix)
    shares = np.full((classes, classes), (1 - right) / (classes - 1))
    np.fill_diagonal(shares, right)
    cells = mix[:, None] * shares
    hits = np.diagonal(cells)
    f1, covered = 2 * hits / (cells.sum(0) + cells.sum(1)), 0
    for _ in range(1000):
        truth, predicted = np.divmod(rng.choice(classes**2, n, p=cells.ravel()), classes)
        low, high = macro_f1(truth, predicted[None], classes).interval(0.025)
        covered += low <= f1[np.unique(truth)].mean() <= high
    print(f"{classes} classes, accuracy {right}, n = {n}: {covered / 10:.1f} % covered")
    assert band[0] <= covered / 1000 <= band[1]


COSTS = np.array([[0, 1, 4, 4], [2, 0, 1, 2], [9, 1, 0, 9]], float)
METRICS = [
    Metric("macro_f1"),
    Metric("accuracy"),
    Metric("f1", 1),
    Metric("recall", 1),
    Metric("precision", 1),
    Metric("cost", costs=COSTS),
]


def by_sklearn(metric: Metric, truth: np.ndarray, predicted: np.ndarray) -> float:
    if metric.kind == "accuracy":
        return accuracy_score(truth, predicted)
    if metric.kind == "cost":
        return -COSTS[truth, predicted].mean()
    scores = {"macro_f1": f1_score, "f1": f1_score, "recall": recall_score}
    score = scores.get(metric.kind, precision_score)
    labels = [0, 1, 2] if metric.label is None else [metric.label]
    return score(truth, predicted, labels=labels, average="macro", zero_division=0)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.kind)
def test_a_metric_is_scikit_learns_and_its_influence_is_its_derivative(metric):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 60)
    predicted = np.where(rng.random(60) < 0.7, truth, rng.integers(-1, 3, 60))
    whole = plain(truth, predicted[None], 3, metric)
    assert whole == pytest.approx(by_sklearn(metric, truth, predicted), abs=1e-12)
    value, influence = metric.measure(truth, predicted, np.ones(60), 3)
    assert value == pytest.approx(whole) and abs(influence.mean()) < 1e-12
    for row in range(60):  # a row's weight, a little higher: the share of all of it moves as much
        weights = np.ones(60)
        weights[row] += 1e-6
        moved, _ = metric.measure(truth, predicted, weights, 3)
        assert (moved - value) / 1e-6 * 60 == pytest.approx(influence[row], abs=1e-3)


def test_the_recall_of_a_class_is_the_accuracy_on_its_rows():
    rng = np.random.default_rng(1)
    truth = np.repeat([0, 1], [400, 100])
    a, b = (np.where(rng.random(500) < share, truth, 1 - truth)[None] for share in (0.9, 0.8))
    ours = loss(truth, b, a, 2, Metric("recall", 1))
    mine = truth == 1
    alone = loss(truth[mine], b[:, mine], a[:, mine], 2, Metric("accuracy"))
    assert ours.value == pytest.approx(alone.value, abs=1e-3)
    assert ours.interval(0.025) == pytest.approx(alone.interval(0.025), abs=0.004)


@pytest.mark.parametrize("metric", METRICS[1:], ids=lambda metric: metric.kind)
def test_the_bounds_of_a_metrics_loss_err_as_rarely_as_they_say(metric):
    """Two methods that are equally good; the lower bound of the loss lies above 0 in a share alpha
    of test sets at most, and not in none."""
    rng, n, trials, alpha = np.random.default_rng(2), 300, 600, 0.05
    above = 0
    for _ in range(trials):
        truth = rng.integers(0, 3, n)
        answers = [
            np.where(rng.random(n) < 0.85, truth, (truth + rng.integers(1, 3, n)) % 3)[None]
            for _ in range(2)
        ]
        above += loss(truth, *answers, 3, metric).interval(alpha)[0] > 0
    assert 0 < above <= alpha * trials + 3 * math.sqrt(alpha * (1 - alpha) * trials)


@pytest.mark.parametrize("n", [60, 200])
@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.kind)
def test_the_level_of_a_metrics_bound_by_enumeration(metric, n):
    """Two methods that differ in errors on one of two classes, and whose true loss is the margin:
    every table of their errors with its probability. The upper bound lies below the margin in a
    share alpha of them at most, and not far below it; `pytest -s` prints the shares."""
    alpha, worse, better = 0.05, 0.10, 0.04  # shares of rows that only one of them gets wrong
    # A precision is lowered by rows of the other class; the class whose errors are dearest is 2.
    of, other = {"precision": (0, 1), "cost": (2, 0)}.get(metric.kind, (1, 0))
    truth = np.repeat([of, other], n)

    def answers(wrong: slice) -> np.ndarray:
        predicted = truth.copy()
        rows = np.flatnonzero(truth == of)[wrong]
        predicted[rows] = other
        return predicted[None]

    def true(share: float) -> float:
        kept = np.where(truth == of, 1 - share, 1.0), np.where(truth == of, share, 0.0)
        twice, said = np.tile(truth, 2), np.append(truth, np.full(2 * n, other))
        return metric.measure(twice, said, np.concatenate(kept), 3)[0]

    margin, level = true(better) - true(worse), 0.0
    shares = [worse, better, 1 - worse - better]
    for a, b in itertools.product(range(n + 1), repeat=2):
        if a + b > n or (weight := multinomial.pmf([a, b, n - a - b], n, shares)) < 1e-9:
            continue
        found = loss(truth, answers(slice(0, a)), answers(slice(a, a + b)), 3, metric)
        level += weight * (found.interval(alpha)[1] < margin)
    print(f"{metric.kind}, {n} rows a class: {level:.1%}")
    assert 0.04 < level <= alpha
