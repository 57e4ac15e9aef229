"""The label and the text of a row as the experiment names them: names, numbers from 0 or from 1,
maps."""

import re
from collections import Counter
from itertools import chain

from letterhead.config.data import Data, same_spelling
from letterhead.files import LetterheadError
from letterhead.models.prompt import (
    keep_words,
)
from letterhead.rows.sources import RawRow, Source, checked_text
from letterhead.runs.terminal import say

WHOLE_NUMBER = re.compile(r"[+-]?\d{1,18}(\.0+)?")


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
