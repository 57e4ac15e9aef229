"""What an experiment's test rows can decide, told before anything is trained."""

from collections.abc import Callable
from typing import Any

import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.pipeline import CASCADE, HOSTED_LLM, compared_methods, most_cascades
from letterhead.runs.contenders import metric_of
from letterhead.stats.decision import POWER, least_margin, rows_for_margin

WORSE = 0.005  # a share of rows


def contenders(experiment: Experiment) -> int:
    """How many methods of an experiment may be shipped, the most cascades among them."""
    methods = [method for method in compared_methods(experiment) if method is not CASCADE]
    alone = sum(
        (method.is_trained and not method.thinks) or method is HOSTED_LLM for method in methods
    )
    return alone + most_cascades(experiment)


def margin_finder(
    experiment: Experiment, card: dict[str, Any]
) -> Callable[[int, int, float], float] | None:
    """The smallest margin by numbers of test rows and of methods, and the share of rows that a
    method gets wrong besides (`decision.least_margin`), the classes in the shares that they have
    among the test rows; None where the metric's class has no test row.

    Parameters
    ----------
    card : the data card
    """
    metric, labels = metric_of(experiment), experiment.labels
    counts = np.array([card["label_counts"]["test"][label] for label in labels])
    if metric.label is not None and not counts[metric.label]:
        return None

    def find(rows: int, methods: int, worse: float = 0.0) -> float:
        each = np.ceil(counts * rows / counts.sum()).astype(int)
        truth = np.repeat(np.arange(len(labels)), each)
        return least_margin(truth, methods, len(labels), metric, worse)

    return find


def evidence(experiment: Experiment, card: dict[str, Any], seen: int | None = None) -> str:
    """Whether the test rows can show `compare.margin`, in a sentence or two.

    Parameters
    ----------
    card : the data card
    seen : how many methods turned out to be in contention, once the test rows have been read
    """
    rows, margin = card["rows"]["test"], experiment.compare.margin
    methods = seen or contenders(experiment)
    find = margin_finder(experiment, card)
    if find is None:
        return (
            f"No test row is of the class that compare.metric ({experiment.compare.metric}) reads."
        )
    least = find(rows, methods)
    can = "can" if least <= margin else "cannot"
    sentence = (
        f"{rows:,} test rows {can} show a margin of {margin:g} where {methods} methods are in "
        f"contention: the smallest is {least:.3f} for a method that answers as the best does, and "
        f"{find(rows, methods, WORSE):.3f} (in {100 * POWER:.0f} % of test sets) for one that "
        f"makes {1000 * WORSE:g} errors in 1,000 rows more."
    )
    if least <= margin:
        return sentence
    if seen:
        return f"{sentence} These rows have been read, so the margin stays."
    wanted = rows_for_margin(margin, methods, find)
    return (
        f"{sentence} Before you look at a test row, set a larger compare.margin, or "
        f"data.rows.test to more than {wanted:,}."
    )
