"""The methods that are fitted in seconds: TF-IDF, and the encoder's frozen embeddings, each with
logistic regression; and SetFit, which takes minutes and is saved.

`tfidf_all` and `embedding_all` are fitted on all of train, where the methods share fewer rows.

python -m train.fitted tfidf --experiment quick
"""

import time

from letterhead.config.experiment import Experiment
from letterhead.files import atomic_folder
from letterhead.models.fitted import Fitted, fit_method
from letterhead.pipeline import METHODS, STAGES, arguments_of
from letterhead.runs import results
from letterhead.runs.stage import StageRun, is_absent, run


def main(experiment: Experiment, method_name: str) -> None:
    method = METHODS[method_name]
    if is_absent(STAGES[method.stage], experiment, "not of this experiment, for its rows"):
        return
    stage = StageRun(experiment, STAGES[method.stage])
    if stage.is_current():
        stage.tell_current()
        return
    stage.start()
    start = time.perf_counter()
    fitted = fit_method(experiment, method_name)
    seconds = time.perf_counter() - start + fitted.saved_seconds
    files, scored = [], 0.0
    if method.is_saved:
        with atomic_folder(method.saved(experiment)) as folder:
            fitted.save(folder)
        files += sorted(method.saved(experiment).rglob("*.safetensors"))
    for split in results.SPLITS:
        if rows := results.read_rows(experiment, split):
            scored += evaluate(experiment, method_name, fitted, split, rows, stage.inputs_sha256)
            files += results.result_files(experiment, method_name, split)
    result = results.read_result(experiment, method_name, "test")
    stage.finish(
        files,
        headline=f"macro F1 {result.f1_macro:.3f} on {result.n} test rows",
        rows=len(results.read_rows(experiment, method.rows)),
        tokens=None,
        reading=experiment.reading,
        training_seconds=round(seconds, 2),
        scoring_seconds=round(scored, 2),
    )


def evaluate(
    experiment: Experiment,
    method: str,
    fitted: Fitted,
    split: str,
    rows: list[dict],
    inputs_sha256: str,
) -> float:
    """Write the result of one split; returns the seconds that scoring took."""
    scores = fitted.score([row["text"] for row in rows], keep=True)
    results.write_result(
        experiment,
        method,
        split,
        rows,
        probabilities=scores.probabilities,
        seconds=round(scores.seconds, 4),
        tokens=scores.tokens,
        parameters=fitted.parameters,
        device=fitted.device,
        dtype=fitted.dtype,
        model=fitted.model,
        inputs_sha256=inputs_sha256,
    )
    return scores.seconds


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0], choices=arguments_of("train.fitted"))
