"""The tables that files hold: delimited text, spreadsheets, Parquet and JSON.

    .csv .tsv .tab   a row a line, below a line of names (data.header: false: no such line)
    .txt             TEXT<TAB>LABEL without names, or FastText's `__label__LABEL TEXT`
    .jsonl .json     an object a line, or an array of objects
    .parquet         read a batch at a time
    .xlsx .xls .ods  a sheet of a workbook (data.sheet)

Text may be packed (.csv.gz). What separates the columns, and whether quotes are quotes, is found by
the file.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, dropwhile, islice
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from letterhead.config.data import Data
from letterhead.files import LetterheadError

DELIMITED = (".csv", ".tsv", ".tab", ".txt")
OBJECTS = (".jsonl", ".json")
PARQUET = ".parquet"
SHEETS = (".xlsx", ".xls", ".xlsb", ".ods")
KINDS = (*DELIMITED, *OBJECTS, PARQUET, *SHEETS)
PACKED = ".gz"
SEPARATORS = ",;\t|"
FASTTEXT = "__label__"
QUOTED = re.compile(r'"(?:[^"]|"")*"')  # a field as a CSV file encloses it
LOOKED_AT = 100  # lines, for what separates their columns
BATCH = 1024
# A field longer than csv's 128 KiB is legitimate; one of 16 MiB is a quote that was never closed.
csv.field_size_limit(1 << 24)

# Number of a row from 1, file and row for messages, and its values in the order of the columns
Line = tuple[int, str, list[Any]]


def kind(path: Path) -> str:
    """The ending that says what a file holds, that of packing left out; empty for one that is not
    read.

    Examples
    --------
    >>> kind(Path("Reviews.CSV.gz")), kind(Path("a.parquet.gz")), kind(Path("a.pdf"))
    ('.csv', '', '')
    """
    name = path.name.lower()
    found = Path(name.removesuffix(PACKED)).suffix
    known = (*DELIMITED, *OBJECTS) if name.endswith(PACKED) else KINDS
    return found if found in known else ""


@contextmanager
def _told_of_packing(path: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise LetterheadError(f"{path}: not a whole gzip file ({error}); pack it again") from None


@contextmanager
def opened(path: Path, encoding: str, newline: str | None = "") -> Iterator[IO[str]]:
    """A file of text, unpacked where it is packed.

    Raises
    ------
    LetterheadError : a packed file that is not whole
    """
    unpack = gzip.open if path.suffix.lower() == PACKED else open
    with _told_of_packing(path), unpack(path, "rt", encoding=encoding, newline=newline) as file:
        yield file


def first_bytes(path: Path, size: int = -1) -> bytes:
    """The first bytes of a file, unpacked where it is packed; all of them where `size` is -1.

    Raises
    ------
    LetterheadError : a packed file that is not whole
    """
    unpack = gzip.open if path.suffix.lower() == PACKED else open
    with _told_of_packing(path), unpack(path, "rb") as file:
        return file.read(size)


def encoding_of(path: Path, encodings: Sequence[str]) -> str:
    """The first of data.encoding in which the whole file decodes.

    Raises
    ------
    LetterheadError : none of them, or the file is not whole
    """
    for encoding in encodings:
        # "utf-8-sig" reads plain UTF-8 too, and drops the mark that Excel puts first.
        name = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
        try:
            with opened(path, name, "\n") as file:
                while file.read(1 << 20):
                    pass
            return name
        except UnicodeError:  # of a character, or, in UTF-16, of a missing mark
            reason = f"{path}, {_first_undecodable(first_bytes(path), encoding)}"
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


def column_names(path: Path, data: Data) -> list[str]:
    """The columns of a file (of JSON the keys of all rows).

    Raises
    ------
    LetterheadError : a file that can't be read
    """
    if kind(path) == PARQUET:
        return _parquet(path).schema_arrow.names
    if kind(path) in SHEETS:
        return _sheet(path, data)[0]
    if kind(path) in DELIMITED:
        return _form(path, data).names
    found: dict[str, None] = {}
    for _, _, row, _ in objects(path, data):
        found |= dict.fromkeys(row or ())
    if not found:
        raise LetterheadError(f"{path}: no row is a JSON object with keys; write one a line")
    return list(found)


def lines(path: Path, data: Data, names: list[str] | None = None) -> Iterator[Line]:
    """The rows of a table whose columns have places.

    Parameters
    ----------
    names : the columns whose values are read, in this order; None for all of them, and then blank
        lines are rows, too

    Raises
    ------
    LetterheadError : a row that can't be read; names file and row
    """
    if kind(path) == PARQUET:
        yield from _parquet_lines(path, names or column_names(path, data))
        return
    rows = _sheet(path, data)[1] if kind(path) in SHEETS else _delimited_lines(path, data)
    number = 0
    for at, values in islice(rows, data.skip_lines, None):
        # A blank line, also as spreadsheets write it, by separators alone; who reads all columns
        # keeps their places.
        if any(values) or (names is None and values):
            number += 1
            where = "" if kind(path) in SHEETS else f" (line {at})"
            row = at if kind(path) in SHEETS else number
            yield number, f"{path}, row {row}{where}", values


@dataclass(frozen=True)
class Form:
    """How a delimited file is written.

    names : of its columns; "1", "2" and so on where the file has none
    separator : of its columns; FASTTEXT where a line begins with its labels
    is_quoted : whether a field in quotes is what stands between them
    has_header : whether the first line holds the names
    """

    encoding: str
    names: list[str]
    separator: str
    is_quoted: bool
    has_header: bool

    def reader(self, file: IO[str]):
        """What reads the lines of the file."""
        quoting = csv.QUOTE_MINIMAL if self.is_quoted else csv.QUOTE_NONE
        return csv.reader(file, delimiter=self.separator, quoting=quoting, strict=True)


def _form(path: Path, data: Data) -> Form:
    """How a delimited file is written.

    Raises
    ------
    LetterheadError : its first line can't be read
    """
    state = path.stat()
    return _form_of(path, tuple(data.encoding), data.header, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _form_of(path: Path, encodings: tuple[str, ...], header: bool | None, *_) -> Form:
    encoding = encoding_of(path, encodings)
    with opened(path, encoding) as file:
        first_lines = [line for line in islice(file, LOOKED_AT) if line.strip()]
    is_text = kind(path) == ".txt"
    has_header = header if header is not None else not is_text
    if is_text and first_lines and first_lines[0].startswith(FASTTEXT):
        return Form(encoding, ["label", "text"], FASTTEXT, False, False)
    usual = "," if kind(path) == ".csv" else "\t"
    separator = usual if is_text else _separator(first_lines, usual)
    is_quoted = _is_quoted(path, encoding, separator)
    found = Form(encoding, [], separator, is_quoted, has_header)
    with opened(path, encoding) as file:
        try:
            names = next(found.reader(file), [])
        except csv.Error as error:
            raise LetterheadError(
                f"{path}, header: a broken quote or field ({error}); mend the first line"
            ) from None
    if not has_header:
        names = [str(number) for number in range(1, len(names) + 1)]
    return Form(encoding, names, separator, is_quoted, has_header)


def _separator(first_lines: list[str], usual: str) -> str:
    """What separates the columns: that by which most of the first rows have as many fields as the
    first of them; the usual one before others."""

    def fit(mark: str) -> tuple[float, int]:
        shares = []
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
            try:
                rows = list(csv.reader(first_lines, delimiter=mark, quoting=quoting))
            except csv.Error:
                continue
            widths = [len(trimmed(row, len(rows[0]))) for row in rows if row]
            if widths and widths[0] > 1:
                shares.append((widths.count(widths[0]) / len(widths), widths[0]))
        return max(shares, default=(0.0, 0))

    return max([usual, *SEPARATORS], key=fit)


@dataclass(frozen=True)
class _Reading:
    """How a delimited file reads with its quotes, or without.

    broken : rows with another number of fields than the first
    swallowed : whether a field holds separator and line break, as behind a quote that nobody closed
    enclosed : whether a field stands in quotes, or a name in the header holds one
    """

    broken: int
    swallowed: bool
    enclosed: bool


def _is_quoted(path: Path, encoding: str, separator: str) -> bool:
    """Whether quotes enclose fields, by the whole file.

    In a CSV file they do, unless a quote is broken, no field looks enclosed, and every row is whole
    without them. In a tab-separated file they do where that breaks no more rows, and swallows none.
    """
    with opened(path, encoding) as file:
        if not any('"' in line for line in file):
            return separator != "\t"
    quoted, plain = (_read_as(path, encoding, separator, is_quoted) for is_quoted in (True, False))
    if separator != "\t":
        return quoted is not None or plain is None or plain.enclosed or plain.broken > 0
    if quoted is None or plain is None:
        return False
    return quoted.broken <= plain.broken and not quoted.swallowed


def _read_as(path: Path, encoding: str, separator: str, is_quoted: bool) -> _Reading | None:
    """A reading of the whole file; None where a quote or a field is broken."""
    broken, swallowed, enclosed = 0, False, False
    with opened(path, encoding) as file:
        reader = Form(encoding, [], separator, is_quoted, True).reader(file)
        try:
            width = len(header := next(reader, []))
            enclosed = any('"' in name for name in header)
            for values in chain([header], reader):
                broken += bool(values) and len(trimmed(values, width)) != width
                swallowed |= any("\n" in value and separator in value for value in values)
                enclosed |= any(QUOTED.fullmatch(value) for value in values)
        except csv.Error:
            return None
    return _Reading(broken, swallowed, enclosed)


def undoubled(value: str) -> str:
    """A field of a file whose quotes enclose nothing; one in quotes with doubled ones in it was
    written by a program all the same.

    Examples
    --------
    >>> undoubled('"said ""hi"" twice"'), undoubled('"hi"'), undoubled('"hi" he said')
    ('said "hi" twice', '"hi"', '"hi" he said')
    """
    if '""' in value[1:-1] and QUOTED.fullmatch(value):
        return value[1:-1].replace('""', '"')
    return value


def trimmed(values: list[Any], width: int) -> list[Any]:
    """A row without the empty fields behind its last column."""
    while len(values) > width and values[-1] == "":
        values = values[:-1]
    return values


def _delimited_lines(path: Path, data: Data) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each row below the header."""
    form = _form(path, data)
    with opened(path, form.encoding) as file:
        if form.separator == FASTTEXT:
            for at, line in enumerate(file, 1):
                yield at, fasttext_fields(line)
            return
        reader = form.reader(file)
        if form.has_header:
            next(reader, None)
        number, width = 0, len(form.names)
        while True:
            at = reader.line_num + 1
            try:
                values = next(reader, None)
            except csv.Error as error:
                raise LetterheadError(
                    f"{path}, row {number + 1} (line {at}): a broken quote or field ({error}); "
                    + (
                        'close the quote, and write a quote inside a field as ""'
                        if form.is_quoted
                        else "a text has no line break, and no null byte"
                    )
                ) from None
            if values is None:
                return
            number += any(values)
            if not form.is_quoted:
                values = list(map(undoubled, values))
            yield at, trimmed(values, width)


def fasttext_fields(line: str) -> list[Any]:
    """Label and text of a line of FastText's; several labels are a list.

    Examples
    --------
    >>> fasttext_fields("__label__good so good"), fasttext_fields("no label")
    (['good', 'so good'], ['', 'no label'])
    >>> fasttext_fields("__label__good")
    ['good', '']
    """
    found = re.match(rf"((?:{FASTTEXT}\S+(?:\s+|$))*)(.*)", line.strip(), re.DOTALL)
    labels = [label.removeprefix(FASTTEXT) for label in found[1].split()]
    if not line.strip():
        return []
    return [labels if len(labels) > 1 else "".join(labels), found[2]]


def advice(path: Path, data: Data) -> str:
    """What mends a row with another number of fields than there are columns."""
    if kind(path) in DELIMITED and not _form(path, data).is_quoted:
        return "a text must not contain the separator: write a space for it"
    return "put quotes around a text that contains the separator"


def sheet_names(path: Path) -> list[str]:
    """The sheets of a workbook.

    Raises
    ------
    LetterheadError : not a whole workbook, or one with a password
    """
    return _workbook(path).sheet_names


def _workbook(path: Path):
    import python_calamine

    try:
        return python_calamine.CalamineWorkbook.from_path(path)
    except (python_calamine.CalamineError, OSError) as error:
        raise LetterheadError(
            f"{path}: not a workbook that can be read ({error}); save it again, without a password"
        ) from None


def _sheet(path: Path, data: Data) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The columns of a sheet, and row number and fields of each row, as text.

    Raises
    ------
    LetterheadError : no such workbook, or no such sheet
    """
    workbook = _workbook(path)
    name = data.sheet or workbook.sheet_names[0]
    if name not in workbook.sheet_names:
        raise LetterheadError(
            f"{path}: has no sheet {name!r}; it has {', '.join(workbook.sheet_names)}; name one in "
            f"data.sheet"
        )
    rows = workbook.get_sheet_by_name(name).to_python(skip_empty_area=False)
    numbered = ((number, [as_text(value) for value in row]) for number, row in enumerate(rows, 1))
    numbered = dropwhile(lambda line: not any(line[1]), numbered)
    _, first = next(numbered, (1, []))
    if data.header is False:
        names = [str(number) for number in range(1, len(first) + 1)]
        return names, chain([(1, first)] if first else [], numbered)
    while first and not first[-1]:
        first.pop()
    return first, ((number, trimmed(values, len(first))) for number, values in numbered)


def as_text(value: Any) -> str:
    """A cell as a CSV file would hold it: a whole number without its decimal point.

    Examples
    --------
    >>> as_text(3.0), as_text(0.5), as_text(True), as_text("a ")
    ('3', '0.5', 'TRUE', 'a ')
    """
    if isinstance(value, bool):
        return str(value).upper()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


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


def _parquet_lines(path: Path, names: list[str]) -> Iterator[Line]:
    batches, number = _parquet(path).iter_batches(batch_size=BATCH, columns=names), 0
    while True:
        with _told_of_parquet(path):
            columns = batch.to_pydict() if (batch := next(batches, None)) else None
        if columns is None:
            return
        for values in zip(*(columns[name] for name in names), strict=True):
            number += 1
            yield number, f"{path}, row {number}", list(values)


def objects(path: Path, data: Data) -> Iterator[tuple[int, str, dict[str, Any] | None, str]]:
    """Number, place, keys and values, and the fault of each row of a JSON file: an array of objects
    (alone, or as the only list of an object), or an object a line.

    Raises
    ------
    LetterheadError : an array that is not whole
    """
    encoding = encoding_of(path, data.encoding)
    if kind(path) == ".json" and (found := _array(path, encoding)) is not None:
        for number, row in enumerate(found, 1):
            fault = "" if isinstance(row, dict) else "not a JSON object; one object a row"
            yield number, f"{path}, row {number}", None if fault else row, fault
        return
    with opened(path, encoding, None) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place, row, fault = f"{path}, row {number}", None, ""
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                fault = f"not JSON ({error}); one object a line"
            yield number, place, row if isinstance(row, dict) else None, fault


def _array(path: Path, encoding: str) -> list[Any] | None:
    """The rows of a JSON file that is one value; None where it has an object a line."""
    with opened(path, encoding, None) as file:
        whole = file.read()
    first, _, rest = whole.lstrip().partition("\n")
    with suppress(ValueError, RecursionError):
        if rest.strip() and isinstance(json.loads(first), dict):
            return None
    try:
        found = json.loads(whole)
    except (ValueError, RecursionError) as error:
        raise LetterheadError(f"{path}: not JSON ({error}); write an array of objects") from None
    if isinstance(found, dict):
        inner = [rows for rows in found.values() if isinstance(rows, list) and rows]
        inner = [rows for rows in inner if all(isinstance(row, dict) for row in rows)]
        return inner[0] if len(inner) == 1 else [found]
    return found if isinstance(found, list) else [found]


def has_names(path: Path, data: Data) -> bool:
    """Whether the columns of a file have names of its own."""
    if kind(path) in DELIMITED:
        return _form(path, data).has_header or _form(path, data).separator == FASTTEXT
    return kind(path) not in SHEETS or data.header is not False
