"""Compare the methods on the same test rows: one checkpoint each, chosen on validation; every pair tested; which to ship.

python -m eval.compare --experiment quick
"""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from letterhead import metrics, results
from letterhead.experiment import Experiment
from letterhead.records import LetterheadError, read_json, write_json
from letterhead.stage import Stage, run, stage_outputs

ALPHA = 0.05
# method → the stage that leaves its results, the stage that trains it, and what a reader calls it
METHODS = {
    "zero_shot_no_think": ("zero-shot", None, "LLM zero-shot, option perplexity"),
    "zero_shot_calibrated": ("zero-shot", None, "LLM zero-shot, calibrated"),
    "zero_shot_think": ("zero-shot", None, "LLM zero-shot, thinking"),
    "tfidf": ("tfidf", "tfidf", "TF-IDF + logistic regression"),
    "tfidf_all": ("tfidf-all", "tfidf-all", "TF-IDF, all rows"),
    "bert": ("bert", "bert", "BERT"),
    "bert_all": ("bert-all", "bert-all", "BERT, all rows"),
    "linear_head": ("linear-head", "linear-head", "LLM, linear head"),
    "sft": ("eval-ckpts", "sft", "LLM, SFT (answers with an option)"),
}


def main(experiment: Experiment) -> None:
    methods = {name: of for name, of in METHODS.items() if results.has_more_rows(experiment) or not name.endswith("_all")}
    stages = sorted({stage for stages in methods.values() for stage in stages[:2] if stage})
    made = {name: stage_outputs(experiment, name) for name in stages}
    records = {name: read_json(experiment.run_folder / name / "stage.json") for name in stages}
    bench = results.read_bench(experiment) or {"rows": []}
    in_service = [{key: row[key] for key in ("method", "name", "cost_per_million")} for row in bench["rows"]]
    stage = Stage(experiment, "compare", {"stages": records, "seed": experiment.seed, "service": in_service})
    path = experiment.results_folder / "comparison.json"
    if not stage.is_current():
        chosen = dict(choose(experiment, method, made[of]) for method, (of, _, _) in methods.items())
        for name, entry in chosen.items():
            entry["cost"]["per_million_rows"] = cost_in_service(name, in_service)
        pairs = compare_pairs(experiment, chosen)
        best, why = which_to_ship(chosen, pairs)
        write_json(path, {"methods": chosen, "pairs": pairs, "best": best, "why": why})
        stage.finish([path], rows=max(entry["n"] for entry in chosen.values()))
    print(summary(read_json(path)))


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
        step, how = results.best_step({s: validation[s] for s in steps if s in validation}), "validation"
    else:
        step, how = max(steps), "the last step; no validation rows"
    on_test = results.best_step({s: test[s] for s in steps})
    result = test[step]
    entry = {key: value for key, value in result.items() if key not in ("inputs_sha256", "versions")}
    title = METHODS[method][2]
    if method == "zero_shot_think" and not result["thinking"]["begun"]:
        title += " (it does not think)"
    entry |= {"title": title, "chosen_on": how, "cost": cost(experiment, method, trained, result)}
    entry["best_on_test"] = {"step": on_test or None} | {key: test[on_test][key] for key in ("f1_macro", "accuracy")}
    entry["f1_macro_validation"] = validation[step]["f1_macro"] if step in validation else None
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
        for peak in ("peak_memory_mb", "peak_gpu_memory_mb"):
            cost[peak] = max((of[peak] for of in (training, scoring) if of.get(peak)), default=None)
    return cost


def cost_in_service(name: str, rows: list[dict]) -> float | None:
    """What a million rows cost in the cheapest way of serving a method that the bench measured, or None."""
    method, _, _ = name.partition("@")
    alike = method.removesuffix("_all") if method.endswith("_all") else None  # more rows to learn from, the same price
    costs = [
        row["cost_per_million"]
        for row in rows
        if (row["name"] == name and row["method"] != "linear_head_on_prompt") or row["method"] == alike
    ]
    return min(costs, default=None)


def compare_pairs(experiment: Experiment, chosen: dict[str, dict]) -> list[dict]:
    """Every pair of methods on the rows that both answered: McNemar's exact test, and a paired bootstrap of macro F1.

    Raises
    ------
    LetterheadError : two methods were measured on different rows, or a file of predictions is cut off
    """
    number = {name: i for i, name in enumerate(experiment.labels)}
    answers = {}
    for name in chosen:
        lines = results.read_predictions(experiment, name, "test")
        answers[name] = {line["id"]: (line["label"], line["prediction"]) for line in lines}
        if len(answers[name]) != chosen[name]["n"]:
            path = results.result_files(experiment, name, "test")[1]
            raise LetterheadError(f"{path}: {len(lines)} rows, not {chosen[name]['n']}; delete it and run again")
    pairs = []
    for a, b in combinations(chosen, 2):
        ids = [i for i in answers[a] if i in answers[b]]
        if len(ids) < min(len(answers[a]), len(answers[b])) or any(answers[a][i][0] != answers[b][i][0] for i in ids):
            raise LetterheadError(
                f"{a} and {b} were measured on different rows; delete {experiment.results_folder}, run again"
            )
        truth = np.array([number[answers[a][i][0]] for i in ids])
        predicted = [np.array([number.get(answers[m][i][1], metrics.NO_ANSWER) for i in ids]) for m in (a, b)]
        difference, ci95, p = metrics.f1_difference(truth, *predicted, len(number), experiment.seed)
        right = [values == truth for values in predicted]
        pairs.append(
            {
                "a": a,
                "b": b,
                "n": len(ids),
                "f1_difference": difference,
                "accuracy_difference": float(right[0].mean() - right[1].mean()),
                "ci95": ci95,
                "bootstrap_p": p,
                "mcnemar_p": metrics.mcnemar_p(*right),
                "only_a_right": int(np.sum(right[0] & ~right[1])),
                "only_b_right": int(np.sum(~right[0] & right[1])),
            }
        )
    keys = [(pair, key) for pair in pairs for key in ("mcnemar_p", "bootstrap_p")]
    for (pair, key), corrected in zip(keys, metrics.holm([pair[key] for pair, key in keys]), strict=True):
        pair[f"{key}_holm"] = corrected
    for pair in pairs:
        pair["sentence"] = sentence(pair, chosen)
    return pairs


def told_apart(pair: dict) -> bool:
    """Whether one of the two tests, all tests of all pairs corrected together, tells the methods apart."""
    return min(pair["mcnemar_p_holm"], pair["bootstrap_p_holm"]) < ALPHA


def sentence(pair: dict, chosen: dict[str, dict]) -> str:
    """A pair in words."""
    a, b = chosen[pair["a"]]["title"], chosen[pair["b"]]["title"]
    low, high = pair["ci95"]
    figures = (
        f"F1 difference {pair['f1_difference']:+.3f} ({low:+.3f} to {high:+.3f}), "
        f"McNemar p = {pair['mcnemar_p_holm']:.2g}, bootstrap p = {pair['bootstrap_p_holm']:.2g}, both after Holm"
    )
    if not told_apart(pair):
        return f"{a} and {b} can't be told apart on {pair['n']} rows: {figures}."
    if pair["f1_difference"] * pair["accuracy_difference"] < 0:
        return f"{a} and {b} differ on {pair['n']} rows, one better in F1, the other in accuracy: {figures}."
    better, worse = (a, b) if pair["f1_difference"] + pair["accuracy_difference"] > 0 else (b, a)
    return f"{better} is better than {worse} on {pair['n']} rows: {figures}."


def which_to_ship(chosen: dict[str, dict], pairs: list[dict]) -> tuple[str, str]:
    """The cheapest method that can't be told from the best one, of those measured on all test rows; and why.

    The price is the bench's where it has measured all of them, else the multiply-adds of a row.
    """
    n = max(entry["n"] for entry in chosen.values())
    measured = [name for name, entry in chosen.items() if entry["n"] == n]
    top = max(measured, key=lambda name: chosen[name]["f1_macro"])
    alike = {top}
    for pair in pairs:
        if top in (pair["a"], pair["b"]) and not told_apart(pair):
            alike |= {pair["a"], pair["b"]} & set(measured)

    unit = "per_million_rows"
    if any(chosen[name]["cost"][unit] is None for name in alike):
        unit = "multiply_adds_per_row"

    def price(name: str) -> float:
        return chosen[name]["cost"][unit]

    def priced(name: str) -> str:
        if unit == "per_million_rows":
            return f"{price(name):.3g} for a million rows in service"
        return f"{results.human(price(name))} multiply-adds a row"

    best = min(alike, key=lambda name: (price(name), -chosen[name]["f1_macro"]))
    figures = f"macro F1 {chosen[best]['f1_macro']:.3f}, {priced(best)}"
    if best == top:
        others = "no cheaper method comes near enough that the tests can't tell it apart"
        return best, f"{chosen[best]['title']} is the best ({figures}), and {others} on {n} test rows."
    pair = next(pair for pair in pairs if {pair["a"], pair["b"]} == {best, top})
    sign = 1 if pair["a"] == top else -1
    low, high = sorted(sign * end for end in pair["ci95"])
    return best, (
        f"{chosen[best]['title']} ({figures}) is the cheapest that {n} test rows can't tell from the best, "
        f"{chosen[top]['title']} ({chosen[top]['f1_macro']:.3f}, {priced(top)}): F1 differs by "
        f"{sign * pair['f1_difference']:.3f}, 95 % interval {low:.3f} to {high:.3f}, which is not certain after correction "
        "for all pairs."
    )


def summary(comparison: dict) -> str:
    """The ranking, and which to ship, for the terminal."""
    lines = [f"{'method':34} {'step':>6} {'rows':>6} {'accuracy':>9} {'macro F1':>9}  95 % interval"]
    for entry in sorted(comparison["methods"].values(), key=lambda entry: -entry["f1_macro"]):
        low, high = entry["f1_macro_ci95"]
        figures = f"{entry['accuracy']:9.4f} {entry['f1_macro']:9.4f}  {low:.3f} to {high:.3f}"
        lines.append(f"{entry['title']:34} {entry['step'] or '':>6} {entry['n']:6} {figures}")
    return "\n".join([*lines, f"ship {comparison['best']}: {comparison['why']}"])


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
