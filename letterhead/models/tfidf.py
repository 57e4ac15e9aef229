"""TF-IDF with logistic regression."""

import time
from collections.abc import Sequence

from sklearn.feature_extraction.text import TfidfVectorizer

from letterhead.config.experiment import Experiment
from letterhead.models.fitted import (
    Fitted,
    Scores,
    class_probabilities,
    class_weight,
    fit_regression,
    require_classes,
)

# A word, or one character of a script that writes no spaces (kana, Han).
TOKEN = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+"
MODEL = {
    "vectorizer": {"token_pattern": TOKEN, "ngram_range": (1, 2), "sublinear_tf": True},
    "C": (10, 1, 3, 30, 100, 300),
}


def fit(experiment: Experiment, rows: list[dict]) -> Fitted:
    """Fit it on rows, its regularisation chosen by cross-validation on the same rows.

    Raises
    ------
    LetterheadError : only one class is among them
    """
    require_classes(rows)
    vectorizer, truth = TfidfVectorizer(**MODEL["vectorizer"]), [row["label"] for row in rows]
    features = vectorizer.fit_transform([row["text"] for row in rows])
    weight = class_weight(experiment)
    regression = fit_regression(features, truth, MODEL["C"], experiment.seed, weight)

    def score(texts: Sequence[str], keep: bool = False) -> Scores:
        start = time.perf_counter()
        features = vectorizer.transform(texts)
        probabilities = class_probabilities(regression, features, experiment.labels)
        return Scores(probabilities, int(features.nnz), time.perf_counter() - start)

    title = f"TF-IDF of words and word pairs, logistic regression (C = {regression.C})"
    return Fitted(score, len(experiment.labels), "cpu", "float64", title, regression)
