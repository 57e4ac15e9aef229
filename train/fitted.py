"""The floor: TF-IDF with logistic regression; seconds on a CPU.

`tfidf_all` is fitted on all of train, where the methods share fewer rows.

python -m train.tfidf tfidf --experiment quick
"""

import time

from sklearn.pipeline import Pipeline

from letterhead.config.experiment import Experiment
from letterhead.models import tfidf
from letterhead.pipeline import METHODS, STAGES, arguments_of
from letterhead.runs import results
from letterhead.runs.stage import StageRun, run


def main(experiment: Experiment, method_name: str) -> None:
    method = METHODS[method_name]
    if not method.when(experiment):
        print(f"{method_name}: not of this experiment, whose methods learn from all of train")
        return
    stage = StageRun(experiment, STAGES[method.stage])
    if stage.is_current():
        stage.tell_current()
    else:
        stage.start()
        start = time.perf_counter()
        train = results.read_rows(experiment, method.rows)
        model = tfidf.fit(train, results.read_rows(experiment, "validation"), experiment.seed)
        seconds, files, scored = time.perf_counter() - start, [], 0.0
        for split in results.SPLITS:
            if rows := results.read_rows(experiment, split):
                scored += evaluate(
                    experiment, method_name, model, split, rows, stage.inputs_sha256
                )["seconds"]
                files += results.result_files(experiment, method_name, split)
        result = results.read_result(experiment, method_name, "test")
        stage.finish(
            files,
            headline=f"macro F1 {result['f1_macro']:.3f} on {result['n']} test rows",
            rows=len(train),
            tokens=None,
            training_seconds=round(seconds, 2),
            scoring_seconds=round(scored, 2),
        )


def evaluate(
    experiment: Experiment,
    method: str,
    model: Pipeline,
    split: str,
    rows: list[dict],
    inputs_sha256: str,
) -> dict:
    """Write the result of one split."""
    start = time.perf_counter()
    probabilities, terms = tfidf.classify(model, [row["text"] for row in rows], experiment.labels)
    return results.write_result(
        experiment,
        method,
        split,
        rows,
        probabilities=probabilities,
        seconds=round(time.perf_counter() - start, 4),
        tokens=terms,
        parameters=len(experiment.labels),
        device="cpu",
        dtype="float64",
        model=f"TF-IDF of words and word pairs, logistic regression (C = {model[1].C})",
        inputs_sha256=inputs_sha256,
    )


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0], choices=arguments_of("train.tfidf"))
