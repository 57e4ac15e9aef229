"""Result files: what a method (at a step) reached on a split, and its prediction for every row.

`runs/<experiment>/results/NAME.json` (test) and `NAME.validation.json`, `NAME.predictions.jsonl`
beside them; NAME is a method, or method@step.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from letterhead import pipeline
from letterhead.config.experiment import Experiment
from letterhead.files import (
    LetterheadError,
    read_json,
    read_jsonl,
    sha256_file,
    write_json,
    write_jsonl,
)
from letterhead.pipeline import method_of
from letterhead.runs.devices import device_name, versions
from letterhead.stats.metrics import NO_ANSWER, choosing_losses, classification_figures

SPLITS = ("test", "validation")
# So many of its answers a model of rounded weights has in common with the one that it stands for
LEAST_AGREEMENT = 0.99


@dataclass(frozen=True)
class Result:
    """What a method (at a step) reached on a split; as JSON, a result file.

    Attributes
    ----------
    step : None for a method without steps
    n : rows
    ece_floor : what a perfectly calibrated method would show, for want of rows
    confusion : rows are the true classes, columns the predicted ones, with one more for rows
        without an answer
    per_class : label → precision, recall, f1 and n
    train_loss : mean of the steps since the last result; None for one that has no such steps
    eval_loss : nats a row; for SFT a token of the right option; None without probabilities
    seconds, tokens : of scoring; padding counts among the tokens
    parameters : multiply-adds of a token
    model : a checkpoint's folder, or what the model is, in words
    training_seconds : up to this step, for heads
    thinking : how many answers hold a thought, and the like, for a method that thinks
    halves : of a cascade: its methods, threshold and temperatures, and how many rows went to the
        dear one
    hosted : of a hosted LLM: tokens, price, refusals, and how often it contradicted itself
    examples_cut, texts_cut : with eval.examples, how many were cut so that the prompt fits
    """

    experiment: str
    method: str
    step: int | None
    seed: int
    split: str
    device: str
    versions: dict[str, str | None]
    n: int
    accuracy: float
    precision_macro: float
    recall_macro: float
    f1_macro: float
    f1_macro_ci95: list[float]
    ece: float | None
    ece_floor: float | None
    log_loss: float | None
    confusion: list[list[int]]
    per_class: dict[str, dict[str, int | float]]
    eval_loss: float | None
    seconds: float
    rows_per_second: float
    tokens: int
    parameters: int
    dtype: str
    model: str
    inputs_sha256: str
    predictions_sha256: str
    train_loss: float | None = None
    training_seconds: float | None = None
    thinking: dict[str, Any] | None = None
    halves: dict[str, Any] | None = None
    hosted: dict[str, Any] | None = None
    examples_cut: int | None = None
    texts_cut: int | None = None

    @property
    def name(self) -> str:
        """Its full name: METHOD, METHOD@STEP, or of a cascade METHOD:DEAR."""
        if self.halves:
            return f"{self.method}:{method_of(self.halves['dear']).name}"
        return self.method if self.step is None else f"{self.method}@{self.step}"


_SCHEMA = TypeAdapter(Result)


def parse_result(path: Path) -> Result | None:
    """A result file; None where there is none, it is cut off, or of a version with other fields."""
    try:
        return _SCHEMA.validate_python(read_json(path))
    except ValidationError:
        return None


def result_files(experiment: Experiment, name: str, split: str) -> tuple[Path, Path]:
    """The files of a result and of its predictions."""
    stem = name + ("" if split == "test" else f".{split}")
    return (
        experiment.results_folder / f"{stem}.json",
        experiment.results_folder / f"{stem}.predictions.jsonl",
    )


def read_rows(experiment: Experiment, name: str) -> list[dict]:
    """The rows of a split (or of decoder_train): dictionaries with id, text and label."""
    return list(read_jsonl(experiment.data_folder / f"{name}.jsonl"))


def class_numbers(experiment: Experiment, rows: Sequence[dict]) -> np.ndarray:
    """The number of each row's label, shape (rows,)."""
    number = {name: i for i, name in enumerate(experiment.labels)}
    return np.array([number[row["label"]] for row in rows])


def read_result(experiment: Experiment, name: str, split: str) -> Result:
    """A result, as its stage left it.

    Raises
    ------
    LetterheadError : it is missing, or no whole result
    """
    path = result_files(experiment, name, split)[0]
    if (result := parse_result(path)) is None:
        raise LetterheadError(
            f"{path}: missing, or no whole result; run: make compare EXP={experiment.name}"
        )
    return result


def read_predictions(experiment: Experiment, name: str, split: str) -> list[dict]:
    """A result's predictions, in the rows' order."""
    return list(read_jsonl(result_files(experiment, name, split)[1]))


def bench_made_from(experiment: Experiment) -> dict[str, str]:
    """What the service figures hang on: the hash of each stage's inputs that trained something, or
    made the rows."""
    names = [
        pipeline.DATA.name,
        *(
            method.trained_by
            for method in pipeline.compared_methods(experiment)
            if method.bench and method is not pipeline.CASCADE  # its price is made of its halves'
        ),
    ]
    records = {name: read_json(experiment.run_folder / name / "stage.json") for name in names}
    return {name: record and record["inputs_sha256"] for name, record in records.items()}


def read_bench(experiment: Experiment) -> dict | None:
    """The service figures, if they are there and those of the models that are there now."""
    bench = read_json(experiment.results_folder / "bench_rps.json")
    if not bench or bench["made_from"] != bench_made_from(experiment):
        return None
    for row in bench["rows"]:  # JSON keeps the numbers of clients as text, sorted as such
        row["closed"] = dict(sorted(row["closed"].items(), key=lambda loop: int(loop[0])))
    return bench


def read_prices(experiment: Experiment) -> list[dict]:
    """What a million rows cost in service, of each row of the bench that is there: its method, full
    name and price. A model of rounded weights is left out where it gave too few rows the evaluated
    answer (`LEAST_AGREEMENT`)."""
    bench = read_bench(experiment) or {"rows": []}
    return [
        {key: row[key] for key in ("method", "name", "cost_per_million")}
        for row in bench["rows"]
        if not row.get("is_approximate") or (row["same_as_evaluated"] or 0) >= LEAST_AGREEMENT
    ]


def kept_result(experiment: Experiment, name: str, split: str, inputs_sha256: str) -> Result | None:
    """The result on disk if it was made from the same inputs and its predictions are whole, else
    None."""
    result_file, predictions_file = result_files(experiment, name, split)
    kept = parse_result(result_file)
    if not kept or kept.inputs_sha256 != inputs_sha256 or not predictions_file.exists():
        return None
    return kept if kept.predictions_sha256 == sha256_file(predictions_file) else None


def write_result(
    experiment: Experiment,
    name: str,
    split: str,
    rows: Sequence[dict],
    probabilities: np.ndarray | None = None,
    predicted: np.ndarray | None = None,
    perplexity: np.ndarray | None = None,
    **measured: Any,
) -> Result:
    """Compute a result's figures; write its predictions, then, saying that they are whole, the
    result.

    Parameters
    ----------
    name : a method, or method@step
    rows : the split's rows, in the order of the arrays
    probabilities, perplexity : shape (rows, classes)
    predicted : class numbers or NO_ANSWER, shape (rows,); without them the most probable class
    measured : seconds, tokens, parameters, dtype, model, inputs_sha256, and of the other fields of
        Result those that the caller knows

    Raises
    ------
    LetterheadError : a probability is not a number
    """
    if probabilities is not None:
        require_finite(probabilities, f"{name}, {split} rows", measured.get("model"))
    labels, (result_file, predictions_file) = (
        experiment.labels,
        result_files(experiment, name, split),
    )
    step = name.partition("@")[2]
    figures = classification_figures(
        class_numbers(experiment, rows), labels, experiment.seed, probabilities, predicted
    )
    columns = {"probabilities": probabilities, "perplexity": perplexity}
    if predicted is None:
        predicted = probabilities.argmax(axis=1)

    def line(i: int) -> dict:
        named = {
            key: dict(zip(labels, values[i].tolist(), strict=True))
            for key, values in columns.items()
            if values is not None
        }
        prediction = None if predicted[i] == NO_ANSWER else labels[predicted[i]]
        return {
            "id": rows[i]["id"],
            "label": rows[i]["label"],
            "prediction": prediction,
            "probabilities": None,
        } | named

    # A result of other inputs goes first: its figures are not those of these predictions.
    result_file.unlink(missing_ok=True)
    write_jsonl(predictions_file, map(line, range(len(rows))))
    known = {
        "experiment": experiment.name,
        "method": method_of(name).name,
        "step": int(step) if step else None,
        "seed": experiment.seed,
        "split": split,
        "eval_loss": figures["log_loss"],
        "device": device_name(),
        "versions": versions(),
        "rows_per_second": round(len(rows) / measured["seconds"], 3),
        "predictions_sha256": sha256_file(predictions_file),
    }
    result = Result(**known | figures | measured)
    write_json(result_file, asdict(result))
    return result


def require_finite(probabilities: np.ndarray, what: str, model: Any) -> None:
    """Make sure that a model's probabilities, shape (rows, classes), are numbers.

    Raises
    ------
    LetterheadError : those of some rows are not; names the model
    """
    wrong = int((~np.isfinite(probabilities)).any(axis=-1).sum())
    if wrong:
        raise LetterheadError(
            f"{what}: the probabilities of {wrong} of {len(probabilities)} rows are not "
            f"numbers; the model has diverged "
            f"or is damaged ({model}); train it anew with a lower learning rate"
        )


def checkpoint_table(
    experiment: Experiment, title: str, results: dict[tuple[int, str], Result], expected: list[int]
) -> str:
    """The article's table in Markdown: one line a checkpoint, figures on test rows, validation F1
    beside them.

    Parameters
    ----------
    results : (step, split) → result
    expected : steps that ought to be there; one without a result is named
    """
    test = {step: result for (step, split), result in results.items() if split == "test"}
    validation = {
        step: result
        for (step, split), result in results.items()
        if split == "validation" and step in test
    }
    if not test:
        raise LetterheadError(
            f"{experiment.data_folder / 'test.jsonl'}: no test rows; set data.rows.test"
        )
    own = "Option's own loss" if title.startswith("SFT") else "Test loss"
    lines = [
        f"# {experiment.name}: {title}, {next(iter(test.values())).n} test rows\n",
        f"| Step | Training loss | {own} | Accuracy | Precision | Recall | F1 | 95 % "
        f"interval | F1 validation |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | :---: | ---: |",
    ]
    for step in sorted({*expected} | set(test)):
        if step not in test:
            lines.append(f"| {step} | not scored: no whole checkpoint | | | | | | | |")
            continue
        result = test[step]
        trained = (
            "not trained"
            if step == 0
            else ""
            if result.train_loss is None
            else f"{result.train_loss:.4f}"
        )
        low, high = result.f1_macro_ci95
        chosen = f"{validation[step].f1_macro:.4f}" if step in validation else "no rows"
        figures = [
            result.eval_loss,
            result.accuracy,
            result.precision_macro,
            result.recall_macro,
            result.f1_macro,
        ]
        numbers = " | ".join(f"{value:.4f}" for value in figures)
        lines.append(f"| {step} | {trained} | {numbers} | {low:.3f} to {high:.3f} | {chosen} |")
    best = highest_f1(test)
    lines.append(
        f"\nBest on test (the article's choice): step {best}, F1 {test[best].f1_macro:.4f}."
    )
    if validation:
        step = chosen_step(experiment, validation)
        alike = "" if experiment.balance == "none" else " (each class with the same share)"
        lines.append(
            f"Chosen on validation, by log loss{alike}: step {step}, F1 "
            f"{test[step].f1_macro:.4f} on test (the honest figure)."
        )
    else:
        lines.append(
            "No validation rows (data.rows.validation is 0): no checkpoint can be chosen "
            "without looking at test."
        )
    return "\n".join(lines) + "\n"


def validation_losses(experiment: Experiment, validation: Result) -> np.ndarray:
    """The log loss of each validation row of a result, as it chooses (`choosing_losses`), shape
    (rows,); nats."""
    lines = read_predictions(experiment, validation.name, "validation")
    probabilities = np.array(
        [[line["probabilities"][label] for label in experiment.labels] for line in lines]
    )
    truth = class_numbers(experiment, lines)
    return choosing_losses(truth, probabilities, experiment.balance)


def chosen_step(experiment: Experiment, validation: dict[int, Result]) -> int:
    """The step to take of a method's training: the last, where the learning rate has come down,
    unless another has a lower log loss on validation rows (`choosing_losses`) by more than a
    standard error of the difference on the same rows; then that one.

    The log loss has less noise than F1. (By the lowest loss alone a tie of 150 rows, 0.271 against
    0.272, once chose a step that lost 0.05 of F1 on test.)

    Parameters
    ----------
    validation : step → result on validation rows
    """
    losses = {
        step: validation_losses(experiment, result) for step, result in sorted(validation.items())
    }
    lowest, last = min(losses, key=lambda step: losses[step].mean()), max(losses)
    if lowest == last:
        return last
    apart = losses[last] - losses[lowest]
    return last if apart.mean() <= apart.std() / len(apart) ** 0.5 else lowest


def highest_f1(results: dict[int, Result]) -> int:
    """The step with the highest macro F1; of equals the one with the lowest log loss."""
    return max(
        results,
        key=lambda step: (results[step].f1_macro, -(results[step].log_loss or 0), -step),
    )
