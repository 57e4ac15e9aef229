"""Rows whose label is improbable: confident learning (Northcutt, Jiang and Chuang 2021, Confident
Learning: Estimating Uncertainty in Dataset Labels, arXiv 1911.00068)."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Suspects:
    """What is suspected of each row.

    Attributes
    ----------
    labelled : the class that it is labelled with, shape (rows,)
    likely : the class that it is confidently of, or that of its label; shape (rows,)
    of_label, of_likely : their probabilities, shape (rows,)
    """

    labelled: np.ndarray
    likely: np.ndarray
    of_label: np.ndarray
    of_likely: np.ndarray

    def ranked(self) -> np.ndarray:
        """The numbers of the suspected rows, those first whose likely class is the more probable by
        most."""
        found = np.flatnonzero(self.likely != self.labelled)
        margin = (self.of_likely - self.of_label)[found]
        return found[np.argsort(-margin, kind="stable")]


def find_suspects(probabilities: np.ndarray, labelled: np.ndarray) -> Suspects:
    """Find rows that are confidently of another class than that of their label.

    A row is confidently of a class if its probability there is at least the mean probability of
    that class among the rows that are labelled so (section 3.1, the confident joint); of several,
    the most probable.

    Parameters
    ----------
    probabilities : out of sample, shape (rows, classes)
    labelled : class numbers, shape (rows,)
    """
    rows, classes = probabilities.shape
    own = probabilities[np.arange(rows), labelled]
    counts = np.bincount(labelled, minlength=classes)
    sums = np.bincount(labelled, weights=own, minlength=classes)
    threshold = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    confident = np.where(probabilities >= threshold, probabilities, -np.inf)
    likely = np.where(np.isfinite(confident).any(axis=1), confident.argmax(axis=1), labelled)
    return Suspects(labelled, likely, own, probabilities[np.arange(rows), likely])
