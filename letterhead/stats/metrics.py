"""Classification figures and comparisons, from scikit-learn and statsmodels, and the standard
errors of macro F1.

Macro F1 is a smooth function of the shares of rows with a truth and a prediction, so its standard
error follows from each row's influence on it (the delta method; Hampel 1974), and that of a
difference on the same rows from the differences of influence. Pseudo-rows, half of them right, keep
the error above zero where a test shows none: two for a difference of paired shares (Agresti & Min
2005), half a one for a share, which then has Wilson's bounds to 0.0015 (tests say so).
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import log_softmax, ndtr, ndtri, softmax, stdtrit
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
)
from sklearn.utils.class_weight import compute_sample_weight
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

ECE_BINS = 15
FLOOR_DRAWS = 1000
SCORE_STEPS = 4
LOG_TEMPERATURE_SD = 0.5  # before any row is seen
NO_ANSWER = -1
SMALLEST_LOG_P = -60.0  # below that a p-value is told as this one


@dataclass(frozen=True, eq=False)
class Estimate:
    """A figure with its standard error.

    rows : how many it comes from, pseudo-rows included
    parts, shares : the distinct influences of a row, and the share of rows that has each
    training_variance : what the spread over trainings adds to the error's square; more rows do not
        lower it
    training_df : the degrees of freedom of that variance
    """

    value: float
    rows: int
    parts: np.ndarray
    shares: np.ndarray
    training_variance: float = 0.0
    training_df: float = math.inf

    @property
    def sigma(self) -> float:
        """The standard deviation of a row's influence."""
        return math.sqrt(self.shares @ self.parts**2)

    @property
    def se(self) -> float:
        return math.sqrt(self.sigma**2 / self.rows + self.training_variance)

    def interval(self, alpha: float) -> tuple[float, float]:
        """The two one-sided bounds that each err in a share `alpha` of cases.

        Score bounds, as Wilson's (1927) for a share and Tango's (1998) for paired shares: a bound
        is a value with the error that the figure would have *if that were true*. What the rows
        would look like then is their exponential tilting (Efron 1981), the nearest distribution
        whose figure is that value. Where errors are few the plain bound errs more.

        The two noises are put together as Howe (1974) does: each with its own quantile, the rows'
        normal, the trainings' of Student's t. (One t with Satterthwaite's degrees of freedom for
        both errs in up to 14 % of cases where a method has one training and another three.)
        """
        return self._bound(alpha, -1), self._bound(alpha, 1)

    def _bound(self, alpha: float, sign: int) -> float:
        bound = self.value + sign * self.reach(alpha)
        if not self.sigma:  # no row can move it
            return bound
        for _ in range(SCORE_STEPS):
            sigma = self._sigma_if(bound - self.value)
            bound = self.value + sign * self.reach(alpha, sigma)
        return bound

    def reach(self, alpha: float, sigma: float | None = None, rows: float | None = None) -> float:
        """How far a bound that errs in a share `alpha` lies from the figure.

        Parameters
        ----------
        sigma, rows : in place of the estimate's own
        """
        sigma, rows = self.sigma if sigma is None else sigma, rows or self.rows
        of_rows = ndtri(alpha) ** 2 * sigma**2 / rows
        if not self.training_variance:
            return math.sqrt(of_rows)
        quantile = stdtrit(self.training_df, alpha)
        return math.sqrt(of_rows + quantile**2 * self.training_variance)

    def _sigma_if(self, shift: float) -> float:
        """The standard deviation of a row's influence under the tilting that has the mean
        `shift`."""
        end = self.parts.max() if shift > 0 else self.parts.min()
        shift = math.copysign(min(abs(shift), 0.95 * abs(end)), end)
        logs = np.log(self.shares)

        def tilted(by: float) -> np.ndarray:
            exponents = logs + by * self.parts
            weights = np.exp(exponents - exponents.max())
            return weights / weights.sum()

        low, high = 0.0, shift / self.sigma**2
        while abs(tilted(high) @ self.parts) < abs(shift):
            low, high = high, 2 * high
        share = tilted(brentq(lambda by: tilted(by) @ self.parts - shift, low, high, rtol=1e-6))
        return math.sqrt(share @ (self.parts - shift) ** 2)

    @property
    def p(self) -> float:
        """The two-sided p-value of the figure being 0."""
        if not self.training_variance:
            return float(2 * ndtr(-abs(self.value) / self.se))

        def beyond(log_alpha: float) -> float:
            return self.reach(math.exp(log_alpha)) - abs(self.value)

        if beyond(SMALLEST_LOG_P) < 0:
            return 2 * math.exp(SMALLEST_LOG_P)
        return 2 * math.exp(brentq(beyond, SMALLEST_LOG_P, math.log(0.5)))


@dataclass(frozen=True)
class Metric:
    """What a decision compares; more is better.

    Attributes
    ----------
    kind : macro_f1, accuracy, f1, recall, precision or cost
    label : the class of an f1, a recall or a precision
    costs : of a cost, shape (classes, classes + 1): what a prediction costs, of each true class;
        the last column is for a row without an answer
    """

    kind: str = "macro_f1"
    label: int | None = None
    costs: np.ndarray | None = None

    def pseudo_classes(self, present: np.ndarray) -> np.ndarray:
        """The true classes that pseudo-rows are spread over: those whose rows the metric reads."""
        if self.kind == "recall":
            return np.array([self.label])
        if self.kind == "cost":  # half a row each at plus and minus the greatest difference
            return np.array([self.costs.max(axis=1).argmax()])
        if self.label is not None and len(present) > 1:
            return np.array([self.label, present[present != self.label][0]])
        return present

    def measure(
        self, truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray, classes: int
    ) -> tuple[float, np.ndarray]:
        """The metric of weighted rows, and each row's influence on it, which has mean 0 (Hampel
        1974: the derivative by the row's weight)."""
        if self.kind == "macro_f1":
            return _macro_f1(truth, predicted, weights, classes)
        share = weights / weights.sum()
        right = truth == predicted
        if self.kind == "accuracy":
            value = float(share @ right)
            return value, right - value
        if self.kind == "cost":
            cost = self.costs[truth, predicted]  # NO_ANSWER is the last column
            mean = float(share @ cost)
            return -mean, mean - cost
        is_true, is_said = truth == self.label, predicted == self.label
        hit = is_true & is_said
        # A ratio N / D of shares has the influence (n - (N / D) d) / D.
        over = {
            "recall": is_true.astype(float),
            "precision": is_said.astype(float),
            "f1": (is_true.astype(float) + is_said) / 2,
        }[self.kind]
        total = float(share @ over)
        if not total:
            return 0.0, np.zeros(len(truth))
        value = float(share @ hit) / total
        return value, (hit - value * over) / total


MACRO_F1 = Metric()


def macro_f1(truth: np.ndarray, predicted: np.ndarray, classes: int) -> Estimate:
    """Macro F1 of one or more trainings of a method, over the classes that have rows.

    Parameters
    ----------
    truth : class numbers, shape (rows,)
    predicted : class numbers or NO_ANSWER, shape (trainings, rows)
    classes : how many there are
    """
    return reached(truth, predicted, classes, MACRO_F1)


def reached(truth: np.ndarray, predicted: np.ndarray, classes: int, metric: Metric) -> Estimate:
    """A metric of one or more trainings of a method; parameters as for `macro_f1`."""
    return _estimate(truth, [(1.0, predicted)], classes, 0.5, metric)


def plain_f1(truth: np.ndarray, predicted: np.ndarray, classes: int) -> float:
    """Macro F1 as scikit-learn has it, the mean over trainings; parameters as for `macro_f1`.

    Examples
    --------
    >>> truth = np.array([0, 0, 1, 1])
    >>> round(plain_f1(truth, np.array([[0, 0, 1, 0]]), 2), 3)  # the mean of 4/5 and 2/3
    0.733
    """
    return plain(truth, predicted, classes, MACRO_F1)


def plain(truth: np.ndarray, predicted: np.ndarray, classes: int, metric: Metric) -> float:
    """A metric without pseudo-rows, the mean over trainings; parameters as for `macro_f1`."""
    return _estimate(truth, [(1.0, predicted)], classes, 0, metric).value


def f1_loss(truth: np.ndarray, candidate: np.ndarray, other: np.ndarray, classes: int) -> Estimate:
    """By how much macro F1 is lower with `candidate` than with `other`; parameters as for
    `macro_f1`.

    Examples
    --------
    >>> truth = np.arange(300) % 3
    >>> worse = np.where(np.arange(300) < 30, (truth + 1) % 3, truth)
    >>> loss = f1_loss(truth, worse[None], truth[None], 3)
    >>> low, high = loss.interval(0.025)
    >>> low < 0.1 < high
    True
    """
    return loss(truth, candidate, other, classes, MACRO_F1)


def loss(
    truth: np.ndarray, candidate: np.ndarray, other: np.ndarray, classes: int, metric: Metric
) -> Estimate:
    """By how much a metric is lower with `candidate` than with `other`; parameters as for
    `macro_f1`."""
    return _estimate(truth, [(1.0, other), (-1.0, candidate)], classes, 2, metric)


def _estimate(
    truth: np.ndarray,
    parts: list[tuple[float, np.ndarray]],
    classes: int,
    pseudo_rows: float,
    metric: Metric,
) -> Estimate:
    """A sum of metrics, each times its sign and averaged over its trainings.

    Several trainings add the variance over them, divided by their number; where several methods
    have some, the degrees of freedom of the sum are Satterthwaite's (1946).
    """
    present = metric.pseudo_classes(np.unique(truth))
    rights = np.indices((2,) * len(parts)).reshape(
        len(parts), -1
    )  # each combination of right and wrong
    more = np.repeat(present, rights.shape[1])
    # A wrong pseudo-row names the next class, so that it weighs as much as a wrong row does.
    others = np.roll(present, -1) if len(present) > 1 else [NO_ANSWER]
    if metric.kind == "cost":  # the dearest error
        others = metric.costs[present, :-1].argmax(axis=1)
    wrong = np.repeat(others, rights.shape[1])
    weights = np.concatenate([np.ones(len(truth)), np.full(len(more), pseudo_rows / len(more))])
    n, value, influence = len(truth) + pseudo_rows, 0.0, np.zeros(len(weights))
    variances, dfs = [], []
    for (sign, predicted), right in zip(parts, rights, strict=True):
        added = np.where(np.tile(right, len(present)) == 1, more, wrong)
        found = [
            metric.measure(np.append(truth, more), np.append(one, added), weights, classes)
            for one in predicted
        ]
        values = np.array([figure for figure, _ in found])
        value += sign * values.mean()
        influence += sign * np.mean([part for _, part in found], axis=0)
        if len(values) > 1:
            variances.append(values.var(ddof=1) / len(values))
            dfs.append(len(values) - 1)
    distinct, which = np.unique(influence.round(12), return_inverse=True)
    shares = np.bincount(which, weights)
    kept = shares > 0
    spread = sum(variance**2 / df for variance, df in zip(variances, dfs, strict=True))
    total = float(sum(variances))
    df = total**2 / spread if spread else math.inf
    return Estimate(float(value), n, distinct[kept], shares[kept] / n, total, df)


def _macro_f1(
    truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray, classes: int
) -> tuple[float, np.ndarray]:
    """Macro F1 of weighted rows over the classes that have some, and each row's influence on it,
    which has mean 0."""

    def share(values: np.ndarray, where: np.ndarray) -> np.ndarray:
        return np.bincount(values[where], weights[where], classes) / weights.sum()

    right, named = truth == predicted, predicted != NO_ANSWER
    true, hits = share(truth, truth >= 0), share(truth, right)
    either, present = true + share(predicted, named), true > 0
    f1 = np.divide(2 * hits, either, out=np.zeros(classes), where=present)
    slope = np.divide(1, either, out=np.zeros(classes), where=present) / present.sum()
    influence = (
        2 * slope[truth] * right
        - (f1 * slope)[truth]
        - np.where(named, (f1 * slope)[predicted], 0.0)
    )
    return float(f1[present].mean()), influence


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error in `ECE_BINS` equal-width bins (Naeini et al. 2015); both of shape
    (rows,).

    The share of rows in a bin times the distance between its accuracy and its mean confidence,
    summed over the bins. (Ours, since to import torchmetrics, which the tests hold this against,
    takes three seconds of every stage.)

    Examples
    --------
    >>> sure, right = np.array([0.9, 0.9, 0.6, 0.6]), np.array([1, 1, 1, 0])
    >>> round(calibration_error(sure, right), 3)  # half of 0.1 and half of 0.1
    0.1
    """
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    return float(np.abs(np.bincount(bins, weights=right - confidence)).sum() / len(right))


def calibration_floor(confidence: np.ndarray, seed: int) -> float:
    """The calibration error that a perfectly calibrated method with these confidences, shape
    (rows,), is expected to show.

    With few rows to a bin it is far from 0 (Bröcker & Smith 2007): the mean over draws of right and
    wrong as the confidences say.
    """
    rng = np.random.default_rng(seed)
    drawn = (
        calibration_error(confidence, rng.random(len(confidence)) < confidence)
        for _ in range(FLOOR_DRAWS)
    )
    return float(np.mean(list(drawn)))


def temperature(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """The temperature that calibrates probabilities (Guo et al. 2017).

    The most probable one given the rows, where log T is normal around 0 beforehand: few rows move
    it little, and a method that is right on all of them does not become certain.

    Parameters
    ----------
    truth : class numbers, shape (rows,); of rows that decide nothing else than the checkpoint
    probabilities : shape (rows, classes)

    Examples
    --------
    >>> temperature(np.array([], int), np.empty((0, 2)))
    1.0
    """
    logits = np.log(np.clip(probabilities, 1e-12, None))

    def improbability(log_t: float) -> float:
        losses = -log_softmax(logits / math.exp(log_t), axis=1)[np.arange(len(truth)), truth]
        return losses.sum() + (log_t / LOG_TEMPERATURE_SD) ** 2 / 2

    found = minimize_scalar(improbability, bounds=(-3, 3), method="bounded")
    return math.exp(found.x) if len(truth) else 1.0


def tempered(probabilities: np.ndarray, at: float) -> np.ndarray:
    """Probabilities, shape (rows, classes), at a temperature; the most probable class stays.

    Examples
    --------
    >>> tempered(np.array([[0.9, 0.1]]), 2.0).round(3).tolist()  # odds of 9 become odds of 3
    [[0.75, 0.25]]
    """
    return softmax(np.log(np.clip(probabilities, 1e-12, None)) / at, axis=1)


def choosing_losses(truth: np.ndarray, probabilities: np.ndarray, balance: str) -> np.ndarray:
    """The log loss of each row, by whose mean a step, a rate and the end of a training are chosen.
    Where `balance` brings rare classes up, each class has the same share of it: by the plain loss a
    training that leans to the rare classes looks the worse, the more it has learnt of them.

    Parameters
    ----------
    truth : class numbers, shape (rows,)
    probabilities : shape (rows, classes)
    balance : as in an experiment

    Returns
    -------
    array of float, shape (rows,); nats

    Examples
    --------
    >>> truth, half = np.array([0, 0, 0, 1]), np.full((4, 2), 0.5)
    >>> choosing_losses(truth, half, "none").round(3).tolist()
    [0.693, 0.693, 0.693, 0.693]
    >>> choosing_losses(truth, half, "weights").round(3).tolist()
    [0.462, 0.462, 0.462, 1.386]
    """
    losses = -np.log(np.clip(probabilities[np.arange(len(truth)), truth], 1e-12, None))
    return losses if balance == "none" else losses * compute_sample_weight("balanced", truth)


def mcnemar_p(a_right: np.ndarray, b_right: np.ndarray) -> float:
    """McNemar's exact test that two methods are right equally often, from booleans a row (McNemar
    1947; statsmodels).

    Examples
    --------
    >>> a, b = np.array([1, 1, 1, 1, 1, 0]) == 1, np.array([0, 0, 0, 0, 0, 0]) == 1
    >>> mcnemar_p(a, b)  # five rows of five go one way: 2 * 0.5 ** 5
    0.0625
    """
    table = [
        [np.sum(a_right & b_right), np.sum(a_right & ~b_right)],
        [np.sum(~a_right & b_right), 0],
    ]
    return float(mcnemar(table, exact=True).pvalue)


def holm(p_values: list[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979; statsmodels).

    Examples
    --------
    >>> holm([0.01, 0.04, 0.03])  # 3 * 0.01; 2 * 0.03; and no less than that
    [0.03, 0.06, 0.06]
    """
    return multipletests(p_values, method="holm")[1].tolist() if p_values else []


def classification_figures(
    truth: np.ndarray,
    labels: list[str],
    seed: int,
    probabilities: np.ndarray | None = None,
    predicted: np.ndarray | None = None,
) -> dict:
    """Accuracy, macro precision, recall and F1 with its interval, figures per class, and expected
    calibration error.

    The macro figures are means over the classes that have rows, so that one stray answer can't
    bring in a class of its own.

    Parameters
    ----------
    truth : class numbers, shape (rows,)
    labels : the classes' names
    seed : of the draws behind `ece_floor`
    probabilities : shape (rows, classes)
    predicted : class numbers or NO_ANSWER, shape (rows,); without them the most probable class

    Returns
    -------
    dict : keys as in a result file (accuracy, precision_macro, …, per_class, ece), `ece_floor`,
        `log_loss`, and `confusion`, whose rows are the true classes and whose columns the predicted
        ones, with one more for rows without an answer
    """
    if predicted is None:
        predicted = probabilities.argmax(axis=1)
    numbers = np.arange(len(labels))
    answered = np.where(predicted == NO_ANSWER, len(labels), predicted)
    confusion = confusion_matrix(truth, answered, labels=[*numbers, len(labels)])[: len(labels)]
    if not confusion[:, -1].any():
        confusion = confusion[:, :-1]
    present = np.unique(truth)
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, answered, labels=numbers, zero_division=0
    )
    macro = precision_recall_fscore_support(
        truth, answered, labels=present, average="macro", zero_division=0
    )
    interval = macro_f1(truth, predicted[None], len(labels)).interval(0.025)
    ece = floor = entropy = None
    if probabilities is not None:
        ece = calibration_error(probabilities.max(axis=1), probabilities.argmax(axis=1) == truth)
        floor = calibration_floor(probabilities.max(axis=1), seed)
        entropy = float(log_loss(truth, probabilities, labels=numbers))
    return {
        "n": len(truth),
        "accuracy": float(accuracy_score(truth, answered)),
        "precision_macro": float(macro[0]),
        "recall_macro": float(macro[1]),
        "f1_macro": float(macro[2]),
        "f1_macro_ci95": np.clip(interval, 0, 1).tolist(),
        "ece": ece,
        "ece_floor": floor,
        "log_loss": entropy,
        "confusion": confusion.tolist(),
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "n": int(s)}
            for name, p, r, f, s in zip(labels, precision, recall, f1, support, strict=True)
        },
    }
