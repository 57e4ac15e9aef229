"""TF-IDF with logistic regression: fitted in seconds, so it is fitted again where it is needed and
never pickled."""

from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline, make_pipeline

from letterhead.files import LetterheadError

# A word, or one character of a script that writes no spaces (kana, Han).
TOKEN = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+"
# Of the values of C the one with the lowest log loss on validation rows; without those the first.
MODEL = {
    "vectorizer": {"token_pattern": TOKEN, "ngram_range": (1, 2), "sublinear_tf": True},
    "C": (10, 1, 3, 30, 100, 300),
}


def fit(rows: list[dict], validation: list[dict], seed: int) -> Pipeline:
    """Fit the pipeline on rows, its regularisation chosen on validation rows.

    Raises
    ------
    LetterheadError : only one class is among them
    """
    if len({row["label"] for row in rows}) < 2:
        raise LetterheadError(
            "train holds rows of one class only; raise data.rows.train, or mend the labels"
        )
    vectorizer, truth = TfidfVectorizer(**MODEL["vectorizer"]), [row["label"] for row in rows]
    features = vectorizer.fit_transform([row["text"] for row in rows])
    labels = sorted({row["label"] for row in [*rows, *validation]})
    models = []
    for C in MODEL["C"] if validation else MODEL["C"][:1]:
        regression = LogisticRegression(C=C, max_iter=1000, random_state=seed).fit(features, truth)
        models.append(make_pipeline(vectorizer, regression))
    if not validation:
        return models[0]

    def loss(model: Pipeline) -> float:
        probabilities, _ = classify(model, [row["text"] for row in validation], labels)
        return log_loss([row["label"] for row in validation], probabilities, labels=labels)

    return min(models, key=loss)


def classify(
    model: Pipeline, texts: Sequence[str], labels: Sequence[str]
) -> tuple[np.ndarray, int]:
    """Probabilities, shape (rows, classes), and how many terms the texts hold; a class that train
    lacks gets 0."""
    features = model[0].transform(texts)
    probabilities = np.zeros((len(texts), len(labels)))
    probabilities[:, [labels.index(name) for name in model.classes_]] = model[1].predict_proba(
        features
    )
    return probabilities, int(features.nnz)
