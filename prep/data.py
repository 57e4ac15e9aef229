"""Fetch models and rows; write train/validation/test.jsonl, the Alpaca file that LLaMA-Factory
reads, and a data card.

    python -m prep.data --experiment quick

Two passes. The first reads the source row by row into a pool on disk and keeps, in arrays, each
row's label and a hash of its text (about 20 bytes a row). From these the splits are drawn (the
search for near-duplicates takes a kilobyte a row). The second copies the pool's lines to their
files.
"""

import hashlib
import json
import os
import random
import re
from array import array
from collections import Counter
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import jsonlines
import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import HashingVectorizer

from letterhead.config.data import Data, Rows, same_spelling
from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, atomic_open, exclusive, read_jsonl, write_json
from letterhead.models.checkpoints import require_language_model
from letterhead.models.prompt import (
    PromptEncoder,
    keep_words,
    load_prompt_encoder,
    load_scoring_encoder,
)
from letterhead.models.tfidf import TOKEN
from letterhead.pipeline import DATA
from letterhead.rows.fetch import CACHE, fetch_model
from letterhead.rows.sources import RawRow, Source, checked_text, open_source
from letterhead.runs.stage import OFFLINE, StageRun, run
from letterhead.runs.terminal import progress, say

SPLITS = ("train", "validation", "test")
FILES = (
    *(f"{split}.jsonl" for split in (*SPLITS, "decoder_train", "sft_train")),
    "dataset_info.json",
    "data_card.json",
)
UNUSED = -1
# Enough rows for percentiles of the token lengths; tokenising a million would take longer than all
# the rest.
LENGTH_SAMPLE = 5000
# Texts are near-duplicates if they share so much of their runs of three words.
ALIKE = 0.75
CHUNK = 500
CONFLICTS_TOLD, CONFLICTS_LISTED = 3, 100
WHOLE_NUMBER = re.compile(r"[+-]?\d{1,18}(\.0+)?")


def main(experiment: Experiment) -> None:
    data, folder = experiment.data, experiment.data_folder
    encoder_model = experiment.encoder.model
    with exclusive(CACHE / ".lock"):
        fetch_model(experiment.decoder.model, experiment.decoder.folder)
        fetch_model(encoder_model, experiment.encoder.folder)
    require_language_model(experiment.decoder.folder)
    if not data.source.startswith("hf:"):
        os.environ.update(OFFLINE)
    stage = StageRun(experiment, DATA)
    if stage.has_other_inputs() and experiment.results_folder.exists():
        print(
            f"{folder}: other settings or data than before, so what {experiment.run_folder} "
            f"holds will be made anew; "
            f'SET="name={experiment.name}2 …" keeps both'
        )
    if stage.is_current():
        stage.tell_current()
        check_examples(experiment)
        return
    stage.start()
    with exclusive(CACHE / ".lock"):
        source = open_source(data)
        first_number = first_label_number(open_source(data), data)
    if first_number is not None:
        say(f"labels: numbers from {first_number}: {numbered_names(data.labels, first_number)}")
    pool_path = folder / ".pool.jsonl"
    with ExitStack() as stack:
        stack.callback(pool_path.unlink, missing_ok=True)
        pool, card = read_pool(source.splits, experiment, pool_path, first_number)
        chosen = draw_splits(pool, experiment, card, pool_path)
        decoder_rows = draw_decoder_rows(pool, chosen, experiment)
        encoder = load_prompt_encoder(experiment)
        write_rows(pool_path, chosen, decoder_rows, experiment, encoder, card)
    card |= {
        "experiment": experiment.name,
        "title": experiment.title,
        "labels": experiment.labels,
        "sources": source.sha256,
    }
    sections = {"data": data, "decoder": experiment.decoder, "encoder": experiment.encoder}
    card["licenses"] = {name: section.license for name, section in sections.items()}
    card["token_lengths"] = token_lengths(experiment, encoder)
    write_json(folder / "data_card.json", card)
    write_json(folder / "dataset_info.json", dataset_info(experiment))
    headline, *details = summary(card)
    if details:
        say("; ".join(details))
    stage.finish(
        [folder / name for name in FILES], headline, rows=card["rows"]["read"], device="cpu"
    )
    check_examples(experiment)


def check_examples(experiment: Experiment) -> None:
    """Say, before anything is trained, whether the examples of `eval.examples` fit into a prompt,
    and what is cut.

    Raises
    ------
    LetterheadError : they do not fit
    """
    if not experiment.eval.examples:
        return
    encoder = load_scoring_encoder(experiment)
    texts = [row["text"] for row in read_jsonl(experiment.data_folder / "test.jsonl")]
    cut = sum(map(encoder.is_cut, texts))
    print(
        f"eval.examples: {encoder.examples_cut} of {experiment.eval.examples} examples "
        f"and {cut} of {len(texts)} test texts "
        f"are cut so that a prompt has at most {encoder.cutoff_len} tokens (cutoff_len)"
    )


class Pool:
    """What is kept in memory of the rows read: three arrays, one entry a row."""

    def __init__(self):
        self.label, self.source_split, self.text_hash = array("h"), array("b"), array("Q")

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Label index, index of the source's split in SPLITS, 64-bit hash of the text; each of
        shape (rows,)."""
        return (
            np.frombuffer(self.label, "h"),
            np.frombuffer(self.source_split, "b"),
            np.frombuffer(self.text_hash, "Q"),
        )


def read_pool(
    splits, experiment: Experiment, path: Path, first_number: int | None
) -> tuple[Pool, dict]:
    """Read every row of the source, checked, to a file of lines as they will stand in the splits;
    `first_number` is `first_label_number`'s.

    Raises
    ------
    LetterheadError : an empty text or a label outside the list; names file, row and mend
    """
    data, labels, pool = experiment.data, experiment.labels, Pool()
    index = {name: number for number, name in enumerate(labels)}
    dropped, shortened, read = Counter(), 0, Counter()
    with atomic_open(path) as file:
        for split, rows in splits.items():
            for row in progress(rows, desc=f"reading {split}", unit=" rows"):
                read[split] += 1
                if (found := label_and_text(row, data, dropped, first_number)) is None:
                    continue
                label, text = found
                shortened += len(text) < len(row.text.strip())
                pool.label.append(index[label])
                pool.source_split.append(SPLITS.index(split))
                pool.text_hash.append(
                    int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
                )
                file.write(
                    json.dumps({"id": row.id, "label": label, "text": text}, ensure_ascii=False)
                    + "\n"
                )
    rows = {"read": sum(read.values()), "read_by_split": dict(read)}
    numbering = {"labels_numbered_from": first_number}
    return pool, {"rows": rows, "dropped": dropped, "cut_to_max_words": shortened, **numbering}


def label_and_text(
    row: RawRow, data: Data, dropped: Counter, first_number: int | None = None
) -> tuple[str, str] | None:
    """A row's class and its text as the experiment cuts it; None for a row that is dropped, counted
    in `dropped`.

    Raises
    ------
    LetterheadError : what is wrong with the row, unless data.bad_rows drops it
    """
    try:
        label = label_name(row, data.labels, first_number)
        if label is not None:
            return label, keep_words(checked_text(row), data.max_words).strip()
        dropped["label mapped to null"] += 1
    except LetterheadError as error:
        if data.bad_rows == "stop":
            raise LetterheadError(
                f"{error} (or leave such rows out: data.bad_rows: drop)"
            ) from None
        if not dropped["bad row"]:
            say(f"{error}; this row is left out, and others like it: data.bad_rows: drop")
        dropped["bad row"] += 1
    return None


def label_name(
    row: RawRow, labels: list[str] | dict[str, str | None], first_number: int | None = None
) -> str | None:
    """The class of a row: through the map, by name, or by its number in the list; None drops the
    row.

    Parameters
    ----------
    first_number : the number of the list's first name, by `first_label_number`; None where the file
        writes none

    Raises
    ------
    LetterheadError : a label that the experiment does not name, or a row that can't be used
    """
    if row.fault:
        raise LetterheadError(f"{row.place}: {row.fault}")
    if isinstance(row.label, list | tuple | dict | set):
        raise LetterheadError(
            f"{row.place}: the label is a {type(row.label).__name__} ({row.label!r}), as of "
            f"data with several labels a row; "
            "Letterhead's classes exclude each other: keep one label a row"
        )
    value = label_value(row)
    if value in labels:
        return labels[value] if isinstance(labels, dict) else value
    number = label_number(value)
    if None not in (number, first_number) and 0 <= number - first_number < len(labels):
        return labels[number - first_number]
    known = ", ".join(labels)
    near = next((name for name in labels if same_spelling(name) == same_spelling(value)), None)
    if near is not None:
        known += f"; {near} differs from it in capitals or spaces alone"
    raise LetterheadError(
        f"{row.place}: label {value!r} is not in data.labels ({known}); add it, or map it to null"
    )


def label_value(row: RawRow) -> str:
    """A row's label as the source writes it, without the blanks around it."""
    return str(row.label).strip() if row.label is not None else ""


def label_number(value: str) -> int | None:
    """The whole number that a label is written as (7, -1, 2.0), else None."""
    return int(value.partition(".")[0]) if WHOLE_NUMBER.fullmatch(value) else None


def first_label_number(source: Source, data: Data) -> int | None:
    """The number that a source gives to the first name of `data.labels`: 0 or 1, by all its rows;
    None where it writes no numbers, or the experiment maps them.

    Raises
    ------
    LetterheadError : neither fits all numbers, or both do
    """
    if isinstance(data.labels, dict) or any(label_number(name) is not None for name in data.labels):
        return None
    places: dict[int, str] = {}
    for row in chain.from_iterable(source.splits.values()):
        value = "" if row.fault else label_value(row)
        if value in data.labels:
            return None  # names, and a number among them is a label that nobody listed
        number = label_number(value)
        if number is not None:
            places.setdefault(number, row.place)
    if not places:
        return None
    count, highest = len(data.labels), max(places)
    fits = [first for first in (0, 1) if first <= min(places) and highest < first + count]
    if source.numbers_from_zero and 0 in fits:
        return 0
    if len(fits) == 1:
        return fits[0]
    mend = (
        f"write a map: labels: "
        f"{{{', '.join(f'{i}: {name}' for i, name in enumerate(data.labels))}}}, "
        "with the numbers as the source means them (number: null leaves its rows out)"
    )
    if fits:
        numbers = ", ".join(map(str, sorted(places)))
        raise LetterheadError(
            f"data.labels: {count} names, and the source writes {numbers}, which may count "
            f"from 0 or from 1; {mend}"
        )
    raise LetterheadError(
        f"{places[highest]}: label {highest}, and labels from {min(places)} to "
        f"{highest} number the {count} names of "
        f"data.labels neither from 0 nor from 1; {mend}"
    )


def numbered_names(labels: list[str], first: int) -> str:
    """Which number stands for which name."""
    return ", ".join(f"{number} is {name}" for number, name in enumerate(labels, first))


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
    return chosen


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


def draw_decoder_rows(pool: Pool, chosen: np.ndarray, experiment: Experiment) -> np.ndarray:
    """Which rows of train the decoder is trained on: booleans, shape (rows,)."""
    label = pool.arrays()[0]
    train = np.flatnonzero(chosen == 0)
    n = min(experiment.decoder.train_rows or len(train), len(train))
    mask = np.zeros(len(chosen), bool)
    mask[stratified(train, label, n, np.random.default_rng([experiment.data.seed, 1]))] = True
    return mask


def write_rows(
    pool_path, chosen, decoder_rows, experiment: Experiment, encoder: PromptEncoder, card: dict
) -> None:
    """Copy the pool's lines to their splits, and the decoder's rows also in LLaMA-Factory's Alpaca
    form."""
    answers = dict(zip(experiment.labels, map(encoder.answer_text, encoder.options), strict=True))
    shortened = neutralised = 0
    with ExitStack() as stack:
        files = [
            stack.enter_context(atomic_open(experiment.data_folder / f"{split}.jsonl"))
            for split in SPLITS
        ]
        decoder = stack.enter_context(atomic_open(experiment.data_folder / "decoder_train.jsonl"))
        alpaca = jsonlines.Writer(
            stack.enter_context(atomic_open(experiment.data_folder / "sft_train.jsonl"))
        )
        pool = stack.enter_context(open(pool_path, encoding="utf-8", newline="\n"))
        for number, line in enumerate(
            progress(pool, total=len(chosen), desc="writing", unit=" rows")
        ):
            if chosen[number] == UNUSED:
                continue
            files[chosen[number]].write(line)
            if decoder_rows[number]:
                decoder.write(line)
                row = json.loads(line)
                clean, fitted = encoder.neutralise(row["text"]), encoder.fit(row["text"])
                neutralised += clean != row["text"]
                shortened += len(fitted) < len(clean)
                alpaca.write(
                    {
                        "instruction": encoder.fill(fitted),
                        "input": "",
                        "output": answers[row["label"]],
                    }
                )
    card["shared"] = {
        "rows": int(decoder_rows.sum()),
        "cut_to_cutoff_len": shortened,
        "control_strings_broken_up": neutralised,
    }


def token_lengths(experiment: Experiment, encoder: PromptEncoder) -> dict:
    """Percentiles of the texts' lengths in tokens, under the decoder's and the encoder's tokenizer,
    on sampled rows; and `prompt`, how many tokens frame a text."""
    from transformers import AutoTokenizer

    rng, sample = random.Random(experiment.seed), []
    with jsonlines.open(experiment.data_folder / "train.jsonl") as rows:
        for seen, row in enumerate(rows):  # reservoir sampling (Vitter's algorithm R)
            if seen < LENGTH_SAMPLE:
                sample.append(row["text"])
            elif (at := rng.randrange(seen + 1)) < LENGTH_SAMPLE:
                sample[at] = row["text"]
    bert = AutoTokenizer.from_pretrained(experiment.encoder.folder, trust_remote_code=False)
    result = {"rows_sampled": len(sample), "prompt": len(encoder.encode(""))}
    for name, tokenizer in (("decoder", encoder.tokenizer), ("encoder", bert)):
        lengths = [
            len(ids)
            for ids in tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]
        ]
        result[name] = {f"p{q}": int(np.percentile(lengths, q)) for q in (5, 50, 95, 99, 100)}
    return result


def dataset_info(experiment: Experiment) -> dict:
    """LLaMA-Factory's registry: the Alpaca file under the name that its YAML asks for, a teacher's
    thoughts beside it."""
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    files = dict.fromkeys(experiment.sft_arguments()["dataset"].split(","), "sft_train.jsonl")
    if experiment.distill:
        files["distilled"] = "distilled.jsonl"
    return {name: {"file_name": file, "columns": columns} for name, file in files.items()}


def summary(card: dict) -> list[str]:
    """The data card in a few lines for the terminal."""
    rows, shared = card["rows"], card["shared"]
    lines = [
        f"rows: {rows['read']} read; {rows['train']} train, {rows['validation']} "
        f"validation, {rows['test']} test;"
        f" {shared['rows']} of train for the decoder"
    ]
    lines += [f"dropped: {n} ({reason})" for reason, n in card["dropped"].items() if n]
    lines += [f"duplicates in {split}: {n}" for split, n in card["duplicates"].items() if n]
    lines += (
        [f"texts that stand with different labels: {card['conflicts']['texts']}"]
        if card["conflicts"]["texts"]
        else []
    )
    lines += [
        f"{split} texts that stand in train too: {n}"
        for split, n in card["shared_with_train"].items()
        if n
    ]
    lines += [
        f"{split} texts nearly in train: {len(pairs)}"
        for split, pairs in card["near_duplicates"].items()
        if pairs
    ]
    lines += (
        [f"texts cut to fit cutoff_len: {shared['cut_to_cutoff_len']}"]
        if shared["cut_to_cutoff_len"]
        else []
    )
    return lines


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
