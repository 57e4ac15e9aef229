"""The floor: TF-IDF with logistic regression, on all of train; seconds on a CPU.

python -m baselines.tfidf --experiment quick
"""

import time

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from letterhead import results
from letterhead.experiment import Experiment
from letterhead.records import LetterheadError
from letterhead.stage import Stage, run, stage_outputs

# A word, or one character of a script that writes no spaces (kana, Han).
TOKEN = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+"
MODEL = {"vectorizer": {"token_pattern": TOKEN, "ngram_range": (1, 2), "sublinear_tf": True}, "C": 10}


def main(experiment: Experiment) -> None:
    data = stage_outputs(experiment, "data")
    rows_of = {name: data[str(experiment.data_folder / f"{name}.jsonl")] for name in ("train", *results.SPLITS)}
    inputs = {"rows": rows_of, "model": MODEL, "labels": experiment.labels, "seed": experiment.seed}
    stage = Stage(experiment, "tfidf", inputs)
    if not stage.is_current():
        start = time.perf_counter()
        train = results.read_rows(experiment, "train")
        model = fit(train, experiment.seed)
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


def fit(rows: list[dict], seed: int) -> Pipeline:
    """Fit the pipeline on rows.

    Raises
    ------
    LetterheadError : only one class is among them
    """
    if len({row["label"] for row in rows}) < 2:
        raise LetterheadError("train holds rows of one class only; raise data.rows.train, or mend the labels")
    regression = LogisticRegression(C=MODEL["C"], max_iter=1000, random_state=seed)
    model = make_pipeline(TfidfVectorizer(**MODEL["vectorizer"]), regression)
    return model.fit([row["text"] for row in rows], [row["label"] for row in rows])


def evaluate(experiment: Experiment, model: Pipeline, split: str, rows: list[dict], inputs_sha256: str) -> dict:
    """Write the result of one split; a class that train lacks gets probability 0."""
    start = time.perf_counter()
    features = model[0].transform([row["text"] for row in rows])
    given = model[1].predict_proba(features)
    seconds = time.perf_counter() - start
    probabilities = np.zeros((len(rows), len(experiment.labels)))
    probabilities[:, [experiment.labels.index(name) for name in model.classes_]] = given
    return results.write_result(
        experiment,
        "tfidf",
        split,
        rows,
        probabilities=probabilities,
        seconds=round(seconds, 4),
        tokens=int(features.nnz),
        parameters=len(experiment.labels),
        device="cpu",
        dtype="float64",
        model=f"TF-IDF of words and word pairs, logistic regression (C = {MODEL['C']})",
        inputs_sha256=inputs_sha256,
    )


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
