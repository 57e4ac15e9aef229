"""When a method had better not answer: a threshold on its confidence, and what is promised of the
rows above it."""

import math
from dataclasses import dataclass

import numpy as np
from statsmodels.stats.proportion import proportion_confint

SURE = 0.90  # of the promise
STEP = 0.05  # between the shares of rows that may be answered


@dataclass(frozen=True)
class Promise:
    """What validation rows allow to say.

    Attributes
    ----------
    threshold : a row is answered if its highest probability is no lower
    answered : the share of validation rows that are
    error : the share of wrong answers among answered rows that is not exceeded, as sure as `SURE`
    """

    threshold: float
    answered: float
    error: float

    def measured(self, confidence: np.ndarray, right: np.ndarray) -> tuple[float, float]:
        """The share of rows that are answered, and that of wrong ones among them (0 where there is
        none); both arguments of shape (rows,)."""
        answered = confidence >= self.threshold
        return float(answered.mean()), float(1 - right[answered].mean()) if answered.any() else 0.0


def promise(confidence: np.ndarray, right: np.ndarray, error: float) -> Promise | None:
    """The most rows that may be answered with no more than a share `error` of wrong ones among
    them; None where so few rows promise nothing.

    Shares of answered rows are tested in a fixed order, the surest rows first, each by the bound of
    Clopper and Pearson (1934), up to the first that fails: so the promise of the last holds without
    a correction for their number (as in Learn then Test, Angelopoulos et al. 2021). The order
    begins where rows without an error would suffice.

    Parameters
    ----------
    confidence : the highest probability of each validation row, shape (rows,)
    right : whether that class was right, shape (rows,)

    Examples
    --------
    >>> sure = np.linspace(0.5, 1.0, 200)
    >>> found = promise(sure, sure > 0.7, error=0.05)
    >>> round(found.threshold, 2), round(found.answered, 2)
    (0.7, 0.6)
    >>> promise(sure[:20], sure[:20] > 0, error=0.05) is None
    True
    """
    rows = len(confidence)
    least = math.log(1 - SURE) / math.log(1 - error)
    found = None
    for part in range(1, round(1 / STEP) + 1):
        share = part * STEP
        if rows * share < least:
            continue
        threshold = np.sort(confidence)[-math.ceil(rows * share - 1e-9)]
        answered = confidence >= threshold
        wrong, n = int((~right[answered]).sum()), int(answered.sum())
        _, upper = proportion_confint(wrong, n, alpha=2 * (1 - SURE), method="beta")
        if upper > error:
            break
        found = Promise(float(threshold), float(answered.mean()), error)
    return found
