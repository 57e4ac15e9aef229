"""TF-IDF with logistic regression."""

import time
from collections.abc import Sequence

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from letterhead.config.experiment import Experiment
from letterhead.models.fitted import (
    Fitted,
    Scores,
    class_probabilities,
    class_weight,
    require_classes,
)

# A word, or one character of a script that writes no spaces (kana, Han).
TOKEN = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+"
# Of the values of C the one with the lowest log loss on validation rows; without those the first.
MODEL = {
    "vectorizer": {"token_pattern": TOKEN, "ngram_range": (1, 2), "sublinear_tf": True},
    "C": (10, 1, 3, 30, 100, 300),
}


def fit(experiment: Experiment, rows: list[dict], validation: list[dict]) -> Fitted:
    """Fit it on rows, its regularisation chosen on validation rows.

    Raises
    ------
    LetterheadError : only one class is among them
    """
    require_classes(rows)
    vectorizer, truth = TfidfVectorizer(**MODEL["vectorizer"]), [row["label"] for row in rows]
    features = vectorizer.fit_transform([row["text"] for row in rows])
    settings = {"class_weight": class_weight(experiment), "random_state": experiment.seed}
    regressions = [
        LogisticRegression(C=C, max_iter=1000, **settings).fit(features, truth)
        for C in (MODEL["C"] if validation else MODEL["C"][:1])
    ]

    def loss(regression: LogisticRegression) -> float:
        labels = sorted({row["label"] for row in [*rows, *validation]})
        features = vectorizer.transform([row["text"] for row in validation])
        probabilities = class_probabilities(regression, features, labels)
        return log_loss([row["label"] for row in validation], probabilities, labels=labels)

    regression = min(regressions, key=loss) if validation else regressions[0]

    def score(texts: Sequence[str], keep: bool = False) -> Scores:
        start = time.perf_counter()
        features = vectorizer.transform(texts)
        probabilities = class_probabilities(regression, features, experiment.labels)
        return Scores(probabilities, int(features.nnz), time.perf_counter() - start)

    title = f"TF-IDF of words and word pairs, logistic regression (C = {regression.C})"
    return Fitted(score, len(experiment.labels), "cpu", "float64", title, regression)
