"""Compare the methods on the same test rows: one checkpoint each, chosen on validation, and every
pair tested.

python -m eval.compare --experiment quick
"""

from itertools import combinations

import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.files import read_json, write_json
from letterhead.pipeline import COMPARE, compared_methods
from letterhead.runs import contenders, results
from letterhead.runs.contenders import aligned
from letterhead.runs.stage import StageRun, run
from letterhead.stats import metrics, verdict

# Full name of a method → its answers, one dictionary a training: row id → class numbers of truth
# and prediction
Answers = dict[str, list[dict[str, tuple[int, int]]]]


def main(experiment: Experiment) -> None:
    stage = StageRun(experiment, COMPARE)
    path = experiment.results_folder / "comparison.json"
    if stage.is_current():
        stage.tell_current()
        return
    stage.start()
    comparison = compare(experiment)
    write_json(path, comparison)
    methods = comparison["methods"]
    stage.finish(
        [path],
        f"{len(methods)} methods; {path}",
        rows=max(entry["n"] for entry in methods.values()),
    )


def compare(experiment: Experiment) -> dict:
    """Every method with its figures, and every pair of trained ones."""
    entries, answers = {}, {}
    for method in compared_methods(experiment):
        for name, chosen in contenders.choose_trainings(experiment, method).items():
            answers[name] = contenders.read_trainings(experiment, chosen)
            entry = chosen[0].entry(experiment)
            trainings = [
                {"seed": training.seed}
                | {key: getattr(one.result, key) for key in ("step", "f1_macro", "accuracy")}
                for training, one in zip(experiment.trainings(), chosen, strict=False)
            ]
            entries[name] = (
                entry
                | averages(experiment, name, answers[name], trainings)
                | {
                    "trainings": trainings,
                    "calibration": calibration(experiment, name, chosen[0].result),
                    "f1_macro_without_near_duplicates": f1_without_near_duplicates(
                        experiment, name, answers[name]
                    ),
                }
            )
    return {"methods": entries, "pairs": compare_pairs(experiment, entries, answers)}


def averages(experiment: Experiment, name: str, answers: list[dict], trainings: list[dict]) -> dict:
    """The means of F1 and accuracy over several trainings, and an interval that holds both noises;
    nothing for one."""
    if len(answers) == 1:
        return {}
    truth, predicted = aligned(experiment, {name: answers})
    interval = metrics.macro_f1(truth, predicted[name], len(experiment.labels)).interval(0.025)
    means = {
        key: float(np.mean([training[key] for training in trainings]))
        for key in ("f1_macro", "accuracy")
    }
    return means | {"f1_macro_ci95": np.clip(interval, 0, 1).tolist()}


def f1_without_near_duplicates(
    experiment: Experiment, name: str, answers: list[dict]
) -> float | None:
    """Macro F1 without the test rows that nearly stand in train; None where there are none."""
    card = read_json(experiment.data_folder / "data_card.json")
    if experiment.data.near_duplicates == "drop":
        return None
    near = {mine for mine, _ in card["near_duplicates"]["test"]}
    apart = [
        {row: pair for row, pair in training.items() if row not in near} for training in answers
    ]
    if not apart[0] or len(apart[0]) == len(answers[0]):
        return None
    truth, predicted = aligned(experiment, {name: apart})
    return metrics.plain_f1(truth, predicted[name], len(experiment.labels))


def calibration(experiment: Experiment, name: str, result: results.Result) -> dict | None:
    """The temperature that calibrates a method on validation rows, and the error that it leaves on
    test; None for a cascade, whose halves have their own."""
    at = contenders.temperature_of(experiment, name)
    if at is None or result.ece is None:
        return None
    lines = results.read_predictions(experiment, name, "test")
    truth = results.class_numbers(experiment, lines)
    scaled = metrics.tempered(contenders.read_probabilities(experiment, name, "test"), at)
    right = scaled.argmax(axis=1) == truth
    return {
        "temperature": at,
        "ece": metrics.calibration_error(scaled.max(axis=1), right),
        "ece_floor": metrics.calibration_floor(scaled.max(axis=1), experiment.seed),
    }


def compare_pairs(experiment: Experiment, entries: dict[str, dict], answers: Answers) -> list[dict]:
    """Every pair of trained methods but cascades, for the reader; which to ship does not hang on
    it.

    The difference of macro F1 with the interval of one pair by itself, and McNemar's exact test;
    the p-values of either are corrected for the number of pairs.
    """
    n = max(entry["n"] for entry in entries.values())
    whole = {
        name: answers[name]
        for name, entry in entries.items()
        if verdict.is_trained(entry) and entry["n"] == n and not entry["halves"]
    }
    truth, predicted = aligned(experiment, whole)
    pairs = []
    for a, b in combinations(predicted, 2):
        difference = metrics.f1_loss(truth, predicted[b], predicted[a], len(experiment.labels))
        right = [
            predicted[name][0] == truth for name in (a, b)
        ]  # McNemar's test is one of two trained files
        pairs.append(
            {
                "a": a,
                "b": b,
                "n": len(truth),
                "f1_difference": difference.value,
                "accuracy_difference": float(right[0].mean() - right[1].mean()),
                "ci95": list(difference.interval(0.025)),
                "f1_p": difference.p,
                "mcnemar_p": metrics.mcnemar_p(*right),
                "only_a_right": int(np.sum(right[0] & ~right[1])),
                "only_b_right": int(np.sum(~right[0] & right[1])),
            }
        )
    for key in ("f1_p", "mcnemar_p"):
        for pair, corrected in zip(pairs, metrics.holm([pair[key] for pair in pairs]), strict=True):
            pair[f"{key}_holm"] = corrected
    for pair in pairs:
        pair["sentence"] = verdict.sentence(pair, entries)
    return pairs


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
