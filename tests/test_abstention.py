"""A promise on the error of answered rows is kept as often as it says, and none is given that rows
can't bear."""

import numpy as np
import pytest

from letterhead.stats.abstention import SURE, promise


def rows(rng, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Confidence, and whether the answer is right: as often as the confidence says, near enough."""
    confidence = rng.beta(6, 1.5, n)
    return confidence, rng.random(n) < confidence**0.8


@pytest.mark.parametrize(("n", "error"), [(150, 0.1), (150, 0.05), (1000, 0.05)])
def test_the_promise_is_broken_seldom_where_a_naive_threshold_often_breaks_it(n, error):
    rng = np.random.default_rng(0)
    confidence, right = rows(rng, 400_000)  # what is true
    broken = naive = given = 0
    for _ in range(300):
        drawn, hit = rows(rng, n)
        if found := promise(drawn, hit, error):
            given += 1
            broken += found.measured(confidence, right)[1] > error
        order = np.argsort(-drawn)
        wrong = np.cumsum(~hit[order]) / np.arange(1, n + 1)
        if (wrong <= error).any():
            least = drawn[order][np.flatnonzero(wrong <= error)[-1]]
            naive += 1 - right[confidence >= least].mean() > error
    assert broken / 300 <= 1 - SURE
    assert naive / 300 > 0.3
    assert given > 30 or n == 150


def test_no_promise_where_rows_without_an_error_would_not_suffice():
    sure = np.linspace(0.9, 1, 44)
    assert promise(sure, sure > 0, 0.05) is None  # ln 0.1 / ln 0.95 is 44.9
    sure = np.linspace(0.9, 1, 45)
    found = promise(sure, sure > 0, 0.05)
    assert found.answered == 1 and found.threshold == 0.9
    assert promise(sure, sure < 0, 0.5) is None


def test_answered_rows_and_their_errors_are_counted():
    found = promise(np.linspace(0, 1, 100), np.arange(100) >= 40, 0.1)
    answered, wrong = found.measured(np.array([0.2, 0.9, 0.95, 1.0]), np.array([0, 0, 1, 1]) == 1)
    assert (answered, wrong) == (0.75, pytest.approx(1 / 3))
    assert found.measured(np.array([0.0]), np.array([False])) == (0.0, 0.0)
