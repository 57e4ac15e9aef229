"""The rows of a source, checked, on disk, and what is kept of each in memory: its label, its split
and a hash of its text (about 20 bytes a row)."""

import hashlib
import json
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.files import atomic_open
from letterhead.rows.labels import label_and_text
from letterhead.runs.terminal import progress

SPLITS = ("train", "validation", "test")
# Of a row that stands in no split
UNUSED = -1


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
