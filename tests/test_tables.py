"""Every form in which people have rows: separators, quotes, headers, workbooks, JSON, packed
text."""

import csv
import gzip
import io
import json
from pathlib import Path

import openpyxl
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from letterhead.config.data import Columns
from letterhead.files import LetterheadError
from letterhead.rows import tables
from letterhead.rows.sources import every_column, open_source, plain_file

ROWS = [
    ["a plain text", "x"],
    ["with a comma, and a; semicolon", "y"],
    ['he said "hi" twice', "x"],
    ["Zürich 新闻", "y"],
]


def delimited(separator: str, header: bool = True, rows: list = ROWS) -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows([["text", "label"], *rows][not header :])
    return text.getvalue().encode()


def workbook(path: str, sheets: dict[str, list]) -> None:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    book.save(path)


def read(path: str, content: bytes | None = None, **keys) -> list[list]:
    """The values of all rows of a file; a row that is broken is its fault."""
    if content is not None:
        Path(path).write_bytes(content)
    source = open_source(every_column(plain_file(path, **keys)))
    return [row.fault or row.text for row in source.splits["train"]]


ALPACA = [{"instruction": "Which?", "input": text, "output": label} for text, label in ROWS]
FORMS = {
    "rows.csv": delimited(","),
    "semicolons.csv": delimited(";"),
    "tabs.csv": delimited("\t"),
    "bars.csv": delimited("|"),
    "quoted.tsv": delimited("\t"),
    "packed.csv.gz": gzip.compress(delimited(",")),
    "nameless.txt": "".join(f"{text}\t{label}\n" for text, label in ROWS).encode(),
    "nameless.csv": delimited(",", header=False),
    "lines.jsonl": "".join(json.dumps(dict(zip("tl", row, strict=True))) + "\n" for row in ROWS),
    "array.json": json.dumps([dict(zip("tl", row, strict=True)) for row in ROWS]),
    "inside.json": json.dumps({"data": [dict(zip("tl", row, strict=True)) for row in ROWS]}),
    "lines.json": "".join(json.dumps(dict(zip("tl", row, strict=True))) + "\n" for row in ROWS),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows(workplace, name):
    content = FORMS[name]
    content = content.encode() if isinstance(content, str) else content
    assert read(name, content, header=False if name == "nameless.csv" else None) == ROWS


def test_workbooks_are_read_by_sheet_and_cells_are_text_as_in_a_csv(workplace):
    more = [[3, True], [0.5, "z"], [None, None], ["after a blank row", 7]]
    workbook("book.xlsx", {"first": [["text", "label"], *ROWS], "second": [["a", "b"], *more]})
    assert read("book.xlsx") == ROWS
    rows = read("book.xlsx", sheet="second")
    assert rows == [["3", "TRUE"], ["0.5", "z"], [], ["after a blank row", "7"]]
    with pytest.raises(LetterheadError, match=r"no sheet 'third'; it has first, second; .*sheet"):
        read("book.xlsx", sheet="third")
    with pytest.raises(LetterheadError, match=r"broken.xlsx: not a workbook that can be read"):
        read("broken.xlsx", b"PK but no more")


def test_a_stray_quote_costs_no_row_and_pandas_reads_the_same(workplace):
    lines = ['"an unclosed quote\tx', 'said "hi" so\ty', "plain\tx", 'ends with one"\ty']
    content = "\n".join(["text\tlabel", *lines]).encode()
    theirs = pandas.read_csv(io.BytesIO(content), sep="\t", quoting=csv.QUOTE_NONE)
    assert read("stray.tsv", content) == theirs.to_numpy().tolist()
    assert read("stray.csv", content.replace(b"\t", b",")) == theirs.to_numpy().tolist()


def test_doubled_quotes_of_a_tab_separated_file_are_single_ones(workplace):
    rows = [*ROWS, ["two\nlines, quoted", "x"]]
    whole = pandas.read_csv(io.BytesIO(delimited("\t", rows=rows)), sep="\t").to_numpy().tolist()
    assert read("doubled.tsv", delimited("\t", rows=rows[:-1])) == whole[:-1]


def test_two_stray_quotes_do_not_swallow_the_rows_between(workplace):
    content = b'text\tlabel\n"one\tx\nbetween\ty\nlast"\tx\n'
    assert read("two.tsv", content) == [['"one', "x"], ["between", "y"], ['last"', "x"]]


def test_a_stray_quote_among_proper_ones_unquotes_no_other_row(workplace):
    lines = ['"good, one",x', '"bad,y', '"said ""hi""",x']
    with pytest.raises(LetterheadError, match=r"mixed.csv, row 2 \(line 3\): a broken quote"):
        read("mixed.csv", "\n".join(["text,label", *lines]).encode())
    whole = b'text,label\n"good one",x\n"bad,y\n"good two",x\n'  # every line of two fields
    with pytest.raises(LetterheadError, match=r"whole.csv, row 2 \(line 3\): a broken quote"):
        read("whole.csv", whole)
    # Tabs need no quotes: the rows stay, and what a program doubled is single again.
    rows = read("mixed.tsv", "\n".join(["text,label", *lines]).replace(",", "\t").encode())
    assert rows[1:] == [['"bad', "y"], ['said "hi"', "x"]]


def test_a_broken_row_between_two_stray_quotes_does_not_join_them(workplace):
    content = b'text\tlabel\n"one\tx\nbetween\ttab\ty\nlast"\tx\nplain\ty\n'
    rows = read("two.tsv", content)
    assert len(rows) == 4 and "3 fields" in rows[1] and rows[2] == ['last"', "x"]


def test_one_broken_row_does_not_decide_about_the_quotes_of_all(workplace):
    content = b'text\tlabel\n"said ""hi"""\tx\n"plain"\ty\ntoo\tmany\ty\n'
    rows = read("odd.tsv", content)
    assert rows[:2] == [['said "hi"', "x"], ["plain", "y"]] and "3 fields" in rows[2]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cells.csv", b'text;label\n"two\nlines";x\nb;y\n'),
        ("commas.csv", b"text, long;label\ntwo\nb, c;x\nd;y\n".replace(b"two\n", b"")),
        ("bare.csv", b"hello, you;x\nb, c, d;y\ne;x\n"),
    ],
)
def test_the_separator_is_that_which_makes_whole_rows(workplace, name, content):
    rows = read(name, content, header=False if name == "bare.csv" else None)
    assert all(isinstance(row, list) and len(row) == 2 for row in rows)
    assert [row[1] for row in rows][-2:] == (["y", "x"] if name == "bare.csv" else ["x", "y"])


def test_json_rows_are_objects_and_their_strings_may_hold_any_line_break(workplace):
    lines = '{"text": "a\u2028b", "label": "x"}\n{"text": \n{"text": "c", "label": "y"}\n'
    found = read("lines.json", lines.encode())
    assert found[0] == ["a\u2028b", "x"] and "not JSON" in found[1] and found[2] == ["c", "y"]
    assert read("one.json", b'{"text": "a", "tags": ["p", "q"]}') == [["a", ["p", "q"]]]


def test_a_broken_row_is_told_with_advice_for_its_kind_of_file(workplace):
    found = read("a.csv", b"text,label\na, b,x\nc,y\nd,x,,\n")
    assert found[0] == (
        "3 fields, but the header has 2; put quotes around a text that contains the separator"
    )
    assert found[1:] == [["c", "y"], ["d", "x"]]  # empty fields at the end are nobody's
    content = b"text,label,date,note\na,x\nb\nc,y,1\nd,x,1,n,o\n"  # rows may end early
    found = read("a.csv", content)
    assert found[:2] == [["a", "x", None, None], ["b", None, None, None]]
    data = plain_file("a.csv").model_copy(update={"columns": Columns(text="text", label="label")})
    rows = list(open_source(data).splits["train"])
    assert [row.label for row in rows] == ["x", None, "y", None]
    for row, n in ((rows[1], 1), (rows[3], 5)):
        assert row.fault.startswith(f"{n} fields, but the header has 4")
    found = read("a.tsv", b"text\tlabel\na\tb\tx\nc\ty\n")
    assert found[0].endswith("a text must not contain the separator: write a space for it")
    with pytest.raises(LetterheadError, match=r"b.csv, row 1 \(line 2\): a broken quote"):
        read("b.csv", b'text,label\n"not closed,x\nb,and more,y\n')


def test_fasttexts_lines_have_labels_and_texts(workplace):
    lines = "__label__good so good\n__label__bad __label__sad no\n\nnone here\n"
    found = read("a.txt", lines.encode())
    assert found == [["good", "so good"], [["bad", "sad"], "no"], ["", "none here"]]


PACKED = gzip.compress(delimited(",", rows=ROWS * 9))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("half.csv.gz", gzip.compress(delimited(","))[:-9], "not a whole gzip file"),
        ("no.csv.gz", b"text,label", "not a whole gzip file"),
        ("bent.csv.gz", PACKED[:40] + b"\xff\xff\xff" + PACKED[43:], "not a whole gzip file"),
        ("half.json", b'[{"text": "a"}', "half.json: not JSON"),
        ("empty.json", b"[]", "no row is a JSON object with keys"),
        ("a.pdf", b"", r"a .pdf file; known: .csv, .tsv, .tab, .txt, .jsonl, .json, .parquet"),
        ("a.parquet.gz", b"", r"a .gz file; known"),
    ],
)
def test_files_that_are_not_whole_or_not_known_are_named(workplace, name, content, told):
    with pytest.raises(LetterheadError, match=told):
        read(name, content)


def test_parquet_keeps_zeros_and_types(workplace):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", ""], "n": [0, 0]}), "a.parquet")
    assert read("a.parquet") == [["a", 0], ["", 0]]


def test_a_kind_is_that_of_what_is_packed():
    kinds = [tables.kind(Path(name)) for name in ("a.CSV", "b.tsv.gz", "c.xlsx.gz", "d", "e.gz")]
    assert kinds == [".csv", ".tsv", "", "", ""]
