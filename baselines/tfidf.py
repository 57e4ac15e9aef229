"""The floor: TF-IDF with logistic regression, on all of train; seconds on a CPU.

python -m baselines.tfidf --experiment quick
"""

import time

from sklearn.pipeline import Pipeline

from letterhead import results, tfidf
from letterhead.experiment import Experiment
from letterhead.stage import Stage, run, stage_outputs


def main(experiment: Experiment) -> None:
    data = stage_outputs(experiment, "data")
    rows_of = {name: data[str(experiment.data_folder / f"{name}.jsonl")] for name in ("train", *results.SPLITS)}
    inputs = {"rows": rows_of, "model": tfidf.MODEL, "labels": experiment.labels, "seed": experiment.seed}
    stage = Stage(experiment, "tfidf", inputs)
    if not stage.is_current():
        start = time.perf_counter()
        train = results.read_rows(experiment, "train")
        model = tfidf.fit(train, experiment.seed)
        seconds, files, scored = time.perf_counter() - start, [], 0.0
        for split in results.SPLITS:
            if rows := results.read_rows(experiment, split):
                scored += evaluate(experiment, model, split, rows, stage.inputs_sha256)["seconds"]
                files += results.result_files(experiment, "tfidf", split)
        stage.finish(
            files, rows=len(train), tokens=None, training_seconds=round(seconds, 2), scoring_seconds=round(scored, 2)
        )
    result = results.read_result(experiment, "tfidf", "test")
    print(f"tfidf: accuracy {result['accuracy']:.4f}, macro F1 {result['f1_macro']:.4f} on {result['n']} test rows")


def evaluate(experiment: Experiment, model: Pipeline, split: str, rows: list[dict], inputs_sha256: str) -> dict:
    """Write the result of one split."""
    start = time.perf_counter()
    probabilities, terms = tfidf.classify(model, [row["text"] for row in rows], experiment.labels)
    return results.write_result(
        experiment,
        "tfidf",
        split,
        rows,
        probabilities=probabilities,
        seconds=round(time.perf_counter() - start, 4),
        tokens=terms,
        parameters=len(experiment.labels),
        device="cpu",
        dtype="float64",
        model=f"TF-IDF of words and word pairs, logistic regression (C = {tfidf.MODEL['C']})",
        inputs_sha256=inputs_sha256,
    )


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
