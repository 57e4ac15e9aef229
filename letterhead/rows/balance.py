"""Rare classes, brought up (`balance`): by weights in the loss, or by rows that stand more than
once."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from letterhead.config.experiment import Experiment


def repeats(classes: np.ndarray, seed: int) -> np.ndarray:
    """How often each row stands where every class is brought up to the largest: all rows of a rarer
    class as often as goes, then some, drawn by seed, once more.

    Parameters
    ----------
    classes : class numbers, shape (rows,)

    Returns
    -------
    array of int, shape (rows,)

    Examples
    --------
    >>> repeats(np.array([0, 0, 0, 0, 0, 1, 1]), seed=1).tolist()[:5]
    [1, 1, 1, 1, 1]
    >>> sorted(repeats(np.array([0, 0, 0, 0, 0, 1, 1]), seed=1).tolist()[5:])
    [2, 3]
    """
    counts, rng = np.bincount(classes), np.random.default_rng([seed, 3])
    times = counts.max() // np.maximum(counts, 1)
    found = times[classes]
    for number in np.flatnonzero(counts):
        own = np.flatnonzero(classes == number)
        found[rng.permutation(own)[: counts.max() - times[number] * len(own)]] += 1
    return found


def training_rows(experiment: Experiment, rows: Sequence[dict]) -> list[dict]:
    """The rows as a head reads them in training."""
    if experiment.balance != "oversample":
        return list(rows)
    number = {label: i for i, label in enumerate(experiment.labels)}
    times = repeats(np.array([number[row["label"]] for row in rows]), experiment.data.seed)
    return [row for row, n in zip(rows, times, strict=True) for _ in range(n)]


def rows_read(experiment: Experiment, card: dict, is_all: bool) -> int:
    """How many rows a head reads in an epoch, by the data card: of the shared rows, or of all of
    train."""
    if experiment.balance != "oversample":
        return card["rows"]["train"] if is_all else card["shared"]["rows"]
    return brought_up(card, "train") if is_all else card["shared"]["sft_rows"]


def sft_validation_rows(experiment: Experiment, card: dict) -> int:
    """How many rows SFT reads where it looks at validation rows, by the data card."""
    is_plain = experiment.balance == "none"
    return card["rows"]["validation"] if is_plain else brought_up(card, "validation")


def brought_up(card: dict, split: str) -> int:
    """How many rows a split has where every class is brought up to the largest."""
    counts = [n for n in card["label_counts"][split].values() if n]
    return len(counts) * max(counts, default=0)


def class_weights(experiment: Experiment, labels: Sequence[str]) -> list[float] | None:
    """The weight of each class in the loss, rows / (classes × rows of the class), so that the mean
    over rows is 1 (King and Zeng 2001, as scikit-learn's `balanced`); None without `balance:
    weights`."""
    if experiment.balance != "weights":
        return None
    counts = Counter(labels)
    each = len(labels) / len(counts)
    return [each / counts[label] if counts[label] else 0.0 for label in experiment.labels]
