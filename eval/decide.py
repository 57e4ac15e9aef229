"""Decide which method to ship, from the comparison and the prices in service, and say so in words.

python -m eval.decide --experiment quick
"""

import math

import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.files import read_json, write_json
from letterhead.pipeline import DECIDE, HEAD_ON_PROMPT, STAGES, method_of
from letterhead.runs import contenders, results
from letterhead.runs.contenders import aligned
from letterhead.runs.stage import StageRun, run, was_asked
from letterhead.stats import decision, verdict


def main(experiment: Experiment) -> None:
    stage = StageRun(experiment, DECIDE)
    path = experiment.results_folder / "decision.json"
    comparison = read_json(experiment.results_folder / "comparison.json")
    if not stage.is_current():
        stage.start()
        write_json(path, decide(experiment, comparison["methods"]))
        stage.finish([path])
    decided = read_json(path)
    print(verdict.summary(comparison, decided))
    if was_asked(DECIDE.make_target):
        print("\n".join(decided["how_sure"]))


def decide(experiment: Experiment, entries: dict[str, dict]) -> dict:
    """The decision (letterhead.stats.decision) among the methods that were measured on all test
    rows, with its reasons.

    The price is the bench's where it has measured every trained method, else the multiply-adds of a
    row.
    """
    n = max(entry["n"] for entry in entries.values())
    names = [name for name, entry in entries.items() if entry["n"] == n]
    answers = {name: read_trainings(experiment, name, entries[name]) for name in names}
    truth, predicted = aligned(experiment, answers)
    in_service = {name: cost_in_service(name, results.read_prices(experiment)) for name in entries}
    trained = [name for name in names if method_of(name).is_trained and not method_of(name).thinks]
    is_benched = all(in_service[name] is not None for name in trained)
    unit = "per_million_rows" if is_benched else "multiply_adds_per_row"
    found = in_service if is_benched else {name: entries[name]["cost"][unit] for name in names}
    prices = {name: math.inf if found[name] is None else found[name] for name in names}
    decided = decision.decide(
        truth, predicted, prices, len(experiment.labels), experiment.compare.margin
    )
    counts = dict(
        zip(
            experiment.labels,
            np.bincount(truth, minlength=len(experiment.labels)).tolist(),
            strict=True,
        )
    )
    decided |= {
        "n": n,
        "trainings": len(experiment.trainings()),
        "prices": {name: price for name, price in prices.items() if price < math.inf},
        "price_unit": unit,
        "per_million_rows": in_service,
        "rare_classes": {label: rows for label, rows in counts.items() if rows < verdict.FEW_ROWS},
    }
    return decided | verdict.words(decided, entries)


def read_trainings(experiment: Experiment, name: str, entry: dict) -> list[dict]:
    """A method's answers on test rows, one dictionary a training."""
    method = method_of(name)
    further = experiment.trainings()[1:] if STAGES[method.stage].retrained else []
    found = [contenders.choose(training, method) for training in further]
    again = [
        contenders.read_answers(training, one.name, one.result.n)
        for training, one in zip(further, found, strict=True)
    ]
    return [contenders.read_answers(experiment, name, entry["n"]), *again]


def cost_in_service(name: str, rows: list[dict]) -> float | None:
    """What a million rows cost in the cheapest way of serving a method that the bench measured, or
    None."""
    method = method_of(name)
    own = [row for row in rows if row["name"] == name and row["method"] != HEAD_ON_PROMPT]
    like = [row for row in rows if row["method"] in method.priced_as]
    return min((row["cost_per_million"] for row in (*own, *like)), default=None)


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
