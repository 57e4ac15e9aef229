"""What the comparison reads of each method: the checkpoint that stands for it, its figures, its
cost, its answers."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, read_json
from letterhead.pipeline import (
    CASCADE,
    STAGES,
    Method,
    cascades_file,
    method_of,
    outputs,
    record_of,
)
from letterhead.runs import results
from letterhead.runs.results import Result
from letterhead.stats import metrics
from letterhead.stats.metrics import Metric


@dataclass(frozen=True)
class Chosen:
    """The checkpoint that stands for a method.

    Attributes
    ----------
    name : the method's, with its step
    result : its figures on test rows, as its stage left them
    validation : those on validation rows, None where there are no such rows
    how : what chose it, in words
    highest : the step with the highest macro F1 on test rows (0 where there are no steps), and its
        figures
    """

    name: str
    method: Method
    result: Result
    validation: Result | None
    how: str
    highest: tuple[int, Result]

    def log_loss_validation(self, experiment: Experiment) -> float | None:
        """The mean log loss on validation rows, as it chooses; None without such rows, or without
        probabilities."""
        if self.validation is None or self.validation.log_loss is None:
            return None
        return float(results.validation_losses(experiment, self.validation).mean())

    def entry(self, experiment: Experiment) -> dict[str, Any]:
        """What the comparison says of it before anything is compared."""
        title = self.method.title
        if self.method.thinks and not self.method.is_trained and not self.result.thinking["begun"]:
            title += " (it does not think)"
        if self.result.hosted:
            title += f" ({self.result.model})"
        if halves := self.result.halves:
            title = " → ".join(method_of(halves[half]).title for half in ("cheap", "dear"))
        step, highest = self.highest
        kept = {
            key: value
            for key, value in asdict(self.result).items()
            if key not in ("inputs_sha256", "versions")
        }
        return kept | {
            "title": title,
            "chosen_on": self.how,
            "cost": cost(experiment, self.method, self.result),
            "best_on_test": {"step": step or None}
            | {"f1_macro": highest.f1_macro, "accuracy": highest.accuracy},
            "f1_macro_validation": self.validation and self.validation.f1_macro,
            "log_loss_validation": self.log_loss_validation(experiment),
        }


def metric_of(experiment: Experiment) -> Metric:
    """What an experiment's decision compares (`compare.metric`)."""
    kind, _, label = experiment.compare.metric.partition(":")
    number = experiment.labels.index(label) if label else None
    if kind != "cost":
        return Metric(kind, number)
    costs, labels = experiment.compare.costs, experiment.labels
    costs = np.array([[costs.get(true, {}).get(label, 0.0) for label in labels] for true in labels])
    # No answer costs as much as the dearest wrong one.
    return Metric(kind, costs=np.column_stack([costs, costs.max(axis=1)]))


def choose_trainings(experiment: Experiment, method: Method) -> dict[str, list[Chosen]]:
    """Full name → the checkpoint that stands for a method in each of its trainings, the
    experiment's own first. There is one name, but for cascades.

    Raises
    ------
    LetterheadError : a result is missing or cut off
    """
    trainings = experiment.trainings()
    if method is CASCADE:
        return {
            name: [
                choose(training, method, name, experiment)
                for training, _ in zip(trainings, frozen, strict=False)
            ]
            for name, frozen in (read_json(cascades_file(experiment)) or {}).items()
        }
    again = trainings[1:] if STAGES[method.stage].retrained else []
    chosen = [choose(training, method) for training in (experiment, *again)]
    return {chosen[0].name: chosen}


def choose(
    experiment: Experiment, method: Method, name: str = "", first: Experiment | None = None
) -> Chosen:
    """The checkpoint that stands for a method: the step that validation rows choose, else the last.

    Parameters
    ----------
    name : the full name without its step, of a method with several
    first : the experiment whose stage left the results, where it is another

    Raises
    ------
    LetterheadError : a result is missing or cut off
    """
    by_split: dict[str, dict[int, Result]] = {split: {} for split in results.SPLITS}
    name = name or method.name
    for file in outputs(STAGES[method.stage], first or experiment):
        path = Path(file)
        is_mine = first is None or path.parent == experiment.results_folder
        is_mine &= path.name.startswith((f"{name}.", f"{name}@"))
        if is_mine and path.suffix == ".json":
            result = results.parse_result(path)
            if result is None:
                raise LetterheadError(
                    f"{file}: missing or cut off; delete it and run: make compare "
                    f"EXP={experiment.name}"
                )
            by_split[result.split][result.step or 0] = result
    test, validation = by_split["test"], by_split["validation"]
    steps = {
        step for step in test if step or not method.step_0
    }  # before training it is another method
    if not steps:
        raise LetterheadError(
            f"{experiment.results_folder}: no test result of {name}; run: make "
            f"compare EXP={experiment.name}"
        )
    if len(steps) == 1:
        step, how = next(iter(steps)), "the only one"
    elif validation:
        step, how = (
            results.chosen_step(experiment, {s: validation[s] for s in steps if s in validation}),
            "validation",
        )
    else:
        step, how = max(steps), "the last step; no validation rows"
    highest = results.highest_f1({s: test[s] for s in steps})
    name = f"{name}@{step}" if step else name
    return Chosen(name, method, test[step], validation.get(step), how, (highest, test[highest]))


def cost(experiment: Experiment, method: Method, result: Result) -> dict[str, Any]:
    """What a method took: rows and seconds to train, seconds to score, memory, and multiply-adds
    for a row in service.

    Multiply-adds are parameters × tokens: all parameters but the embeddings, padding included. A
    cascade takes what both halves take to train, and in service the cheap one's cost and the dear
    one's times the share of rows that it answers.
    """
    if result.halves:
        names = [result.halves[half] for half in ("cheap", "dear")]
        cheap, dear = (
            cost(experiment, method_of(name), results.read_result(experiment, name, "test"))
            for name in names
        )
        share = result.halves["deferred"] / result.n
        return {
            "train_rows": max(cheap["train_rows"], dear["train_rows"]),
            "epochs": None,
            "multiply_adds_per_row": round(
                cheap["multiply_adds_per_row"] + share * dear["multiply_adds_per_row"]
            ),
            "test_seconds": result.seconds,
            **{
                key: cheap[key] + dear[key]
                for key in ("training_seconds", "stage_seconds", "scoring_seconds")
            },
            **{
                peak: max((half[peak] for half in (cheap, dear) if half[peak]), default=None)
                for peak in ("peak_memory_mb", "peak_gpu_memory_mb")
            },
        }
    scoring = record_of(method.stage, experiment)
    spent = {
        "train_rows": 0,
        "training_seconds": 0.0,
        "stage_seconds": 0.0,
        "test_seconds": result.seconds,
        "scoring_seconds": result.seconds if method.thinks else scoring["scoring_seconds"],
        "peak_memory_mb": scoring["peak_memory_mb"],
        "peak_gpu_memory_mb": scoring.get("peak_gpu_memory_mb"),
        "multiply_adds_per_row": round(result.parameters * result.tokens / result.n),
    }
    if not method.is_trained:
        return spent
    training = record_of(method.trained_by, experiment)
    peaks = {
        peak: max(
            (record[peak] for record in (training, scoring) if record.get(peak)), default=None
        )
        for peak in ("peak_memory_mb", "peak_gpu_memory_mb")
    }
    return spent | {
        "train_rows": training["rows"],
        "epochs": training.get("epochs"),
        "training_seconds": round(training.get("training_seconds", training["seconds"]), 1),
        "stage_seconds": training["seconds"],
        **peaks,
    }


def read_trainings(experiment: Experiment, chosen: list[Chosen]) -> list[dict]:
    """The answers of each training on test rows (see `read_answers`)."""
    return [
        read_answers(training, one.name, one.result.n)
        for training, one in zip(experiment.trainings(), chosen, strict=False)
    ]


def read_answers(experiment: Experiment, name: str, n: int) -> dict[str, tuple[int, int]]:
    """Row id → class number of the truth and of the prediction on test.

    Raises
    ------
    LetterheadError : a file of predictions is cut off
    """
    number = {label: i for i, label in enumerate(experiment.labels)}
    lines = results.read_predictions(experiment, name, "test")
    if len(lines) != n:
        path = results.result_files(experiment, name, "test")[1]
        raise LetterheadError(f"{path}: {len(lines)} rows, not {n}; delete it and run again")
    return {
        line["id"]: (number[line["label"]], number.get(line["prediction"], metrics.NO_ANSWER))
        for line in lines
    }


def read_probabilities(experiment: Experiment, name: str, split: str) -> np.ndarray:
    """A method's probabilities, shape (rows, classes), in the order of the experiment's labels."""
    lines = results.read_predictions(experiment, name, split)
    return np.array(
        [[line["probabilities"][label] for label in experiment.labels] for line in lines]
    )


def share_of_hits(experiment: Experiment, name: str) -> float:
    """The share of validation rows that a method gets right, with one more right and one more
    wrong (Laplace)."""
    path = results.result_files(experiment, name, "validation")[0]
    is_scored = results.parse_result(path) is not None
    lines = results.read_predictions(experiment, name, "validation") if is_scored else []
    hits = sum(line["label"] == line["prediction"] for line in lines)
    return (hits + 1) / (len(lines) + 2)


def as_probabilities(answers: np.ndarray, classes: int, share: float) -> np.ndarray:
    """Answers without probabilities, class numbers or NO_ANSWER of shape (rows,), as some: the
    named class has `share`, the others the rest; a row without an answer is all 0."""
    probabilities = np.full((len(answers), classes), (1 - share) / (classes - 1))
    named = answers != metrics.NO_ANSWER
    probabilities[named, answers[named]] = share
    probabilities[~named] = 0.0
    return probabilities


def temperature_of(experiment: Experiment, name: str) -> float | None:
    """The temperature of a method's probabilities, from its validation rows; None without them, for
    one that gives no probabilities, and for a cascade, whose halves have their own."""
    path = results.result_files(experiment, name, "validation")[0]
    result = results.parse_result(path)
    if result is None or result.log_loss is None or result.halves:
        return None
    rows = results.read_predictions(experiment, name, "validation")
    probabilities = read_probabilities(experiment, name, "validation")
    return metrics.temperature(results.class_numbers(experiment, rows), probabilities)


def aligned(
    experiment: Experiment, answers: dict[str, list[dict]]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Truth, shape (rows,), and predictions of each method, shape (trainings, rows), in one order
    of rows.

    Raises
    ------
    LetterheadError : they were measured on different rows
    """
    first = next(iter(answers))
    truth = {row: label for row, (label, _) in answers[first][0].items()}
    for other, trainings in answers.items():
        if any(
            {row: label for row, (label, _) in training.items()} != truth for training in trainings
        ):
            raise LetterheadError(
                f"{first} and {other} were measured on different rows; delete "
                f"{experiment.results_folder}, run again"
            )
    predicted = {
        name: np.array([[training[row][1] for row in truth] for training in trainings])
        for name, trainings in answers.items()
    }
    return np.array(list(truth.values())), predicted
