"""A method that is fitted in seconds: it is fitted again where it is needed and never pickled."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import get_scorer
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.multiclass import OneVsRestClassifier

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError
from letterhead.pipeline import METHODS
from letterhead.runs import results

FOLDS = 5  # to choose C
ABSENT = -1e4  # the logit of a class that train lacks


@dataclass(frozen=True)
class Scores:
    """What a fitted method answers.

    Attributes
    ----------
    probabilities : shape (rows, classes), in the order of the experiment's labels
    tokens : how many tokens (or terms) went through it
    seconds : how long that took, or took when it was computed first
    """

    probabilities: np.ndarray
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Fitted:
    """A method that was fitted.

    Attributes
    ----------
    score : texts → Scores; `keep=True` may read and write what is kept on disk
    parameters : multiply-adds of a token
    device, dtype : where and in what it computes
    model : what it is, in words
    saved_seconds : what of the fit came from disk took when it was computed
    save : writes it to a folder as a model of its own, where it has a form for that
    """

    score: Callable[..., Scores]
    parameters: int
    device: str
    dtype: str
    model: str
    saved_seconds: float = 0.0
    save: Callable[[Path], None] | None = None


def fit_method(experiment: Experiment, name: str) -> Fitted:
    """Fit a method on the rows that it is trained on."""
    method = METHODS[name]
    rows = results.read_rows(experiment, method.rows)
    return method.fit()(experiment, rows)


def class_weight(experiment: Experiment) -> str | None:
    """scikit-learn's name for `balance`. Repeated rows are the same to it as weights, but would
    stand on both sides of a cross-validation."""
    return None if experiment.balance == "none" else "balanced"


def require_classes(rows: Sequence[dict]) -> None:
    """Make sure that there is something to tell apart.

    Raises
    ------
    LetterheadError : the rows are of one class only
    """
    if len({row["label"] for row in rows}) < 2:
        raise LetterheadError(
            "train holds rows of one class only; raise data.rows.train, or mend the labels"
        )


def fit_regression(
    features, truth: Sequence[str], strengths: Sequence[float], seed: int, weight: str | None
) -> LogisticRegression:
    """One logistic regression of all classes on rows of hundreds of numbers, its C chosen
    (`fit_chosen`).

    Parameters
    ----------
    weight : scikit-learn's `class_weight`
    """
    # On embeddings of 1,658 rows of BBC News, on two cores, 1.2 s for the whole search; with lbfgs
    # 7.4 s.
    model = LogisticRegression(
        max_iter=1000, solver="newton-cg", class_weight=weight, random_state=seed
    )
    return fit_chosen(model, "C", strengths, features, truth, seed)


def fit_chosen(
    model: BaseEstimator,
    key: str,
    strengths: Sequence[float],
    features,
    truth: Sequence[str],
    seed: int,
    weights: np.ndarray | None = None,
) -> BaseEstimator:
    """Fit logistic regression, its C chosen by stratified cross-validation on the same rows:
    validation rows stay for checkpoints, temperatures and cascades.

    Parameters
    ----------
    model : scikit-learn's, not fitted
    key : the name of its C
    strengths : values of C; the first where a class has one row alone
    features : shape (rows, width), sparse or not
    weights : of the rows, with scikit-learn's metadata routing enabled
    """
    folds = min(FOLDS, min(Counter(truth).values()))
    more = {} if weights is None else {"sample_weight": weights}
    if folds < 2:
        return model.set_params(**{key: strengths[0]}).fit(features, truth, **more)
    scorer = get_scorer("neg_log_loss")
    search = GridSearchCV(
        model,
        {key: list(strengths)},
        scoring=scorer.set_score_request(sample_weight=False) if more else scorer,
        cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
    )
    return search.fit(features, truth, **more).best_estimator_


def last_layer(
    regression: LogisticRegression | OneVsRestClassifier, labels: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """A regression as a linear layer whose softmax gives its probabilities: weight, shape (classes,
    features), and bias; a class that train lacks gets none. Of one regression a class the softmax
    is of their log-odds, which the normalised probabilities rank alike."""
    parts = getattr(regression, "estimators_", [regression])
    weight = np.vstack([part.coef_ for part in parts])
    bias = np.hstack([part.intercept_ for part in parts])
    if len(regression.classes_) == 2:  # one row, of the second class against the first
        weight, bias = np.vstack([0 * weight, weight]), np.hstack([0 * bias, bias])
    columns = [labels.index(name) for name in regression.classes_]
    whole = np.zeros((len(labels), weight.shape[1])), np.full(len(labels), ABSENT)
    whole[0][columns], whole[1][columns] = weight, bias
    return whole


def class_probabilities(layer: tuple[np.ndarray, np.ndarray], features) -> np.ndarray:
    """Probabilities by a `last_layer`, shape (rows, classes); a class that train lacks gets 0."""
    weight, bias = layer
    return softmax(features @ weight.T + bias, axis=1)
