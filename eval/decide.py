"""Decide which method to ship, from the comparison and the prices in service, and say so in words.

python -m eval.decide --experiment quick
"""

import math

import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.files import read_json, write_json
from letterhead.pipeline import (
    CASCADE,
    DECIDE,
    HEAD_ON_PROMPT,
    HOSTED_LLM,
    STAGES,
    compared_methods,
    method_of,
)
from letterhead.runs import contenders, results
from letterhead.runs.contenders import aligned
from letterhead.runs.stage import StageRun, run, was_asked
from letterhead.stats import cascade, decision, metrics, verdict
from letterhead.stats.metrics import Metric

# Of the metric over trainings, where an experiment has one seed
ASSUMED_SD = (0.01, 0.02)
CURVE_POINTS = 21  # of a cascade's price and metric


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
    row. A cascade's is that of its cheap half, and that of its dear one times the share of rows
    that it answers.
    """
    n, classes = max(entry["n"] for entry in entries.values()), len(experiment.labels)
    names = [name for name, entry in entries.items() if entry["n"] == n]
    chosen = {
        name: found
        for method in compared_methods(experiment)
        for name, found in contenders.choose_trainings(experiment, method).items()
    }
    truth, predicted = aligned(
        experiment, {name: contenders.read_trainings(experiment, chosen[name]) for name in names}
    )
    in_service = {
        name: entry["hosted"]["cost_per_million"]
        if entry["hosted"]
        else cost_in_service(name, results.read_prices(experiment))
        for name, entry in entries.items()
        if not entry["halves"]
    }
    trained = [name for name in names if verdict.is_trained(entries[name])]
    trained = [name for name in trained if name in in_service and not method_of(name).thinks]
    is_benched = all(in_service[name] is not None for name in trained)
    unit = "per_million_rows" if is_benched else "multiply_adds_per_row"
    found = (
        in_service
        if is_benched
        else {
            name: None if entries[name]["hosted"] else entries[name]["cost"][unit]
            for name in in_service
        }
    )
    prices = {name: [found[name]] * 2 for name in names if found.get(name) is not None}
    prices |= {
        name: [
            prices[halves["cheap"]][0] + share * prices[halves["dear"]][0]
            for share in cascade.share_interval(halves["deferred"], n)
        ]
        for name in names
        if (halves := entries[name]["halves"])
        and halves["cheap"] in prices
        and halves["dear"] in prices
    }
    # A cascade is cheaper than another method if the upper end of its price is.
    upper = {name: prices[name][1] if name in prices else math.inf for name in names}
    margin, metric = experiment.compare.margin, contenders.metric_of(experiment)
    served = {name: trainings[:1] for name, trainings in predicted.items()}

    def decide_by(answers: dict[str, np.ndarray], training_sd: dict[str, float]) -> dict:
        return decision.decide(truth, answers, upper, classes, margin, training_sd, metric)

    decided = decide_by(served, {})
    counts = dict(
        zip(
            experiment.labels,
            np.bincount(truth, minlength=classes).tolist(),
            strict=True,
        )
    )
    decided |= {
        "n": n,
        "trainings": len(experiment.trainings()),
        "prices": {name: high for name, (_, high) in prices.items()},
        "price_intervals": {name: prices[name] for name in prices if entries[name]["halves"]},
        "price_unit": unit,
        "per_million_rows": in_service,
        "rare_classes": {label: rows for label, rows in counts.items() if rows < verdict.FEW_ROWS},
    }
    shown = [name for name in names if name in trained or method_of(name) in (CASCADE, HOSTED_LLM)]
    shown += [name for name in decided["candidates"] if name not in shown]
    top = served[decided["top"]]
    decided["metric"], decided["language"] = experiment.compare.metric, experiment.language
    contending = round(decision.ALPHA / decided["alpha"]) + 1
    decided["smallest_margin"] = decision.least_margin(truth, contending, classes, metric)
    accuracy, shipped = Metric("accuracy"), served[decided["ship"]]
    decided["right_more"] = {
        name: with_bounds(metrics.loss(truth, shipped, served[name], classes, accuracy), 0.025)
        for name in names
    }
    for name, row in decided["right_more"].items():
        row[0] = float((served[name] == truth).mean() - (shipped == truth).mean())
    decided["table"] = {
        name: {
            "reached": with_bounds(metrics.reached(truth, served[name], classes, metric), 0.025),
            "behind": with_bounds(
                metrics.loss(truth, served[name], top, classes, metric), decided["alpha"]
            ),
        }
        for name in shown
    }
    # The figures themselves are told without the pseudo-rows that their bounds have.
    for name, row in decided["table"].items():
        row["reached"][0] = metrics.plain(truth, served[name], classes, metric)
        if metric.kind != "cost":  # a share lies between nothing and all
            row["reached"][1:] = np.clip(row["reached"][1:], 0, 1).tolist()
        row["behind"][0] = metrics.plain(truth, top, classes, metric) - row["reached"][0]
    for name, candidate in decided["candidates"].items():
        other = metrics.plain(truth, served[candidate["against"]], classes, metric)
        candidate["seen"] = other - metrics.plain(truth, served[name], classes, metric)
    decided["curves"] = {
        name: curve(experiment, entries[name]["halves"], truth, decided)
        for name in names
        if entries[name]["halves"] and name in prices
    }
    if decided["trainings"] > 1:
        again = {None: decide_by(predicted, {})}
    else:
        moves = [name for name in names if is_retrained(entries, name)]
        assumed = () if metric.kind == "cost" else ASSUMED_SD
        again = {sd: decide_by(served, dict.fromkeys(moves, sd)) for sd in assumed}
    decided["trained_again"] = [
        {"sd": sd, "ship": found["ship"], "established": found["established"]}
        for sd, found in again.items()
    ]
    return decided | verdict.words(decided, entries)


def is_retrained(entries: dict[str, dict], name: str) -> bool:
    """Whether another seed makes another method of it, or of a cascade's half."""
    halves = entries[name]["halves"]
    parts = [halves["cheap"], halves["dear"]] if halves else [name]
    return any(STAGES[method_of(part).stage].retrained for part in parts)


def with_bounds(estimate: metrics.Estimate, alpha: float) -> list[float]:
    """A figure and its two bounds, each of which errs in a share `alpha` of cases."""
    return [estimate.value, *estimate.interval(alpha)]


def curve(
    experiment: Experiment, halves: dict, truth: np.ndarray, decided: dict
) -> list[list[float]]:
    """Price and metric of a cascade whose dear half would answer any share of the test rows, the
    first training's: to look at, for to choose a share here would be to choose on test rows."""
    metric = contenders.metric_of(experiment)
    cheap = contenders.read_probabilities(experiment, halves["cheap"], "test")
    number = {label: i for i, label in enumerate(experiment.labels)}
    lines = results.read_predictions(experiment, halves["dear"], "test")
    dear = np.array([number.get(line["prediction"], metrics.NO_ANSWER) for line in lines])
    order = np.argsort(metrics.tempered(cheap, halves["temperatures"][0]).max(axis=1))
    prices = [decided["prices"][halves[half]] for half in ("cheap", "dear")]
    points = []
    for share in np.linspace(0, 1, CURVE_POINTS):
        answers = cheap.argmax(axis=1)
        passed = order[: round(share * len(truth))]
        passed = passed[dear[passed] != metrics.NO_ANSWER]
        answers[passed] = dear[passed]
        value = metrics.plain(truth, answers[None], len(experiment.labels), metric)
        points.append([prices[0] + share * prices[1], value])
    return points


def cost_in_service(name: str, rows: list[dict]) -> float | None:
    """What a million rows cost in the cheapest way of serving a method that the bench measured, or
    None."""
    method = method_of(name)
    own = [row for row in rows if row["name"] == name and row["method"] != HEAD_ON_PROMPT]
    like = [row for row in rows if row["method"] in method.priced_as]
    return min((row["cost_per_million"] for row in (*own, *like)), default=None)


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
