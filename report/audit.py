"""Which labels look wrong: rows whose given label is improbable out of sample, and rows that are
nearly alike with different labels.

    python -m report.audit --experiment quick

runs/EXPERIMENT/audit/suspects.csv holds them, the most suspect first; audit.html shows them. No
label is changed. The probabilities are those of logistic regression on frozen embeddings, by
cross-validation over the rows of all splits; with `data.group`, no row is judged by others of its
group.
"""

import csv
from collections import Counter

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, atomic_open
from letterhead.models.embeddings import C, Embedder
from letterhead.models.fitted import FOLDS, class_weight, fit_regression
from letterhead.pipeline import AUDIT, read_card
from letterhead.runs import results
from letterhead.runs.stage import StageRun, run
from letterhead.runs.terminal import progress
from letterhead.stats.label_errors import Suspects, find_suspects
from report.build import environment

SPLITS = ("train", "validation", "test")
# Embeddings nearer than this, as cosines, with different labels are told
ALIKE = 0.95
COSINES = 1 << 26  # that are held at a time
SHOWN_ROWS, SHOWN_PAIRS = 100, 12
COLUMNS = ("id", "split", "label", "likely", "p(label)", "p(likely)", "alike", "text")


def main(experiment: Experiment) -> None:
    stage = StageRun(experiment, AUDIT)
    table, page = stage.folder / "suspects.csv", stage.folder / "audit.html"
    if stage.is_current():
        stage.tell_current()
        return
    stage.start()
    rows = [
        row | {"split": split} for split in SPLITS for row in results.read_rows(experiment, split)
    ]
    labelled = results.class_numbers(experiment, rows)
    vectors = Embedder(experiment).embed([row["text"] for row in rows], keep=True).vectors
    groups = np.array([row["group"] for row in rows]) if experiment.data.group else None
    suspects = find_suspects(out_of_sample(experiment, vectors, labelled, groups), labelled)
    found = suspected(experiment, rows, vectors, suspects)
    with atomic_open(table) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(found)
    pairs = Counter((row["label"], row["likely"]) for row in found if row["likely"])
    context = {
        "experiment": experiment,
        "rows": found[:SHOWN_ROWS],
        "found": len(found),
        "improbable": sum(bool(row["likely"]) for row in found),
        "n": len(rows),
        "pairs": pairs.most_common(SHOWN_PAIRS),
        "conflicts": read_card(experiment)["conflicts"],
        "alike": ALIKE,
        "folds": FOLDS,
    }
    with atomic_open(page) as file:
        file.write(environment().get_template("audit.html.jinja").render(context))
    stage.finish(
        [table, page],
        f"{len(found):,} of {len(rows):,} labels look wrong: {table}, and {page} shows them. Mend "
        f"them in the source, or map them to null",
        rows=len(rows),
    )


def out_of_sample(
    experiment: Experiment, vectors: np.ndarray, labelled: np.ndarray, groups: np.ndarray | None
) -> np.ndarray:
    """Each row's probabilities by a regression that saw neither it nor its group, shape (rows,
    classes). A row whose class has fewer than FOLDS rows, or none outside the fold, is certain of
    its label.

    Parameters
    ----------
    vectors : embeddings, shape (rows, width)
    labelled : class numbers, shape (rows,)
    groups : what no fold divides, shape (rows,)

    Raises
    ------
    LetterheadError : all rows are of one group
    """
    weight, seed = class_weight(experiment), experiment.seed
    strength = fit_regression(vectors, labelled.tolist(), C, seed, weight).C
    settings = {"solver": "newton-cg", "class_weight": weight, "random_state": seed}
    counts = np.bincount(labelled, minlength=len(experiment.labels))
    frequent = np.flatnonzero(counts[labelled] >= FOLDS)
    vectors, numbers = vectors[frequent], labelled[frequent]
    if groups is None:
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(vectors, numbers)
    else:
        groups = groups[frequent]
        n = min(FOLDS, len(np.unique(groups)))
        if n < 2:
            raise LetterheadError(
                f"data.group: column {experiment.data.group!r} holds one group, so no row can be "
                f"judged by others; unset data.group"
            )
        divider = StratifiedGroupKFold(n, shuffle=True, random_state=seed)
        folds = divider.split(vectors, numbers, groups)
    probabilities = np.eye(len(experiment.labels))[labelled]
    for seen, left in folds:
        known = left[np.isin(numbers[left], numbers[seen])]
        if len(known) and len(np.unique(numbers[seen])) > 1:
            model = LogisticRegression(C=strength, max_iter=1000, **settings)
            model.fit(vectors[seen], numbers[seen])
            probabilities[frequent[known]] = 0.0
            judged = model.predict_proba(vectors[known])
            probabilities[np.ix_(frequent[known], model.classes_)] = judged
    return probabilities


def suspected(
    experiment: Experiment, rows: list[dict], vectors: np.ndarray, suspects: Suspects
) -> list[dict]:
    """The suspected rows as lines of the table: those with an improbable label, the most suspect
    first, then those that another row is nearly like.

    Parameters
    ----------
    vectors : embeddings, shape (rows, width)
    """
    other = alike_with_another_label(vectors, suspects.labelled)
    improbable = suspects.ranked()
    merely_alike = np.setdiff1d(np.flatnonzero(other >= 0), improbable, assume_unique=True)
    lines = []
    for number in (*improbable, *merely_alike):
        row, likely = rows[number], suspects.likely[number]
        near = rows[other[number]] if other[number] >= 0 else None
        is_improbable = likely != suspects.labelled[number]
        lines.append(
            {
                "id": row["id"],
                "split": row["split"],
                "label": row["label"],
                "likely": experiment.labels[likely] if is_improbable else "",
                "p(label)": f"{suspects.of_label[number]:.3f}",
                "p(likely)": f"{suspects.of_likely[number]:.3f}" if is_improbable else "",
                "alike": f"{near['id']}: {near['label']}" if near else "",
                "text": row["text"],
            }
        )
    return lines


def alike_with_another_label(vectors: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """For each row the number of the row most like it that has another label, if their cosine is
    `ALIKE` or more, else -1; shape (rows,)."""
    found = np.full(len(labelled), -1)
    single = vectors.astype(np.float32)
    chunk = max(1, COSINES // len(labelled))
    for start in progress(range(0, len(labelled), chunk), desc="comparing rows"):
        part = slice(start, start + chunk)
        cosine = single[part] @ single.T
        cosine[labelled[part][:, None] == labelled[None, :]] = -1.0
        nearest = cosine.argmax(axis=1)
        near = cosine[np.arange(len(nearest)), nearest] >= ALIKE
        found[part][near] = nearest[near]
    return found


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
