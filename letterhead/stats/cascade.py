"""Cascades: a cheap method answers the rows that it is sure of, and a dear one the others.

A row goes to the dear method where the cheap one's highest probability lies below the share of rows
that the dear one gets right, less its price in errors where that is known: Chow's rule (1970), with
the dear method's accuracy in place of a fixed price of passing on. The rule sets the threshold; a
threshold that is searched on validation rows looks better there than it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from statsmodels.stats.proportion import proportion_confint

from letterhead.stats.metrics import temperature, tempered

SMALLEST = 1e-12  # a probability
CHEAPER = 4  # a cheap half costs at most this part of the dear one's price


@dataclass(frozen=True)
class Member:
    """A method that a cascade may be made of, as validation rows show it.

    Attributes
    ----------
    family : methods that differ in their training rows alone share one
    price : of a row, in any unit; infinite where nobody knows
    probabilities : shape (rows, classes); all 0 for a row without an answer
    price_in_errors : of a row, as a share of the price of an error; 0 where nobody named that
    """

    name: str
    family: str
    price: float
    probabilities: np.ndarray
    price_in_errors: float = 0.0


@dataclass(frozen=True)
class Cascade:
    """A cascade, frozen on validation rows.

    Attributes
    ----------
    cheap, dear : full names of the methods
    temperatures : of the cheap one's probabilities, and of the dear one's
    threshold : the dear method answers where the cheap one's highest probability lies below
    validation_share : the share of validation rows that it answers
    """

    cheap: str
    dear: str
    temperatures: tuple[float, float]
    threshold: float
    validation_share: float

    def is_deferred(self, cheap: np.ndarray) -> np.ndarray:
        """Whether a row goes to the dear method, shape (rows,), from the cheap one's probabilities
        as its model gives them, shape (rows, classes)."""
        return tempered(cheap, self.temperatures[0]).max(axis=1) < self.threshold

    def combine(self, cheap: np.ndarray, dear: np.ndarray, deferred: np.ndarray) -> np.ndarray:
        """Probabilities, shape (rows, classes).

        Parameters
        ----------
        cheap : the cheap method's, shape (rows, classes)
        dear : the dear one's for the deferred rows alone; where it has no answer, all 0, the cheap
            one's stays
        deferred : shape (rows,)
        """
        both = tempered(cheap, self.temperatures[0])
        answered = dear.any(axis=1)
        both[np.flatnonzero(deferred)[answered]] = tempered(dear[answered], self.temperatures[1])
        return both


def choose_pairs(truth: np.ndarray, members: Sequence[Member], most: int) -> list[tuple[str, str]]:
    """Which methods make a cascade: (cheap, dear), the highest validation accuracy of a dear one
    first.

    A dear method has partners at a quarter of its price or less; the one of the lowest log loss,
    after its temperature, is taken. A cascade whose log loss on these rows is above its cheap
    half's alone by more than a standard error is left out, and one that passes on no row. One dear
    method a family.

    Parameters
    ----------
    truth : class numbers of the validation rows, shape (rows,)
    most : how many there may be
    """
    accuracy = {one.name: _accuracy(truth, one.probabilities) for one in members}

    def losses(probabilities: np.ndarray) -> np.ndarray:
        return -np.log(np.clip(probabilities[np.arange(len(truth)), truth], SMALLEST, None))

    def losses_alone(one: Member) -> np.ndarray:
        return losses(tempered(one.probabilities, temperature(truth, one.probabilities)))

    pairs, families = [], set()
    for dear in sorted(members, key=lambda one: (-accuracy[one.name], one.price)):
        partners = [one for one in members if one is not dear and one.price * CHEAPER <= dear.price]
        if not partners or dear.family in families:
            continue
        cheap = min(partners, key=lambda one: losses_alone(one).mean())
        frozen = freeze(truth, cheap, dear)
        deferred = frozen.is_deferred(cheap.probabilities)
        both = frozen.combine(cheap.probabilities, dear.probabilities[deferred], deferred)
        more = losses(both) - losses_alone(cheap)
        if deferred.any() and more.mean() <= more.std(ddof=1) / math.sqrt(len(more)):
            pairs.append((cheap.name, dear.name))
            families.add(dear.family)
    return pairs[:most]


def freeze(truth: np.ndarray, cheap: Member, dear: Member) -> Cascade:
    """A cascade of two methods, from validation rows alone.

    Parameters
    ----------
    truth : class numbers, shape (rows,)

    Examples
    --------
    >>> truth = np.arange(200) % 2
    >>> def member(name, sure):
    ...     return Member(name, name, 1.0, np.stack([1 - sure, sure], axis=1))
    >>> cheap = member("cheap", np.where(np.arange(200) < 100, truth, 0.5))
    >>> dear = member("dear", truth.astype(float))
    >>> frozen = freeze(truth, cheap, dear)
    >>> round(frozen.threshold, 3), frozen.validation_share
    (0.995, 0.5)
    """
    temperatures = tuple(temperature(truth, one.probabilities) for one in (cheap, dear))
    hits = round(_accuracy(truth, dear.probabilities) * len(truth))
    threshold = (hits + 1) / (len(truth) + 2) - dear.price_in_errors
    found = Cascade(cheap.name, dear.name, temperatures, threshold, 0.0)
    share = float(found.is_deferred(cheap.probabilities).mean())
    return Cascade(cheap.name, dear.name, temperatures, threshold, share)


def share_interval(deferred: int, rows: int) -> tuple[float, float]:
    """The 95 % interval of the share of rows that the dear method answers (Wilson 1927;
    statsmodels)."""
    low, high = proportion_confint(deferred, rows, method="wilson")
    return float(low), float(high)


def _accuracy(truth: np.ndarray, probabilities: np.ndarray) -> float:
    right = (probabilities.argmax(axis=1) == truth) & probabilities.any(axis=1)
    return float(right.mean())
