"""TF-IDF with logistic regression."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.special import softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from letterhead.config.experiment import Experiment
from letterhead.files import read_json, write_json
from letterhead.models.fitted import (
    Fitted,
    Scores,
    class_probabilities,
    class_weight,
    fit_regression,
    last_layer,
    require_classes,
)

MODEL_TYPE = "tf-idf"  # in an export's config.json
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

    def save_to(folder: Path) -> None:
        save(vectorizer, regression, experiment.labels, folder)

    title = f"TF-IDF of words and word pairs, logistic regression (C = {regression.C})"
    return Fitted(score, len(experiment.labels), "cpu", "float64", title, regression, save=save_to)


def save(
    vectorizer: TfidfVectorizer,
    regression: LogisticRegression,
    labels: Sequence[str],
    folder: Path,
) -> None:
    """Write terms and weights to a folder: config.json and model.safetensors, no pickle."""
    weight, bias = last_layer(regression, labels)
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "model.safetensors")
    config = {
        "model_type": MODEL_TYPE,
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "vectorizer": MODEL["vectorizer"],
        "terms": vectorizer.get_feature_names_out().tolist(),
        "idf": vectorizer.idf_.tolist(),
    }
    write_json(folder / "config.json", config)


def is_saved(folder: Path) -> bool:
    """Whether a folder holds what `save` wrote."""
    return (read_json(folder / "config.json") or {}).get("model_type") == MODEL_TYPE


def load_saved(folder: Path) -> Callable[[Sequence[str]], np.ndarray]:
    """What `save` wrote, as a function from texts to probabilities."""
    config, weights = read_json(folder / "config.json"), load_file(folder / "model.safetensors")
    settings = config["vectorizer"] | {"ngram_range": tuple(config["vectorizer"]["ngram_range"])}
    vectorizer = TfidfVectorizer(**settings, vocabulary=config["terms"])
    vectorizer.idf_ = np.array(config["idf"])

    def classify(texts: Sequence[str]) -> np.ndarray:
        scores = vectorizer.transform(texts) @ weights["linear.weight"].T
        return softmax(scores + weights["linear.bias"], axis=1)

    return classify
