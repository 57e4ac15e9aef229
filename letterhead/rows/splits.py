"""Which rows are for training, validation and test, drawn by seed and stratified by label."""

from pathlib import Path

import numpy as np

from letterhead.config.data import Rows
from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, read_jsonl
from letterhead.rows.duplicates import drop_repeated, near_duplicates
from letterhead.rows.pool import SPLITS, UNUSED, Pool


def stratified(
    candidates: np.ndarray,
    label: np.ndarray,
    n: int,
    rng: np.random.Generator,
    rank: np.ndarray | None = None,
) -> np.ndarray:
    """Draw n of the candidate row numbers, each label in its proportion (largest remainders first),
    sorted; with `rank`, a number for each row, those of the lowest rank."""
    counts = np.bincount(label[candidates])
    share = counts * (n / max(len(candidates), 1))
    take = np.floor(share).astype(int)
    for k in np.argsort(take - share, kind="stable")[: n - take.sum()]:
        take[k] += 1
    drawn = []
    for k in range(len(counts)):
        of_label = candidates[label[candidates] == k]
        order = (
            rng.permutation(of_label)
            if rank is None
            else of_label[np.argsort(rank[of_label], kind="stable")]
        )
        drawn.append(order[: take[k]])
    return np.sort(np.concatenate(drawn))


def whole_groups(
    pool: Pool, candidates: np.ndarray, n: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw some n of the candidate row numbers, sorted, so that no group is divided: the latest
    ones where rows have a time (then n or more), else groups in random order that together have at
    most n rows.

    Raises
    ------
    LetterheadError : every group has more than n rows
    """
    units = np.arange(len(candidates))
    if len(pool.group):
        units = np.unique(np.frombuffer(pool.group, "Q")[candidates], return_inverse=True)[1]
    sizes = np.bincount(units)
    if len(pool.time):
        latest = np.full(len(sizes), -np.inf)
        np.maximum.at(latest, units, np.frombuffer(pool.time, "d")[candidates])
        shuffled = rng.permutation(len(sizes))  # of those of the same time
        order = shuffled[np.argsort(-latest[shuffled], kind="stable")]
        taken = order[: int(np.searchsorted(np.cumsum(sizes[order]), n)) + 1] if n else order[:0]
    else:
        taken, rows = [], 0
        for unit in rng.permutation(len(sizes)):
            if rows + sizes[unit] <= n:
                taken.append(unit)
                rows += sizes[unit]
        if n and not taken:
            raise LetterheadError(
                f"data.group: every group has more than the {n} rows that a split asks for; raise "
                f"data.rows.test and data.rows.validation"
            )
    return np.sort(candidates[np.isin(units, taken)])


def leave_groups_whole(pool: Pool, chosen: np.ndarray, card: dict) -> None:
    """Take rows out of train and of a published validation split, in `chosen`, whose group stands
    in a published split behind them."""
    if not len(pool.group):
        return
    group, dropped = np.frombuffer(pool.group, "Q"), 0
    for number in (1, 0):
        again = (chosen == number) & np.isin(group, group[chosen > number])
        chosen[again] = UNUSED
        dropped += int(again.sum())
    card["dropped"]["group stands in validation or test"] = dropped


def tell_order(pool: Pool, chosen: np.ndarray, experiment: Experiment, card: dict) -> None:
    """Note in the card how many groups each split has, and of which time its rows are."""
    data = experiment.data
    if data.group:
        group = np.frombuffer(pool.group, "Q")
        card["groups"] = {"column": data.group} | {
            split: len(np.unique(group[chosen == number])) for number, split in enumerate(SPLITS)
        }
    if data.time:
        time = np.frombuffer(pool.time, "d")
        card["time"] = {"column": data.time, "dates": pool.has_dates} | {
            split: [float(time[chosen == number].min()), float(time[chosen == number].max())]
            for number, split in enumerate(SPLITS)
            if (chosen == number).any()
        }


def read_ranking(pool_path: Path, rows: Rows) -> np.ndarray | None:
    """The rank of every row of the pool by `data.rows.train_from`, shape (rows,), NaN for one that
    was not ranked; None where rows are drawn.

    Raises
    ------
    LetterheadError : no ranking is named, or it is not there
    """
    if rows.train_from == "random":
        return None
    if rows.ranking is None or not rows.ranking.is_file():
        raise LetterheadError(
            f"data.rows.ranking: {rows.ranking or 'not set'}, and no such file; run: make "
            f"rank, and name it"
        )
    sign = 1 if rows.train_from == "hard" else -1
    margins = {line["id"]: sign * line["margin"] for line in read_jsonl(rows.ranking)}
    return np.array([margins.get(row["id"], np.nan) for row in read_jsonl(pool_path)])


def draw_splits(pool: Pool, experiment: Experiment, card: dict, pool_path: Path) -> np.ndarray:
    """Decide for every row of the pool which split it goes to; what is repeated or left out is
    counted in `card`.

    Of two subsets that differ in data.rows.train alone the smaller is part of the larger, if each
    label has rows in both.

    Returns
    -------
    array of int8, shape (rows,) : index in SPLITS, or UNUSED

    Raises
    ------
    LetterheadError : a split would be empty, or asks for more rows than there are
    """
    rows, rng = experiment.data.rows, np.random.default_rng(experiment.data.seed)
    label, source, _ = pool.arrays()
    if not (source == 0).any():
        raise LetterheadError(f"{experiment.data.source}: holds no rows to train on")
    chosen = drop_repeated(pool, experiment, card, pool_path)
    leave_groups_whole(pool, chosen, card)
    ordered = len(pool.group) or len(pool.time)
    for number, wanted in ((2, rows.test), (1, rows.validation)):
        split, own = SPLITS[number], bool((source == number).any())
        if own and (wanted is None or isinstance(wanted, float)):
            continue  # a published split, all of it
        if wanted is None:
            raise LetterheadError(
                f"{experiment.data.source}: no {split} split; set data.rows.{split} to draw one"
            )
        candidates = np.flatnonzero(chosen == (number if own else 0))
        n = round(wanted * len(candidates)) if isinstance(wanted, float) else wanted
        if n > len(candidates):
            raise LetterheadError(
                f"data.rows.{split} asks for {n} rows, but there are {len(candidates)} to draw from"
            )
        if ordered:
            drawn = whole_groups(pool, candidates, n, rng)
        else:
            drawn = stratified(candidates, label, n, rng)
        if own:
            chosen[candidates] = UNUSED
        chosen[drawn] = number
    near = []
    if experiment.data.near_duplicates == "drop":
        near = near_duplicates(pool_path, chosen)
        again = sorted({number for _, _, numbers in near for number in numbers})
        chosen[again] = UNUSED
        card["dropped"]["text nearly one of test or validation"] = len(again)
    train = np.flatnonzero(chosen == 0)
    if not len(train):
        raise LetterheadError(
            "no rows are left to train on; lower data.rows.test or data.rows.validation"
        )
    chosen[train] = UNUSED
    if rows.train_seed is not None:
        rng = np.random.default_rng([rows.train_seed, 2])
    n, rank = min(rows.train or len(train), len(train)), read_ranking(pool_path, rows)
    if rank is not None and np.isnan(rank[train]).any():
        raise LetterheadError(
            f"{rows.ranking}: ranks other rows than these train rows; run make rank on this "
            f"data and seed"
        )
    chosen[stratified(train, label, n, rng, rank)] = 0
    if experiment.data.near_duplicates == "keep":
        near = near_duplicates(pool_path, chosen)
    card["near_duplicates"] = {split: [] for split in SPLITS[1:]}
    for at, pair, _ in near:
        card["near_duplicates"][SPLITS[chosen[at]]].append(pair)
    card["rows"] |= {split: int((chosen == number).sum()) for number, split in enumerate(SPLITS)}
    counts = [
        np.bincount(label[chosen == n], minlength=len(experiment.labels)).tolist()
        for n in range(len(SPLITS))
    ]
    card["label_counts"] = {
        s: dict(zip(experiment.labels, c, strict=True)) for s, c in zip(SPLITS, counts, strict=True)
    }
    tell_order(pool, chosen, experiment, card)
    return chosen


def draw_decoder_rows(pool: Pool, chosen: np.ndarray, experiment: Experiment) -> np.ndarray:
    """Which rows of train the decoder is trained on: booleans, shape (rows,)."""
    label = pool.arrays()[0]
    train = np.flatnonzero(chosen == 0)
    n = min(experiment.decoder.train_rows or len(train), len(train))
    mask = np.zeros(len(chosen), bool)
    mask[stratified(train, label, n, np.random.default_rng([experiment.data.seed, 1]))] = True
    return mask
