"""Compare the methods on the same test rows: one checkpoint each, chosen on validation; every pair tested; which to ship.

python -m eval.compare --experiment quick
"""

import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, read_json, sha256_file, write_json
from letterhead.runs import results
from letterhead.runs.stage import Stage, run, stage_outputs
from letterhead.stats import decision, metrics

# method → the stage that leaves its results, the stage that trains it, and what a reader calls it
METHODS = {
    "zero_shot_no_think": ("zero-shot", None, "LLM zero-shot, option perplexity"),
    "zero_shot_calibrated": ("zero-shot", None, "LLM zero-shot, contextual calibration"),
    "zero_shot_think": ("zero-shot", None, "LLM zero-shot, thinking"),
    "tfidf": ("tfidf", "tfidf", "TF-IDF + logistic regression"),
    "tfidf_all": ("tfidf-all", "tfidf-all", "TF-IDF, all rows"),
    "bert": ("bert", "bert", "BERT"),
    "bert_all": ("bert-all", "bert-all", "BERT, all rows"),
    "linear_head": ("linear-head", "linear-head", "LLM, linear head"),
    "sft": ("eval-ckpts", "sft", "LLM, SFT (answers with an option)"),
    "sft_think": ("sft-think", "sft", "LLM, SFT, thinking"),
    "grpo": ("eval-grpo", "grpo", "LLM, SFT and GRPO"),
    "grpo_think": ("eval-grpo", "grpo", "LLM, SFT and GRPO, thinking"),
    "sft_options": ("sft-options", "sft-options", "LLM, SFT on the options alone"),
}
# Methods that write freely, whose price the bench does not measure.
THINKING = ("zero_shot_think", "sft_think", "grpo_think")
# Stages of methods that another seed trains otherwise.
RETRAINED = ("bert", "bert-all", "linear-head", "eval-ckpts", "sft-think", "sft-options")
FEW_ROWS = 10  # a class with fewer test rows is named
# A log loss within this ratio of guessing's, and a kappa below that, are those of a method that has hardly learnt.
NEAR_GUESSING, LITTLE = 0.7, 0.5
FEW_SHOWN = 5
ROWS_THAT_DECIDE = {"rows_if_as_seen": "if the loss is as seen", "rows_if_equal": "if the two are equal"}


def main(experiment: Experiment) -> None:
    methods = {name: METHODS[name] for name in compared(experiment)}
    stages = sorted({stage for stages in methods.values() for stage in stages[:2] if stage})
    made = {name: stage_outputs(experiment, name) for name in stages}
    records = {name: read_json(experiment.run_folder / name / "stage.json") for name in stages}
    further = [
        (training, {name: stage_outputs(training, name) for name in stages if name in RETRAINED})
        for training in experiment.trainings()[1:]
    ]
    bench = results.read_bench(experiment) or {"rows": []}
    in_service = [{key: row[key] for key in ("method", "name", "cost_per_million")} for row in bench["rows"]]
    inputs = {"stages": records, "seed": experiment.seed, "service": in_service, "compare": experiment.compare.model_dump()}
    inputs |= {"further": [made_of_it for _, made_of_it in further], "source": sha256_file(__file__)}
    stage = Stage(experiment, "compare", inputs)
    path = experiment.results_folder / "comparison.json"
    if not stage.is_current():
        chosen = dict(choose(experiment, method, made[of]) for method, (of, _, _) in methods.items())
        for name, entry in chosen.items():
            entry["cost"]["per_million_rows"] = cost_in_service(name, in_service)
            entry["calibration"] = calibration(experiment, name, entry)
            entry["trainings"] = [one_training(experiment, entry)]
        answers = {name: [read_answers(experiment, name, entry["n"])] for name, entry in chosen.items()}
        for training, made_of_it in further:
            for name, entry in chosen.items():
                if (of := METHODS[entry["method"]][0]) in made_of_it:
                    again, result = choose(training, entry["method"], made_of_it[of])
                    answers[name].append(read_answers(training, again, result["n"]))
                    entry["trainings"].append(one_training(training, result))
        for name, entry in chosen.items():
            average(experiment, entry, answers[name])
        without_near_duplicates(experiment, chosen, answers)
        pairs = compare_pairs(experiment, chosen, answers)
        decided = which_to_ship(experiment, chosen, answers)
        write_json(path, {"methods": chosen, "pairs": pairs, "best": decided["ship"], **decided})
        stage.finish([path], rows=max(entry["n"] for entry in chosen.values()))
    print(summary(read_json(path)))


def compared(experiment: Experiment) -> list[str]:
    """The methods that an experiment compares: those on all rows where the methods share fewer, `sft_options` where it is
    set, thinking after SFT where there is a teacher."""
    left_out = {name for name in METHODS if name.endswith("_all") and not results.has_more_rows(experiment)}
    if experiment.decoder.sft_options is None:
        left_out.add("sft_options")
    if experiment.distill is None:
        left_out.add("sft_think")
    left_out |= {"grpo", "grpo_think"}  # a study's
    return [name for name in METHODS if name not in left_out]


def choose(experiment: Experiment, method: str, files: dict[str, str]) -> tuple[str, dict]:
    """A method's name with its step, and its figures on test: the step that is best on validation, else the last.

    Parameters
    ----------
    files : what the method's stage made, by path
    """
    by_split: dict[str, dict[int, dict]] = {split: {} for split in results.SPLITS}
    for file in files:
        if Path(file).name.startswith((f"{method}.", f"{method}@")) and file.endswith(".json"):
            if (result := read_json(file)) is None:
                raise LetterheadError(f"{file}: missing or cut off; delete it and run: make compare EXP={experiment.name}")
            by_split[result["split"]][result["step"] or 0] = result
    test, validation = by_split["test"], by_split["validation"]
    trained = METHODS[method][1]
    steps = {step for step in test if step or method != "sft"}  # step 0 of SFT is the row zero_shot_no_think
    if not steps:
        raise LetterheadError(
            f"{experiment.results_folder}: no test result of {method}; run: make compare EXP={experiment.name}"
        )
    if len(steps) == 1:
        step, how = next(iter(steps)), "the only one"
    elif validation:
        step, how = results.chosen_step(experiment, {s: validation[s] for s in steps if s in validation}), "validation"
    else:
        step, how = max(steps), "the last step; no validation rows"
    on_test = results.highest_f1({s: test[s] for s in steps})
    result = test[step]
    entry = {key: value for key, value in result.items() if key not in ("inputs_sha256", "versions")}
    title = METHODS[method][2]
    if method == "zero_shot_think" and not result["thinking"]["begun"]:
        title += " (it does not think)"
    entry |= {"title": title, "chosen_on": how, "cost": cost(experiment, method, trained, result)}
    entry["best_on_test"] = {"step": on_test or None} | {key: test[on_test][key] for key in ("f1_macro", "accuracy")}
    for figure in ("f1_macro", "log_loss"):
        entry[f"{figure}_validation"] = validation[step][figure] if step in validation else None
    return f"{method}@{step}" if step else method, entry


def cost(experiment: Experiment, method: str, trained: str | None, result: dict) -> dict[str, Any]:
    """What a method took: rows and seconds to train, seconds to score, memory, and multiply-adds for a row in service.

    Multiply-adds are parameters × tokens: all parameters but the embeddings, padding included.
    """

    def record(stage: str) -> dict:
        return read_json(experiment.run_folder / stage / "stage.json")

    scoring = record(METHODS[method][0])
    cost = {
        "train_rows": 0,
        "training_seconds": 0.0,
        "stage_seconds": 0.0,
        "test_seconds": result["seconds"],
        "scoring_seconds": result["seconds"] if method == "zero_shot_think" else scoring["scoring_seconds"],
        "peak_memory_mb": scoring["peak_memory_mb"],
        "peak_gpu_memory_mb": scoring.get("peak_gpu_memory_mb"),
        "multiply_adds_per_row": round(result["parameters"] * result["tokens"] / result["n"]),
    }
    if trained:
        training = record(trained)
        cost |= {"train_rows": training["rows"], "epochs": training.get("epochs")}
        cost["training_seconds"] = round(training.get("training_seconds", training["seconds"]), 1)
        cost["stage_seconds"] = training["seconds"]
        for peak in ("peak_memory_mb", "peak_gpu_memory_mb"):
            cost[peak] = max((of[peak] for of in (training, scoring) if of.get(peak)), default=None)
    return cost


def cost_in_service(name: str, rows: list[dict]) -> float | None:
    """What a million rows cost in the cheapest way of serving a method that the bench measured, or None."""
    method, _, _ = name.partition("@")
    # More rows to learn from, or none, and the same price.
    untrained = method in ("zero_shot_no_think", "zero_shot_calibrated")
    alike = ("sft", "sft_folded") if untrained else (method.removesuffix("_all"),) if method.endswith("_all") else ()
    if method == "sft_options":
        alike = ("sft_folded",)
    costs = [
        row["cost_per_million"]
        for row in rows
        if (row["name"] == name and row["method"] != "linear_head_on_prompt") or row["method"] in alike
    ]
    return min(costs, default=None)


def one_training(experiment: Experiment, entry: dict) -> dict:
    """What the comparison keeps of one training of a method."""
    return {"seed": experiment.seed} | {key: entry[key] for key in ("step", "f1_macro", "accuracy")}


def average(experiment: Experiment, entry: dict, answers: list[dict]) -> None:
    """Put the mean over trainings in place of the first one's F1 and accuracy, and an interval that holds both noises."""
    if len(answers) > 1:
        truth, predicted = aligned(experiment, {entry["method"]: answers})
        interval = metrics.macro_f1(truth, predicted[entry["method"]], len(experiment.labels)).interval(0.025)
        entry["f1_macro_ci95"] = np.clip(interval, 0, 1).tolist()
        for key in ("f1_macro", "accuracy"):
            entry[key] = float(np.mean([training[key] for training in entry["trainings"]]))


def without_near_duplicates(experiment: Experiment, chosen: dict[str, dict], answers: dict[str, list[dict]]) -> None:
    """Put beside each method's macro F1 the one without the test rows that nearly stand in train (None: there are none)."""
    card = read_json(experiment.data_folder / "data_card.json")
    dropped = experiment.data.near_duplicates == "drop"
    near = set() if dropped else {mine for mine, _ in card["near_duplicates"]["test"]}
    for name, entry in chosen.items():
        apart = [{row: of for row, of in training.items() if row not in near} for training in answers[name]]
        figure = None
        if apart[0] and len(apart[0]) < len(answers[name][0]):
            truth, predicted = aligned(experiment, {name: apart})
            figure = metrics.plain_f1(truth, predicted[name], len(experiment.labels))
        entry["f1_macro_without_near_duplicates"] = figure


def calibration(experiment: Experiment, name: str, entry: dict) -> dict | None:
    """The temperature that calibrates a method on validation rows, if one does, and the error that it leaves on test."""
    if entry["ece"] is None or entry["f1_macro_validation"] is None:
        return None

    def read(split: str) -> tuple[np.ndarray, np.ndarray]:
        lines = results.read_predictions(experiment, name, split)
        probabilities = [[line["probabilities"][label] for label in experiment.labels] for line in lines]
        return results.class_numbers(experiment, lines), np.array(probabilities)

    if (at := metrics.temperature(*read("validation"), experiment.seed)) is None:
        return None
    truth, probabilities = read("test")
    scaled = metrics.tempered(probabilities, at)
    return {
        "temperature": at,
        "ece": metrics.calibration_error(scaled.max(axis=1), scaled.argmax(axis=1) == truth),
        "ece_floor": metrics.calibration_floor(scaled.max(axis=1), experiment.seed),
    }


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
    return {line["id"]: (number[line["label"]], number.get(line["prediction"], metrics.NO_ANSWER)) for line in lines}


def aligned(experiment: Experiment, answers: dict[str, list[dict]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Truth, shape (rows,), and predictions of each method, shape (trainings, rows), in one order of rows.

    Raises
    ------
    LetterheadError : they were measured on different rows
    """
    first = next(iter(answers))
    truth = {i: of for i, (of, _) in answers[first][0].items()}
    for other, trainings in answers.items():
        if any({i: of for i, (of, _) in training.items()} != truth for training in trainings):
            raise LetterheadError(
                f"{first} and {other} were measured on different rows; delete {experiment.results_folder}, run again"
            )
    predicted = {name: np.array([[of[i][1] for i in truth] for of in trainings]) for name, trainings in answers.items()}
    return np.array(list(truth.values())), predicted


def compare_pairs(experiment: Experiment, chosen: dict[str, dict], answers: dict[str, list[dict]]) -> list[dict]:
    """Every pair of trained methods, for the reader; which to ship does not hang on it.

    The difference of macro F1 with the interval of one pair by itself, and McNemar's exact test; the p-values of either are
    corrected for the number of pairs.
    """
    n = max(entry["n"] for entry in chosen.values())
    whole = {name: answers[name] for name, entry in chosen.items() if is_trained(entry) and entry["n"] == n}
    truth, predicted = aligned(experiment, whole)
    pairs = []
    for a, b in combinations(predicted, 2):
        difference = metrics.f1_loss(truth, predicted[b], predicted[a], len(experiment.labels))
        right = [predicted[name][0] == truth for name in (a, b)]  # McNemar's test is one of two trained files
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
        pair["sentence"] = sentence(pair, chosen)
    return pairs


def is_trained(entry: dict) -> bool:
    """Whether an entry of the comparison was trained on rows."""
    return METHODS[entry["method"]][1] is not None


def sentence(pair: dict, chosen: dict[str, dict]) -> str:
    """A pair in words."""

    def named(name: str) -> str:
        return f"{chosen[name]['title']} ({chosen[name]['cost']['train_rows']:,} rows)"

    better, worse = (pair["a"], pair["b"]) if pair["f1_difference"] > 0 else (pair["b"], pair["a"])
    low, high = pair["ci95"] if better == pair["a"] else [-end for end in reversed(pair["ci95"])]
    figures = (
        f"F1 {signed(abs(pair['f1_difference']))}, its own 95 % interval {signed(low)} to {signed(high)}, "
        f"p = {pair['f1_p_holm']:.2g} after Holm"
    )
    if pair["f1_p_holm"] < decision.ALPHA:
        return f"{named(better)} has a higher macro F1 than {named(worse)}: {figures}."
    return f"{named(better)} over {named(worse)}: {figures}: chance could do that."


def signed(value: float, digits: int = 3) -> str:
    """A difference with its sign; what rounds to 0 has none."""
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def which_to_ship(experiment: Experiment, chosen: dict[str, dict], answers: dict[str, list[dict]]) -> dict:
    """The decision (letterhead.decision) among the methods that were measured on all test rows, and its reasons in words.

    The price is the bench's where it has measured every trained method, else the multiply-adds of a row.
    """
    n = max(entry["n"] for entry in chosen.values())
    names = [name for name, entry in chosen.items() if entry["n"] == n]
    truth, predicted = aligned(experiment, {name: answers[name] for name in names})
    benched = [name for name in names if is_trained(chosen[name]) and chosen[name]["method"] not in THINKING]
    in_service = all(chosen[name]["cost"]["per_million_rows"] is not None for name in benched)
    unit = "per_million_rows" if in_service else "multiply_adds_per_row"
    prices = {name: math.inf if (price := chosen[name]["cost"][unit]) is None else price for name in names}
    decided = decision.decide(truth, predicted, prices, len(experiment.labels), experiment.compare.margin)
    counts = dict(zip(experiment.labels, np.bincount(truth, minlength=len(experiment.labels)).tolist(), strict=True))
    decided |= {
        "n": n,
        "trainings": len(experiment.trainings()),
        "prices": {name: price for name, price in prices.items() if price < math.inf},
        "price_unit": unit,
        "rare_classes": {label: rows for label, rows in counts.items() if rows < FEW_ROWS},
    }
    return decided | words(decided, chosen)


def words(decided: dict, chosen: dict[str, dict]) -> dict:
    """The decision in sentences: `why`, `how_sure`, `how_dear`, `what_would_change`."""
    n, margin, top, ship = decided["n"], decided["margin"], decided["top"], decided["ship"]
    prices, found, unit = decided["prices"], decided["candidates"], decided["price_unit"]

    def named(name: str) -> str:
        rows = chosen[name]["cost"]["train_rows"]
        return f"{chosen[name]['title']} ({f'{rows:,} training rows' if rows else 'no training'})"

    best = f"{named(top)} has the highest macro F1, {chosen[top]['f1_macro']:.3f} on {n:,} test rows"
    cheaper = [name for name in found if prices.get(name, math.inf) < prices.get(top, math.inf)]
    if not decided["established"]:
        why = f"{best}, and no method is shown to be within {margin:g} of all others: these rows are too few to say more."
    elif ship != top:
        why = (
            f"{named(ship)}, macro F1 {chosen[ship]['f1_macro']:.3f} on {n:,} test rows, is the cheapest that is shown to "
            f"lose less than {margin:g}. {best}."
        )
    elif cheaper:
        why = f"{best}; no cheaper method is shown to be within {margin:g} of it."
    else:
        why = f"{best}, and none is cheaper."
    sure = []
    for name, of in found.items():
        other = named(of["against"])
        loss, low, high = (signed(of[key]).removeprefix("+") for key in ("loss", "low", "high"))
        if of["verdict"] == decision.FITS:
            ahead = f"at least {-of['high']:.3f} of macro F1 ahead of {other}, the nearest."
            behind = f"a loss of macro F1 of at most {high} against {other}; {margin:g} is allowed."
            line = f"{named(name)} is good enough: {ahead if of['high'] < 0 else behind}"
        elif of["verdict"] == decision.COSTS_MORE:
            line = (
                f"{named(name)} loses too much: {loss} of macro F1 against {other}, at least {low}; {margin:g} is allowed."
            )
        else:
            line = f"{named(name)} is undecided: a loss of macro F1 of {loss} against {other}, and anything from {low} to "
            line += f"{high} goes with these rows; {margin:g} is allowed."
            needed = [f"{of[key]:,} {what}" for key, what in ROWS_THAT_DECIDE.items() if of[key]]
            line += f" Test rows that would decide: {', '.join(needed)}." if needed else " Only more trainings would decide."
        sure.append(line)
    if dearer := [name for name, of in chosen.items() if is_trained(of) and of["n"] == n and name not in found]:
        sure.append(f"Not considered, since dearer than the best: {', '.join(map(named, dearer))}.")
    sure += [
        f"{named(name)} has learnt little yet: its log loss is {told[0]:.2f}, and {told[1]:.2f} is that of guessing by the "
        "classes' shares. Train it for more steps, on more rows or at another rate before it counts against the method."
        for name, of in chosen.items()
        if is_trained(of) and of["step"] and (told := hardly_learnt(of))
    ]
    if decided["trainings"] == 1:
        sure.append(
            "The bounds hold the noise of the rows, for these trained files; seeds: [1, 2, 3] adds that of training."
        )
    else:
        sure.append(
            f"The bounds hold the noise of the rows and of {decided['trainings']} trainings (TF-IDF and zero-shot: one); "
            "what is served are the first training's files."
        )
    if few := list(decided["rare_classes"].items()):
        some = ", ".join(f"{label} ({rows})" for label, rows in few[:FEW_SHOWN]) + (" …" if len(few) > FEW_SHOWN else "")
        sure.append(f"Fewer than {FEW_ROWS} test rows: {some}; a class without one is left out of every figure.")
    known = sorted((name for name in chosen if name in prices), key=lambda name: prices[name])
    compared = [name for name in known if is_trained(chosen[name]) or name in found]
    dear = [f"{named(name)}: {priced(prices[name], unit)}{timed(chosen[name])}." for name in compared]
    others = [name for name in compared if name != ship] if ship in prices else []
    pairs = [(ship, name) if prices[name] > prices[ship] else (name, ship) for name in others]
    change = [line for cheap, other in pairs if (line := break_even(cheap, other, decided, chosen, named))]
    return {"why": why, "how_sure": sure, "how_dear": dear, "what_would_change": change}


def hardly_learnt(entry: dict) -> tuple[float, float] | None:
    """The log loss of a method, and that of guessing by the classes' shares, where the two are near and the predictions
    agree with the labels little better than chance would (Cohen's kappa, 1960); None for a method that has learnt."""
    confusion = np.array(entry["confusion"], float)
    shares, predicted = (confusion.sum(axis) / confusion.sum() for axis in (1, 0))
    chance = shares @ predicted[: len(shares)]  # a column more counts the rows without an answer
    kappa = (np.trace(confusion) / confusion.sum() - chance) / (1 - chance) if chance < 1 else 0.0
    guessing = float(-sum(share * np.log(share) for share in shares if share))
    loss = entry.get("log_loss")
    near = loss is not None and NEAR_GUESSING * guessing < loss < guessing / NEAR_GUESSING  # above: sure, and wrong
    return (loss, guessing) if near and kappa < LITTLE else None


def priced(price: float, unit: str) -> str:
    """A price in words."""
    if unit == "per_million_rows":
        return f"{price:.3g} for a million rows in service, in the currency of bench.price_per_hour"
    return f"{results.human(price)} multiply-adds a row"


def timed(entry: dict) -> str:
    """How long a test row took to score, in words."""
    return f"; {1000 * entry['cost']['test_seconds'] / entry['n']:.2g} ms a test row here"


def break_even(cheap: str, dear: str, decided: dict, chosen: dict[str, dict], named: Callable[[str], str]) -> str | None:
    """From which price of an error on the dearer of two methods is worth it, in words; None where it errs no less."""
    fewer = chosen[dear]["accuracy"] - chosen[cheap]["accuracy"]
    more = decided["prices"][dear] - decided["prices"][cheap]
    if fewer <= 0 or more <= 0:
        return None
    spared = f"{named(dear)} made {1000 * fewer:.1f} errors in 1,000 rows fewer than {named(cheap)}"
    if decided["price_unit"] == "per_million_rows":
        return f"{spared}: if that holds, it pays where 1,000 errors cost more than {more / 1000 / fewer:.2g}."
    return (
        f"{spared}: if that holds, it pays where an error costs more than {results.human(more / fewer)} multiply-adds "
        "(`make bench` measures the price)."
    )


def summary(comparison: dict) -> str:
    """The ranking, and which to ship, for the terminal."""
    lines = [f"{'method':34} {'step':>6} {'rows':>6} {'accuracy':>9} {'macro F1':>9}  95 % interval"]
    for entry in sorted(comparison["methods"].values(), key=lambda entry: -entry["f1_macro"]):
        low, high = entry["f1_macro_ci95"]
        figures = f"{entry['accuracy']:9.4f} {entry['f1_macro']:9.4f}  {low:.3f} to {high:.3f}"
        lines.append(f"{entry['title']:34} {entry['step'] or '':>6} {entry['n']:6} {figures}")
    how = "ship" if comparison["established"] else "ship (not established)"
    return "\n".join([*lines, f"{how} {comparison['best']}: {comparison['why']}", *comparison["how_sure"]])


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
