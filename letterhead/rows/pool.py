"""The rows of a source, checked, on disk, and what is kept of each in memory: its label, its split
and a hash of its text (about 20 bytes a row)."""

import hashlib
import json
import re
from array import array
from collections import Counter
from contextlib import suppress
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np

from letterhead.config.data import Data
from letterhead.config.experiment import Experiment
from letterhead.files import atomic_open
from letterhead.rows.labels import label_and_text
from letterhead.rows.sources import RawRow
from letterhead.runs.terminal import progress

SPLITS = ("train", "validation", "test")
# Of a row that stands in no split
UNUSED = -1


class Pool:
    """What is kept in memory of the rows read: arrays, one entry a row.

    `group` has hashes of `data.group`, and `time` numbers in the order of `data.time`; each is
    empty where the experiment names no such column. `has_dates` says that a time is no number.
    """

    def __init__(self):
        self.label, self.source_split, self.text_hash = array("h"), array("b"), array("Q")
        self.group, self.time, self.has_dates = array("Q"), array("d"), False

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
    """Read every row of the source, checked, to a file of lines as they will stand in the splits,
    with the hash of their group where `data.group` names one; `first_number` is
    `first_label_number`'s.

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
                row.fault = row.fault or unordered(row, data)
                if (found := label_and_text(row, data, dropped, first_number)) is None:
                    continue
                label, text = found
                shortened += len(text) < len(row.text.strip())
                pool.label.append(index[label])
                pool.source_split.append(SPLITS.index(split))
                pool.text_hash.append(hashed(text))
                line = {"id": row.id, "label": label, "text": text}
                if data.group:
                    pool.group.append(hashed(str(row.group).strip()))
                    line["group"] = f"{pool.group[-1]:016x}"
                if data.time:
                    pool.time.append(moment(row.time))
                    pool.has_dates |= not is_number(row.time)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    rows = {"read": sum(read.values()), "read_by_split": dict(read)}
    numbering = {"labels_numbered_from": first_number}
    return pool, {"rows": rows, "dropped": dropped, "cut_to_max_words": shortened, **numbering}


def hashed(text: str) -> int:
    """64 bits of a text's hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def moment(value: Any) -> float:
    """A date or a number as a number; later ones are greater.

    Raises
    ------
    ValueError : neither

    Examples
    --------
    >>> moment("2026-01-31") < moment("2026/02/01 12:00") < moment(datetime(2026, 3, 1))
    True
    >>> moment(" 3.5"), moment(7), moment("2026-1-5 3:04") == moment("2026-01-05 03:04")
    (3.5, 7.0, True)
    """
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, str):
        if is_number(value):
            return float(value)
        padded = re.sub(r"\b(\d)\b", r"0\1", value.strip().replace("/", "-"))
        value = datetime.fromisoformat(padded)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if value is None or isinstance(value, bool):
        raise ValueError("no date")
    return float(value)


def is_number(value: Any) -> bool:
    """Whether a time is written as a number."""
    if isinstance(value, str):
        with suppress(ValueError):
            float(value)
            return True
        return False
    return isinstance(value, int | float)


def unordered(row: RawRow, data: Data) -> str:
    """What is wrong with a row's group or time, with the mend; empty where nothing is."""
    if data.group and not str("" if row.group is None else row.group).strip():
        return f"column {data.group!r} is empty; fill it in, or unset data.group"
    if data.time:
        try:
            found = moment(row.time)
        except (ValueError, TypeError):
            found = float("nan")
        if found != found:
            return (
                f"{row.time!r} in column {data.time!r} is no date and no number; write 2026-01-31"
            )
    return ""
