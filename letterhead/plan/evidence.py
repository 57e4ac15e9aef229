"""What an experiment's test rows can decide, told before anything is trained."""

from typing import Any

from letterhead.config.experiment import Experiment
from letterhead.pipeline import compared_methods
from letterhead.stats.decision import rows_for_margin, smallest_margin


def contenders(experiment: Experiment) -> int:
    """How many methods of an experiment may be shipped."""
    return sum(method.is_trained and not method.thinks for method in compared_methods(experiment))


def evidence(experiment: Experiment, card: dict[str, Any]) -> str:
    """Whether the test rows can show `compare.margin`, in a sentence or two.

    Parameters
    ----------
    card : the data card
    """
    rows, methods, margin = card["rows"]["test"], contenders(experiment), experiment.compare.margin
    least = smallest_margin(rows, methods)
    can = f"{rows:,} test rows and {methods} methods can show a margin of {margin:g}"
    if least <= margin:
        return f"{can}; the smallest is {least:.3f}, for a method that answers as the best does."
    wanted = rows_for_margin(margin, methods)
    return (
        f"{can.replace('can show', 'cannot show')}: the smallest is {least:.3f}, for a method that "
        f"answers as the best does. Before you look at a test row, set a larger compare.margin, or "
        f"data.rows.test to more than {wanted:,}."
    )
