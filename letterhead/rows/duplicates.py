"""Texts that stand twice, that stand with different labels, or that are nearly alike (the search
for these takes a kilobyte a row)."""

import json
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import HashingVectorizer

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError
from letterhead.models.tfidf import TOKEN
from letterhead.rows.pool import SPLITS, UNUSED, Pool
from letterhead.runs.terminal import progress, say

# Texts are near-duplicates if they share so much of their runs of three words.
ALIKE = 0.75
CHUNK = 500
CONFLICTS_TOLD, CONFLICTS_LISTED = 3, 100


def drop_repeated(pool: Pool, experiment: Experiment, card: dict, pool_path: Path) -> np.ndarray:
    """Count texts that stand twice in a split or in two splits, and take out of train those that
    are to go.

    A published test or validation split stays as published: only train, from which others are
    drawn, is thinned.

    Raises
    ------
    LetterheadError : a text stands in train with different labels, and data.conflicts says stop
    """
    data = experiment.data
    _, source, text_hash = pool.arrays()
    chosen = source.copy()
    settle_conflicts(pool, experiment, card, pool_path, chosen)
    present = [number for number in range(len(SPLITS)) if (source == number).any()]
    card["duplicates"], card["shared_with_train"] = {}, {}
    for number in present:
        card["duplicates"][SPLITS[number]] = len(
            repeated(np.flatnonzero(source == number), text_hash)
        )
    if data.duplicates == "drop":
        again = repeated(np.flatnonzero(chosen == 0), text_hash)
        chosen[again] = UNUSED
        card["dropped"]["duplicate text"] = len(again)
    train = np.flatnonzero(chosen == 0)
    for number in present[1:]:
        mine = text_hash[source == number]
        card["shared_with_train"][SPLITS[number]] = int(np.isin(mine, text_hash[train]).sum())
        if data.shared == "drop":
            chosen[train[np.isin(text_hash[train], mine)]] = UNUSED
    if data.shared == "drop":
        card["dropped"]["text shared with test or validation"] = len(train) - int(
            (chosen == 0).sum()
        )
    return chosen


def repeated(rows: np.ndarray, text_hash: np.ndarray) -> np.ndarray:
    """Of these row numbers those whose text stands among them before."""
    first = rows[np.unique(text_hash[rows], return_index=True)[1]]
    return np.setdiff1d(rows, first, assume_unique=True)


def settle_conflicts(
    pool: Pool, experiment: Experiment, card: dict, pool_path: Path, chosen: np.ndarray
) -> None:
    """Count and list texts that stand with different labels, and take out of train, in `chosen`,
    what `data.conflicts` says.

    Raises
    ------
    LetterheadError : there are some in train, and it says stop
    """
    label, source, text_hash = pool.arrays()
    texts, text_of_row = np.unique(text_hash, return_inverse=True)
    lowest, highest = np.full(len(texts), len(experiment.labels)), np.full(len(texts), -1)
    np.minimum.at(lowest, text_of_row, label)
    np.maximum.at(highest, text_of_row, label)
    rows = np.flatnonzero((lowest < highest)[text_of_row])
    listed = list_conflicts(rows, text_of_row, pool_path)
    card["conflicts"] = {
        "texts": int((lowest < highest).sum()),
        "rows": len(rows),
        "listed": listed,
    }
    if not len(rows):
        return
    examples = "; ".join(
        f"“{conflict['text']}” is "
        f"{' and '.join(f'{name} ({ids[0]})' for name, ids in conflict['labels'].items())}"
        for conflict in listed[:CONFLICTS_TOLD]
    )
    found = (
        f"{card['conflicts']['texts']} texts stand with different labels, for example {examples}"
    )
    leaving = conflicts_to_leave(
        rows[source[rows] == 0], label, text_of_row, experiment.data.conflicts
    )
    if experiment.data.conflicts == "stop" and len(leaving):
        raise LetterheadError(
            f"{experiment.data.source}: {found}; mend the labels, or say data.conflicts: "
            f"drop (all such rows leave train), "
            "majority (the label that most of them have) or keep"
        )
    chosen[leaving] = UNUSED
    card["dropped"]["text with different labels"] = len(leaving)
    say(
        f"{found}; {len(leaving)} such rows leave train (data.conflicts: "
        f"{experiment.data.conflicts})"
    )


def conflicts_to_leave(
    rows: np.ndarray, label: np.ndarray, text_of_row: np.ndarray, policy: str
) -> np.ndarray:
    """Of the train rows whose text stands with different labels those that leave train under a
    policy of `data.conflicts` (see `Data`); one whose text has a single label in train stays."""
    leaving = []
    by_text = rows[np.argsort(text_of_row[rows], kind="stable")]
    for same_text in np.split(by_text, np.flatnonzero(np.diff(text_of_row[by_text])) + 1):
        counts = np.bincount(label[same_text])
        if policy == "keep" or (counts > 0).sum() < 2:
            continue
        winners = np.flatnonzero(counts == counts.max())
        stays = winners[0] if policy == "majority" and len(winners) == 1 else None
        leaving.extend(row for row in same_text if label[row] != stays)
    return np.array(leaving, dtype=np.int64)


def list_conflicts(rows: np.ndarray, text_of_row: np.ndarray, pool_path: Path) -> list[dict]:
    """The first texts that stand with different labels: the text's beginning, and label → ids of
    the rows that have it."""
    wanted, found = set(rows.tolist()), {}
    with open(pool_path, encoding="utf-8", newline="\n") as pool:
        for number, line in enumerate(pool if wanted else ()):
            if number not in wanted:
                continue
            row, text = json.loads(line), text_of_row[number]
            if text not in found and len(found) == CONFLICTS_LISTED:
                continue
            conflict = found.setdefault(
                text, {"text": " ".join(row["text"].split())[:60], "labels": {}}
            )
            conflict["labels"].setdefault(row["label"], []).append(row["id"])
    return list(found.values())


def near_duplicates(
    pool_path: Path, chosen: np.ndarray
) -> list[tuple[int, tuple[str, str], np.ndarray]]:
    """Rows of test and validation whose text nearly stands in train: Jaccard similarity of runs of
    three words (Broder 1997) of at least `ALIKE`; none is missed.

    Returns
    -------
    list : the row's number; its id and that of the train row most alike; the numbers of all train
        rows that are alike
    """
    counter = HashingVectorizer(
        ngram_range=(3, 3),
        token_pattern=TOKEN,
        n_features=1 << 22,
        binary=True,
        norm=None,
        alternate_sign=False,
    )
    ids, numbers, runs = {}, {}, {}
    for name, mine in (("train", chosen == 0), ("others", chosen > 0)):
        numbers[name], ids[name] = np.flatnonzero(mine), []

        def texts(mine=mine, ids=ids[name]):
            with open(pool_path, encoding="utf-8", newline="\n") as pool:
                for line, wanted in zip(pool, mine, strict=True):
                    if wanted:
                        row = json.loads(line)
                        ids.append(row["id"])
                        yield row["text"]

        runs[name] = counter.transform(texts()) if mine.any() else None
    if runs["train"] is None or runs["others"] is None:
        return []
    frequency = sum(
        np.bincount(matrix.indices, minlength=matrix.shape[1]) for matrix in runs.values()
    )
    rarest, sizes = (
        {of: rarest_runs(runs[of], frequency) for of in runs},
        {of: runs[of].getnnz(axis=1) for of in runs},
    )
    transposed, found = rarest["train"].T.tocsr(), []
    for begin in progress(
        range(0, len(numbers["others"]), CHUNK),
        desc="looking for near-duplicates",
        unit=f" x {CHUNK} rows",
    ):
        one, other = (rarest["others"][begin : begin + CHUNK] @ transposed).nonzero()
        one += begin
        shared = runs["others"][one].multiply(runs["train"][other]).sum(axis=1).A1
        similarity = shared / (sizes["others"][one] + sizes["train"][other] - shared)
        order = np.lexsort((other, -similarity, one))  # of each row the nearest first
        order = order[similarity[order] >= ALIKE]
        rows, begins = np.unique(one[order], return_index=True)
        for row, columns in zip(rows, np.split(other[order], begins[1:]), strict=False):
            pair = (ids["others"][row], ids["train"][columns[0]])
            found.append((int(numbers["others"][row]), pair, numbers["train"][columns]))
    return found


def rarest_runs(runs, frequency: np.ndarray):
    """Of each row of a CSR matrix the rarest runs, so many that two rows which are alike share at
    least one of them: all but the commonest ceil(ALIKE n) - 1 of n (the prefix filter of Chaudhuri
    et al. 2006; Bayardo et al. 2007). What stands in every text, a signature or a notice, then
    costs nothing."""
    sizes = runs.getnnz(axis=1)
    kept = sizes - np.ceil(ALIKE * sizes).astype(int) + 1
    row = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((runs.indices, frequency[runs.indices], row))
    place = np.arange(len(row)) - runs.indptr[row]
    order = order[place < kept[row]]
    return csr_matrix((runs.data[order], (row[order], runs.indices[order])), shape=runs.shape)
