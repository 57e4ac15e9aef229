"""Which method to ship: the cheapest that is shown to lose less macro F1 (or another metric) than a
margin, on the same test rows.

A method *fits* if the loss is below the margin against every other at once: an intersection-union
test (Berger 1982), which needs no correction for their number, nor for having picked the best by
looking. It is corrected (Bonferroni) for how many methods might falsely be said to fit: all in
contention but the best, cheap or dear, since which are no dearer than the one on top is itself seen
on the test rows. A method that is far behind is none of them. To *cost more* than the margin
against some other is corrected for the number of others in contention. So hopeless methods change
nothing. A test of non-inferiority with a margin set beforehand is the one of clinical trials
(Piaggio et al. 2012).
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, norm

from letterhead.stats import metrics
from letterhead.stats.metrics import MACRO_F1, Estimate, Metric

ALPHA = 0.05
POWER = 0.80
MOST_ROWS_LABELLED = 10_000_000
MOST_ROWS = 1e12  # a number that nobody labels
FEWEST_ROWS = 30  # of a class, for a verdict on a metric of that class
HOPELESS = 0.001  # how seldom a method within the margin may be taken for one that is far behind
FITS, COSTS_MORE, UNDECIDED = "fits", "loses too much", "undecided"


def decide(
    truth: np.ndarray,
    predicted: dict[str, np.ndarray],
    prices: dict[str, float],
    classes: int,
    margin: float,
    training_sd: dict[str, float] | None = None,
    metric: Metric = MACRO_F1,
) -> dict:
    """Which method to ship, and what is known of each that is no dearer than the best.

    Parameters
    ----------
    truth : class numbers, shape (rows,)
    predicted : method → class numbers or NO_ANSWER, shape (trainings, rows)
    prices : method → what a row costs in service, in any unit
    classes : how many there are
    margin : the loss of the metric that a lower price is worth; set before a test row is looked at
    training_sd : method → the standard deviation of its macro F1 over trainings, where it is
        assumed and not seen
    metric : what is compared

    Returns
    -------
    dict : `top`, the highest metric (of equals the cheapest); `ship`; `established`, whether what
        is shipped is shown to fit; `alpha` of each bound after correction; `candidates`, cheapest
        first: method → verdict, the loss against the method that is nearest to refuting it, its
        bounds, and the rows that would decide

    Examples
    --------
    >>> truth = np.arange(2000) % 2
    >>> good = np.where(np.arange(2000) < 60, 1 - truth, truth)[None]
    >>> poor = np.where(np.arange(2000) < 400, 1 - truth, truth)[None]
    >>> answers = {"dear": good, "copy": good, "cheap": poor}
    >>> found = decide(truth, answers, {"dear": 9.0, "copy": 3.0, "cheap": 1.0}, 2, margin=0.02)
    >>> found["ship"], found["established"], found["candidates"]["cheap"]["verdict"]
    ('copy', True, 'loses too much')
    """
    value = {
        name: metrics.plain(truth, answers, classes, metric) for name, answers in predicted.items()
    }
    top = max(value, key=lambda name: (round(value[name], 12), -prices[name]))
    read = len(truth) if metric.label is None else int((truth == metric.label).sum())
    assumed = training_sd or {}

    def loss(name: str, other: str) -> Estimate:
        seen = metrics.loss(truth, predicted[name], predicted[other], classes, metric)
        more = assumed.get(name, 0.0) ** 2 + assumed.get(other, 0.0) ** 2
        return replace(seen, training_variance=seen.training_variance + more)

    losses = {
        name: {other: loss(name, other) for other in predicted if other != name}
        for name in predicted
    }
    contend = [
        name
        for name, against in losses.items()
        if not any(one.interval(HOPELESS)[0] > margin for one in against.values())
    ] or [top]
    no_dearer = [name for name in predicted if prices[name] <= prices[top]]
    candidates = sorted(no_dearer, key=lambda name: (prices[name], -value[name]))
    alpha = ALPHA / max(1, len(contend) - 1)
    found = {}
    for name in candidates:
        others = sum(other in contend for other in losses[name])
        found[name] = _verdict(losses[name], margin, alpha, ALPHA / max(1, others))
        if metric.label is not None and read < FEWEST_ROWS:
            found[name] |= {"verdict": UNDECIDED, "rows_if_as_seen": None, "rows_if_equal": None}
    fitting = [name for name in candidates if found[name]["verdict"] == FITS]
    return {
        "margin": margin,
        "alpha": alpha,
        "rows_read": read,
        "top": top,
        "ship": fitting[0] if fitting else top,
        "established": bool(fitting),
        "candidates": found,
    }


def _verdict(losses: dict[str, Estimate], margin: float, alpha: float, alpha_more: float) -> dict:
    """A candidate's verdict from its losses against all others; told are those against the one
    nearest to refuting it."""
    low = {other: loss.interval(alpha_more)[0] for other, loss in losses.items()}
    high = {other: loss.interval(alpha)[1] for other, loss in losses.items()}
    worst = max(low, key=low.get)
    verdict = COSTS_MORE
    if low[worst] <= margin:
        worst = max(high, key=high.get)
        # Rows that no error could move show nothing.
        shows = high[worst] < margin and losses[worst].sigma > 0
        verdict = FITS if shows else UNDECIDED
    loss = losses[worst]
    return {
        "verdict": verdict,
        "against": worst,
        "loss": loss.value,
        "se": loss.se,
        "low": low[worst],
        "high": high[worst],
        "rows_if_as_seen": rows_that_decide(
            loss, abs(margin - loss.value), alpha if loss.value < margin else alpha_more
        ),
        "rows_if_equal": rows_that_decide(loss, margin, alpha),
    }


def smallest_margin(rows: int, methods: int, worse: float = 0.0) -> float:
    """The smallest margin of macro F1 at which a method that answers every test row as another does
    is said to fit, where classes are equally large. Pseudo-rows keep the error above zero.

    Parameters
    ----------
    methods : how many are in contention
    worse : the share of rows that it gets wrong besides; the margin is then that of `POWER` of test
        sets

    Examples
    --------
    >>> [round(smallest_margin(rows, methods), 4) for rows, methods in ((280, 2), (600, 9))]
    [0.0099, 0.0099]
    >>> round(smallest_margin(1000, 6, worse=0.005), 3)
    0.016
    """
    return least_margin(np.arange(rows) % 2, methods, 2, MACRO_F1, worse)


def least_margin(
    truth: np.ndarray, methods: int, classes: int, metric: Metric, worse: float = 0.0
) -> float:
    """The same for any metric and any classes of the test rows, shape (rows,). Rare classes raise
    it: a pseudo-row weighs more in them."""
    alpha = ALPHA / max(1, methods - 1)
    wrong = int(binom.ppf(POWER, len(truth), worse)) if worse else 0
    rows = np.linspace(0, len(truth), wrong, endpoint=False).astype(int)
    candidate = truth.copy()
    candidate[rows] = (truth[rows] + 1) % classes
    return metrics.loss(truth, candidate[None], truth[None], classes, metric).interval(alpha)[1]


def rows_for_margin(
    margin: float, methods: int, least: Callable[[int, int], float] = smallest_margin
) -> int:
    """The number of test rows from which a margin can be shown, to 10 rows.

    Parameters
    ----------
    least : the smallest margin of so many rows and methods

    Examples
    --------
    >>> rows_for_margin(0.01, methods=6)
    530
    """
    low, high = 10, 20
    while least(high, methods) > margin and high < MOST_ROWS_LABELLED:
        low, high = high, 2 * high
    while high - low > 10:
        middle = (low + high) // 20 * 10
        if least(middle, methods) > margin:
            low = middle
        else:
            high = middle
    return high


def rows_that_decide(loss: Estimate, distance: float, alpha: float) -> int | None:
    """How many rows tell a loss from a margin that lies `distance` away, with power `POWER`; None
    if no number does, since the trainings, taken to be as many as there are, differ too much.

    Where the bound's distance and z_power standard errors together are `distance`; without
    trainings the usual n = ((z_alpha + z_power) sigma / distance)².
    """
    if not distance:
        return None
    power = float(norm.ppf(POWER))

    def short(rows: float) -> float:
        error = math.sqrt(loss.sigma**2 / rows + loss.training_variance)
        return loss.reach(alpha, rows=rows) + power * error - distance

    if short(MOST_ROWS) >= 0:
        return None
    return 1 if short(1) <= 0 else math.ceil(brentq(short, 1, MOST_ROWS))
