"""make data: every source, every split, and every way in which input is wrong."""

import csv
import json
import os
import random
import re
import subprocess
import sys
import zipfile
from collections import Counter
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from scipy.sparse import csr_matrix

from letterhead.config.data import Data
from letterhead.files import LetterheadError, read_json, read_jsonl, sha256_file, write_jsonl
from letterhead.rows import duplicates, fetch, labels, pool, splits
from letterhead.rows.sources import open_source
from prep import data
from tests.fakes import Hub, running

LABELS = ["World", "Sports"]
ROOT = Path(__file__).parent.parent


def rows(n: int, start: int = 0) -> list[tuple[str, str]]:
    return [
        (f'text {i}, with a comma, a "quote" and\na line', LABELS[i % 2])
        for i in range(start, start + n)
    ]


def write_csv(path, content, header=("text", "label"), **options) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, **options).writerows([header, *content])


def texts(experiment, split) -> list[str]:
    return [row["text"] for row in read_jsonl(experiment.data_folder / f"{split}.jsonl")]


def test_every_file_form_gives_the_same_rows(workplace):
    content = [(text.replace("\n", " ").replace('"', ""), label) for text, label in rows(20)]
    write_csv("a.csv", content)
    Path("b.tsv").write_text("text\tlabel\n" + "".join(f"{t}\t{label}\n" for t, label in content))
    Path("c.tab").write_text(
        "text\tlabel\nd\tstring\nclass\t\n" + "".join(f"{t}\t{label}\n" for t, label in content)
    )
    Path("d.jsonl").write_text(
        "".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in content)
    )
    table = pyarrow.table(
        {"text": [t for t, _ in content], "label": [label for _, label in content]}
    )
    pyarrow.parquet.write_table(table, "e.parquet")
    Path("f.csv").write_bytes(b"\xef\xbb\xbf" + Path("a.csv").read_bytes())  # as Excel saves UTF-8
    for name in ("a.csv", "b.tsv", "c.tab", "d.jsonl", "e.parquet", "f.csv"):
        source = open_source(Data(source=name, labels=LABELS, skip_lines=2 * (name == "c.tab")))
        assert [(row.text, row.label) for row in source.splits["train"]] == content, name
        assert source.sha256 == {name: sha256_file(name)}
    for number, (text, label) in enumerate(content):
        Path("folder", label).mkdir(parents=True, exist_ok=True)
        Path("folder", label, f"{number:02}.txt").write_text(text)
    found = open_source(Data(source="folder", labels=LABELS)).splits["train"]
    assert sorted((row.text, row.label) for row in found) == sorted(content)


def test_a_text_from_several_columns_is_joined_or_fills_a_template(make_experiment):
    content = [
        (f"Title {i}", "" if i == 7 else f"body {{title}} {i}", LABELS[i % 2]) for i in range(20)
    ]
    write_csv("a.csv", content, header=("title", "body", "label"))
    Path("b.jsonl").write_text(
        "".join(
            json.dumps(dict(zip(("title", "body", "label"), of, strict=True))) + "\n"
            for of in content
        )
    )
    table = pyarrow.table(
        {
            name: list(of)
            for name, of in zip(("title", "body", "label"), zip(*content, strict=True), strict=True)
        }
    )
    pyarrow.parquet.write_table(table, "c.parquet")
    joined = {"columns": {"text": ["title", "body"], "empty_parts": True}}
    template = {"columns": {"text": "{title} - {body} ({title})", "empty_parts": True}}
    for source in ("a.csv", "b.jsonl", "c.parquet"):
        data.main(experiment := make_experiment(source, LABELS, data=joined))
        found = {text for split in pool.SPLITS for text in texts(experiment, split)}
        assert (
            len(found) == 20 and {"Title 7", "Title 8\nbody {title} 8"} <= found
        )  # what is in a text is not filled in
        data.main(experiment := make_experiment(source, LABELS, data=template))
        found = {text for split in pool.SPLITS for text in texts(experiment, split)}
        assert {"Title 7 -  (Title 7)", "Title 8 - body {title} 8 (Title 8)"} <= found
        with pytest.raises(
            LetterheadError,
            match=r"row 8.*: column 'body' is empty; fill it in, .*empty_parts: true",
        ):
            data.main(
                make_experiment(source, LABELS, data={"columns": {"text": ["title", "body"]}})
            )
        with pytest.raises(LetterheadError, match="no column 'lead'; it has title, body, label"):
            data.main(
                make_experiment(source, LABELS, data={"columns": {"text": ["title", "lead"]}})
            )


def test_bad_rows_end_the_run_or_are_left_out_and_counted(make_experiment):
    write_csv("a.csv", [*rows(20), ("", "World"), ("a text", "Nowhere"), ("one", "two", "three")])
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows(20)]
    Path("b.jsonl").write_text(
        "\n".join([*lines, '{"text": "no label"}', '{"text": 5, "label": "World"}', "{broken"])
        + "\n"
    )
    for source in ("a.csv", "b.jsonl"):
        with pytest.raises(LetterheadError, match=rf"{source}, row 21.*data.bad_rows: drop"):
            data.main(make_experiment(source, LABELS))
        data.main(experiment := make_experiment(source, LABELS, data={"bad_rows": "drop"}))
        card = read_json(experiment.data_folder / "data_card.json")
        assert (
            card["dropped"]["bad row"] == 3
            and sum(card["rows"][split] for split in pool.SPLITS) == 20
        )


def test_labels_are_names_numbers_or_a_map(make_experiment):
    write_csv("n.csv", [(f"text {i}", i % 2) for i in range(20)])
    experiment = make_experiment("n.csv", LABELS)
    data.main(experiment)
    assert {row["label"] for row in read_jsonl(experiment.data_folder / "train.jsonl")} == set(
        LABELS
    )
    write_csv("m.csv", [(f"text {i}", "abc"[i % 3]) for i in range(30)])
    experiment = make_experiment("m.csv", {"a": "First", "b": None, "c": "Last"})
    data.main(experiment)
    card = read_json(experiment.data_folder / "data_card.json")
    assert card["labels"] == ["First", "Last"] and card["dropped"]["label mapped to null"] == 10


def test_splits_are_stratified_disjoint_and_the_same_again(make_experiment):
    write_csv(
        "a.csv", [(f"text {i}", LABELS[i % 4 == 0]) for i in range(400)] + [("text 7", "World")]
    )
    experiment = make_experiment(
        "a.csv", LABELS, data={"rows": {"train": 200, "validation": 40, "test": 80}}
    )
    data.main(experiment)
    first = {split: texts(experiment, split) for split in pool.SPLITS}
    assert {split: len(found) for split, found in first.items()} == {
        "train": 200,
        "validation": 40,
        "test": 80,
    }
    assert len({text for found in first.values() for text in found}) == 320
    card = read_json(experiment.data_folder / "data_card.json")
    assert card["label_counts"]["test"] == {"World": 60, "Sports": 20}
    assert card["duplicates"] == {"train": 1} and card["dropped"]["duplicate text"] == 1
    (experiment.run_folder / "data/stage.json").unlink()
    data.main(experiment)
    assert {split: texts(experiment, split) for split in pool.SPLITS} == first


def test_a_standard_split_is_kept_and_what_it_shares_is_counted_and_dropped_by_a_key(
    make_experiment,
):
    write_csv("d/train.csv", rows(40))
    write_csv("d/dev.csv", rows(6, 100))
    write_csv("d/test.csv", rows(10, 35) + rows(1, 35))
    keys = {"rows": {"test": None, "validation": 6}}
    experiment = make_experiment("d/{split}.csv", LABELS, data=keys)
    data.main(experiment)
    card = read_json(experiment.data_folder / "data_card.json")
    assert (
        card["shared_with_train"] == {"validation": 0, "test": 6}
        and card["duplicates"]["test"] == 1
    )
    assert (card["rows"]["train"], card["rows"]["validation"], card["rows"]["test"]) == (40, 6, 11)
    data.main(
        experiment := make_experiment("d/{split}.csv", LABELS, data=keys | {"shared": "drop"})
    )
    assert not set(texts(experiment, "train")) & set(texts(experiment, "test"))
    assert read_json(experiment.data_folder / "data_card.json")["rows"]["train"] == 35


NEAR = (
    "Shares of the maker of small engines fell by a tenth on Tuesday after it had "
    "warned of lower profits this year"
)


def test_texts_that_are_nearly_in_train_are_named_and_can_be_taken_out(make_experiment):
    """One word changed, or one Han character; the same words in another order are another text."""
    han = "中国队在周二的比赛中以二比一战胜了日本队晋级决赛"
    train = [
        ("0", NEAR),
        ("1", han),
        ("0", " ".join(sorted(NEAR.split()))),
        *(("1", f"Row {i} of some kind") for i in range(20)),
    ]
    test = [("0", NEAR.replace("this year", "this month")), ("1", han.replace("周二", "周三"))]
    for name, rows_of in (
        ("train", train),
        ("test", test),
        ("validation", [("0", "Another text of no length at all")]),
    ):
        write_csv(f"d/{name}.csv", [(text, LABELS[int(label)]) for label, text in rows_of])
    keys = {"rows": {"validation": 1, "test": 2}}
    data.main(make_experiment("d/{split}.csv", LABELS, data=keys))
    card = read_json("data/mine/data_card.json")
    assert card["near_duplicates"]["validation"] == [] and card["rows"]["train"] == 23
    assert sorted(card["near_duplicates"]["test"]) == [["test:1", "train:1"], ["test:2", "train:2"]]
    data.main(
        experiment := make_experiment(
            "d/{split}.csv", LABELS, data=keys | {"near_duplicates": "drop"}
        )
    )
    card = read_json("data/mine/data_card.json")
    assert (
        card["rows"]["train"] == 21
        and card["dropped"]["text nearly one of test or validation"] == 2
    )
    assert NEAR not in texts(experiment, "train") and len(card["near_duplicates"]["test"]) == 2


def test_no_near_duplicate_is_missed_and_a_line_that_all_share_costs_nothing(workplace):
    """Against all pairs by Python's sets."""
    chance, signature = (
        np.random.default_rng(0),
        "Sent from my telephone please excuse the brevity of this message",
    )
    words = [f"w{i}" for i in range(60)]
    rows = []
    for i in range(240):
        text = list(chance.choice(words, size=int(chance.integers(1, 40))))
        if i >= 60 and i % 3:  # another row with some words changed
            text = list(rows[int(chance.integers(60))])
            for at in chance.integers(len(text), size=int(chance.integers(3))):
                text[at] = "changed"
        rows.append(text)
    for end in ("", f" {signature}"):
        texts_of = [" ".join(row) + end for row in rows]
        write_jsonl("pool.jsonl", ({"id": str(i), "text": of} for i, of in enumerate(texts_of)))
        chosen = np.array([0 if i < 120 else 1 + i % 2 for i in range(240)])
        runs = [
            {tuple(of[k : k + 3]) for k in range(len(of) - 2)}
            for of in (text.split() for text in texts_of)
        ]

        def alike(a: int, b: int, runs=runs) -> float:
            return len(runs[a] & runs[b]) / max(1, len(runs[a] | runs[b]))

        expected = {
            b: {a for a in range(120) if alike(a, b) >= duplicates.ALIKE} for b in range(120, 240)
        }
        found = {
            row: (pair, set(train.tolist()))
            for row, pair, train in duplicates.near_duplicates(Path("pool.jsonl"), chosen)
        }
        assert {row: train for row, (_, train) in found.items()} == {
            b: of for b, of in expected.items() if of
        }
        assert len(found) > 20
        for row, (pair, _) in found.items():
            assert pair[0] == str(row) and alike(int(pair[1]), row) == max(
                alike(a, row) for a in range(120)
            )
    runs = csr_matrix(np.ones((3, 8), np.float32))
    kept = duplicates.rarest_runs(runs, np.array([9, 9, 9, 9, 9, 1, 9, 2]))
    assert kept.toarray()[0].tolist() == [
        1,
        0,
        0,
        0,
        0,
        1,
        0,
        1,
    ]  # 3 of 8: two that share 6 of 8 share one of these


def grouped(n: int = 240) -> list[tuple]:
    """Rows of 40 customers, whose texts tell the customer; dates go on with the rows."""
    start = date(2026, 1, 1)
    return [
        (f"text {i} of customer {i % 40}", "ab"[i % 2], i % 40, start + timedelta(days=i))
        for i in range(n)
    ]


COLUMNS = ["text", "label", "customer", "day"]
SPLITS = ("train", "validation", "test")


def customers(experiment, split: str) -> set[int]:
    return {int(text.rsplit(" ", 1)[1]) for text in texts(experiment, split)}


def test_no_group_stands_in_two_splits(make_experiment, capsys):
    write_csv("rows.csv", grouped(), COLUMNS)
    keys = {"group": "customer", "rows": {"validation": 24, "test": 48}}
    experiment = make_experiment("rows.csv", ["a", "b"], data=keys)
    data.main(experiment)
    found = [customers(experiment, split) for split in SPLITS]
    assert list(map(len, found)) == [28, 4, 8] and len(set().union(*found)) == 40
    assert "groups by customer: 28 in train, 4 in validation, 8 in test" in capsys.readouterr().out
    # A published test split stays, and train loses the customers that it has.
    write_csv("r/train.csv", grouped(), COLUMNS)
    of_test = [(f"new of {i % 5}", "ab"[i % 2], i % 5, "2026-12-01") for i in range(20)]
    write_csv("r/test.csv", of_test, COLUMNS)
    keys["rows"]["test"] = None
    experiment = make_experiment("r/{split}.csv", ["a", "b"], data=keys)
    data.main(experiment)
    assert not customers(experiment, "train") & set(range(5))
    dropped = read_json("data/mine/data_card.json")["dropped"]
    assert dropped["group stands in validation or test"] == 30
    write_csv("r/validation.csv", [("held of 3", "a", 3, ""), ("held of 9", "b", 9, "")], COLUMNS)
    keys["rows"]["validation"] = 1
    experiment = make_experiment("r/{split}.csv", ["a", "b"], data=keys)
    data.main(experiment)  # test's customers leave validation, too
    assert customers(experiment, "validation") == {9}
    assert not customers(experiment, "train") & {0, 1, 2, 3, 4, 9}
    keys["rows"] = {"validation": 3, "test": 48}
    with pytest.raises(LetterheadError, match=r"data.group: every group has more than the 3 rows"):
        data.main(make_experiment("rows.csv", ["a", "b"], data=keys))


@pytest.mark.parametrize("group", [None, "customer"])
def test_the_latest_rows_are_for_test(make_experiment, capsys, group):
    shuffled = grouped()
    random.Random(0).shuffle(shuffled)
    write_csv("rows.csv", shuffled, COLUMNS)
    keys = {"time": "day", "group": group, "rows": {"validation": 24, "test": 48}}
    experiment = make_experiment("rows.csv", ["a", "b"], data=keys)
    data.main(experiment)
    if group is None:
        found = {of: sorted(int(t.split()[1]) for t in texts(experiment, of)) for of in SPLITS}
        assert found["test"] == list(range(192, 240))
        assert found["validation"] == list(range(168, 192))
        assert "split by day: train 2026-01-01 to 2026-06-17, " in capsys.readouterr().out
    else:  # the customers who came last, with all their rows
        assert customers(experiment, "test") == set(range(32, 40))
        assert customers(experiment, "train") == set(range(28))


def test_a_time_or_a_group_that_is_none_is_told(make_experiment):
    odd = [("odd", "a", "", "2026-01-01"), ("odder", "b", 3, "soon")]
    write_csv("rows.csv", [*grouped(20), *odd], COLUMNS)
    for keys, told in (
        ({"group": "customer"}, r"row 21 .*: column 'customer' is empty; fill it in"),
        ({"time": "day"}, r"row 22 .*: 'soon' in column 'day' is no date and no number"),
        ({"time": "when"}, r"no column 'when'"),
    ):
        with pytest.raises(LetterheadError, match=told):
            data.main(make_experiment("rows.csv", ["a", "b"], data=keys | {"rows": {"test": 4}}))


def test_subsets_are_nested_and_the_split_keeps_its_seed(make_experiment):
    write_csv("a.csv", rows(200))
    made = {}
    for n, seed in ((20, 1), (40, 2), (80, 3), (None, 4)):
        keys = {"rows": {"train": n, "validation": 20, "test": 30}, "seed": 5}
        data.main(experiment := make_experiment("a.csv", LABELS, data=keys, seed=seed))
        made[n] = {split: texts(experiment, split) for split in ("train", "validation", "test")}
    assert all(
        made[n][split] == made[None][split] for n in made for split in ("validation", "test")
    )
    assert (
        set(made[20]["train"])
        < set(made[40]["train"])
        < set(made[80]["train"])
        < set(made[None]["train"])
    )
    keys = {"rows": {"train": 20, "train_seed": 1, "validation": 20, "test": 30}, "seed": 5}
    data.main(experiment := make_experiment("a.csv", LABELS, data=keys))
    assert len(texts(experiment, "train")) == 20 and texts(experiment, "train") != made[20]["train"]
    assert all(texts(experiment, split) == made[None][split] for split in ("validation", "test"))
    with pytest.raises(LetterheadError, match="seeds: one stands twice"):
        make_experiment("a.csv", LABELS, seeds=[1, 2, 1])


def test_alpaca_rows_are_the_articles(make_experiment):
    write_csv("a.csv", rows(20))
    experiment = make_experiment(
        "a.csv", LABELS, decoder_keys={"train_rows": 8}, sft={"dataset": "agnews_train"}
    )
    data.main(experiment)
    found = list(read_jsonl(experiment.data_folder / "sft_train.jsonl"))
    assert len(found) == 8 and {row["output"] for row in found} == {
        "<think>\n\n</think>\n\nA",
        "<think>\n\n</think>\n\nB",
    }
    assert all(
        row["instruction"].endswith("A. World\nB. Sports\n\nAnswer:/no_think") for row in found
    )
    registry = read_json(experiment.data_folder / "dataset_info.json")
    assert list(registry) == ["agnews_train", "sft_validation"]
    validation = list(read_jsonl(experiment.data_folder / "sft_validation.jsonl"))
    assert len(validation) == 2 and set(validation[0]) == set(found[0])


def test_what_is_up_to_date_is_not_done_again_and_a_changed_key_is(make_experiment, capsys):
    write_csv("a.csv", rows(20))
    data.main(make_experiment("a.csv", LABELS))
    data.main(make_experiment("a.csv", LABELS, bench={"scoring_rows": 7}))
    assert "up to date" in capsys.readouterr().out
    data.main(make_experiment("a.csv", LABELS, data={"max_words": 2}))
    assert "up to date" not in capsys.readouterr().out
    Path("data/mine/test.jsonl").unlink()
    data.main(make_experiment("a.csv", LABELS, data={"max_words": 2}))
    assert Path("data/mine/test.jsonl").exists()


def test_stratified_gives_the_asked_number_for_any_mix():
    rng = np.random.default_rng(0)
    for _ in range(50):
        label = rng.choice(6, p=[0.52, 0.3, 0.1, 0.05, 0.02, 0.01], size=int(rng.integers(20, 500)))
        n = int(rng.integers(1, len(label) + 1))
        drawn = splits.stratified(np.arange(len(label)), label, n, rng)
        assert len(set(drawn)) == n
        share = np.bincount(label, minlength=6) * n / len(label)
        assert (np.abs(np.bincount(label[drawn], minlength=6) - share) < 1).all()


BROKEN = {
    "missing column": (
        b"txt,label\na,World\n",
        r"a\.csv: no column 'text'; it has txt, label; set data\.columns",
    ),
    "unknown label": (
        b"text,label\na,World\nb,Sprots\n",
        r"a\.csv, row 2 \(line 3\): label 'Sprots' is not in data.labels",
    ),
    "empty text": (
        b"text,label\na,World\n  ,Sports\n",
        r"a\.csv, row 2 \(line 3\): the text is empty",
    ),
    "not UTF-8": (
        b"text,label\na,World\ncaf\xe9,Sports\n",
        r"a\.csv, line 3: not utf-8 .*save the file as UTF-8, or name",
    ),
    "broken quote": (
        b'text,label\na,World\n"b,Sports\nc, d,World\n',
        r"a\.csv, row 2 \(line 3\): a broken quote",
    ),
    "quote in a field": (
        b'text,label\na,World\n"b" c, d,Sports\n',
        r"a\.csv, row 2 \(line 3\): a broken quote",
    ),
    "too many fields": (
        b"text,label\na,World\nb, and c,Sports\n",
        r"a\.csv, row 2 \(line 3\): 3 fields, but the header has 2",
    ),
    "empty file": (b"", r"a\.csv: no column 'text'; it has none"),
    "header alone": (b"text,label\n", r"a\.csv: holds no rows to train on"),
    "too few rows": (
        b"text,label\na,World\nb,Sports\n",
        r"data\.rows\.test asks for 4 rows, but there are 2",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_bad_rows_are_named_and_nothing_is_half_written(make_experiment, tmp_path, fault):
    content, message = BROKEN[fault]
    Path("a.csv").write_bytes(content)
    experiment = make_experiment("a.csv", LABELS)
    with pytest.raises(LetterheadError, match=message):
        data.main(experiment)
    assert not list(Path("data").glob("*/*"))
    if fault == "unknown label":  # and what a user sees
        finished = run_data(tmp_path)
        assert finished.returncode == 1 and "Traceback" not in finished.stderr
        assert re.search(f"error: {message}", finished.stderr.splitlines()[-1]), finished.stderr


def test_bad_files_of_other_forms_are_named(workplace):
    Path("a.jsonl").write_text('{"text": "a", "label": "World"}\n{"text": "a", "label"\n')
    Path("b.jsonl").write_text('{"text": "a"}\n')
    Path("c.parquet").write_bytes(b"PAR1 cut off")
    Path("d.docx").write_bytes(b"")
    cases = {
        "a.jsonl": "row 2: not JSON",
        "b.jsonl": "row 1: no column 'label'",
        "c.parquet": "not a whole Parquet file",
    }
    for name, message in (
        cases | {"d.docx": "a .docx file; known", "none.csv": "no such file or folder"}
    ).items():
        section = Data(source=name, labels=LABELS)
        with pytest.raises(LetterheadError, match=message):  # noqa: PT012
            for row in open_source(section).splits["train"]:
                labels.label_and_text(row, section, Counter())


def test_a_package_with_another_hash_is_refused_with_the_hash_it_has(workplace):
    wheel = Path("wheels/thing-1.0-py3-none-any.whl")
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as package:
        package.writestr("thing/a.csv", "text,label\n")
        package.writestr(
            "thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n"
        )
        package.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        package.writestr("thing-1.0.dist-info/RECORD", "")
    os.environ["PIP_FIND_LINKS"], before = (
        str(wheel.parent.absolute()),
        os.environ.get("PIP_FIND_LINKS"),
    )
    os.environ["PIP_NO_INDEX"] = "1"
    try:
        for wrong in ("#sha256=" + "0f" * 32, ""):
            with pytest.raises(
                LetterheadError,
                match=f"has sha256 {sha256_file(wheel)}, not .*if you trust that file",
            ):
                fetch.fetch_package(f"pypi:thing==1.0/thing/a.csv{wrong}", {})
        assert not list(Path(".cache").rglob("*.whl"))
        source = f"pypi:thing==1.0/thing/{{name}}.csv#sha256={sha256_file(wheel)}"
        folder = source.format(name="a").replace("/a.csv", "")
        for damaged in ("packages/thing==1.0/*.whl", "unpacked/*/thing/a.csv"):
            assert (
                fetch.fetch_package(source.format(name="a"), {})["train"].read_text()
                == "text,label\n"
            )
            assert (
                fetch.fetch_package(folder, {})["train"] / "a.csv"
            ).read_text() == "text,label\n"
            (path,) = Path(".cache").glob(damaged)
            os.truncate(path, 5)
        kept = fetch.fetch_package(folder, {})["train"] / "a.csv"
        assert kept.read_text() == "text,label\n"
        inode = kept.stat().st_ino
        assert (
            fetch.fetch_package(folder, {})["train"] / "a.csv"
        ).stat().st_ino == inode  # others may be reading it
        with pytest.raises(
            LetterheadError, match="thing-1.0-py3-none-any.whl holds no thing/b.csv"
        ):
            fetch.fetch_package(source.format(name="b"), {})
        with pytest.raises(LetterheadError, match="pip could not fetch other==1.0"):
            fetch.fetch_package("pypi:other==1.0/a.csv#sha256=00", {})
    finally:
        del os.environ["PIP_NO_INDEX"]
        os.environ.pop("PIP_FIND_LINKS") if before is None else os.environ.update(
            PIP_FIND_LINKS=before
        )
    with pytest.raises(LetterheadError, match="write it as pypi:PACKAGE==VERSION"):
        fetch.fetch_package("pypi:thing/a.csv", {})


def test_odd_texts_and_labels_are_named(make_experiment):
    rows = [{"text": f"text {i}", "label": "2"} for i in range(9)]
    cases = {
        json.dumps({"text": 7, "label": "1"}): "row 10: the text is of type int",
        json.dumps(
            {"text": "half \ud83d", "label": "1"}
        ): "row 10: character 6 of the text is half a pair",
        json.dumps(
            {"text": "a", "label": "0"}
        ): "row 10: label '0' is not in data.labels",  # names here, not numbers
    }
    for line, message in cases.items():
        Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + line + "\n")
        with pytest.raises(LetterheadError, match=message):
            data.main(make_experiment("a.jsonl", ["1", "2"]))


def test_odd_numbers_marks_and_nesting_are_told_not_traced(make_experiment):
    write_csv("rows.csv", [("one", "0"), ("two", "9" * 5000)])
    with pytest.raises(LetterheadError, match="row 2.*is not in data.labels"):
        data.main(make_experiment("rows.csv", LABELS))
    with pytest.raises(LetterheadError, match="rows.csv,.*not utf-16"):
        data.main(make_experiment("rows.csv", LABELS, data={"encoding": ["utf-16"]}))
    Path("deep.jsonl").write_text("[" * 200_000 + "\n")
    with pytest.raises(LetterheadError, match="row 1: not JSON"):
        data.main(make_experiment("deep.jsonl", LABELS))


def test_the_easiest_or_hardest_rows_of_each_label_are_taken_by_a_ranking(make_experiment):
    write_csv("a.csv", rows(100))
    keys = {"train": 20, "validation": 10, "test": 20}
    data.main(drawn := make_experiment("a.csv", LABELS, data={"rows": keys}))
    held = [texts(drawn, split) for split in ("validation", "test")]
    margin = {f"train:{i + 1}": (i * 37) % 101 for i in range(100)}
    Path("margins.jsonl").write_text(
        "".join(json.dumps({"id": i, "margin": by}) + "\n" for i, by in margin.items())
    )
    all_of = make_experiment("a.csv", LABELS, data={"rows": keys | {"train": None}})
    data.main(all_of)
    pool = {label: [] for label in LABELS}
    for row in read_jsonl(all_of.data_folder / "train.jsonl"):
        pool[row["label"]].append(row["id"])
    for which, sign in (("easy", -1), ("hard", 1)):
        found = make_experiment(
            "a.csv", LABELS, data={"rows": keys | {"train_from": which, "ranking": "margins.jsonl"}}
        )
        data.main(found)
        taken = {row["id"] for row in read_jsonl(found.data_folder / "train.jsonl")}
        assert taken == {
            i for of in pool.values() for i in sorted(of, key=lambda i: sign * margin[i])[:10]
        }
        assert [texts(found, split) for split in ("validation", "test")] == held
    with pytest.raises(
        LetterheadError, match=r"data.rows.ranking: none.jsonl, and no such file; run: make rank"
    ):
        data.main(
            make_experiment(
                "a.csv",
                LABELS,
                data={"rows": keys | {"train_from": "easy", "ranking": "none.jsonl"}},
            )
        )


def test_a_folder_may_hold_a_file_a_label_with_a_text_a_line(workplace):
    Path("reviews").mkdir()
    Path("reviews/pos.txt").write_text("好\n\n很好 \n", encoding="utf-8")
    Path("reviews/neg.txt").write_text("坏", encoding="utf-8")
    Path("reviews/notes.md").write_text("not a label")
    source = open_source(Data(source="reviews", labels=["pos", "neg"]))
    found = [(row.id, row.place, row.text, row.label) for row in source.splits["train"]]
    assert found == [
        ("train:neg.txt:1", "reviews/neg.txt, row 1", "坏", "neg"),
        ("train:pos.txt:1", "reviews/pos.txt, row 1", "好", "pos"),
        ("train:pos.txt:3", "reviews/pos.txt, row 3", "很好 ", "pos"),
    ]
    assert set(source.sha256) == {"reviews/pos.txt", "reviews/neg.txt"}


def test_a_model_without_safetensors_is_refused(workplace, monkeypatch):
    Path("packed").mkdir()
    Path("packed/pytorch_model.bin").write_bytes(b"a pickle")
    monkeypatch.setattr(fetch, "fetch_package", lambda source, splits: {"train": Path("packed")})
    with pytest.raises(LetterheadError, match="holds no safetensors file"):
        fetch.fetch_model("pypi:thing==1.0/packed", Path("model/thing"))
    assert not Path("model/thing").exists()


@pytest.fixture
def hub(tmp_path):
    for split, n in (("train", 30), ("test", 10)):
        table = pyarrow.table(
            {"text": [f"{split} {i}" for i in range(n)], "label": [i % 2 for i in range(n)]}
        )
        pyarrow.parquet.write_table(table, tmp_path / "part.parquet")
        Hub.files[f"data/{split}-00000-of-00001.parquet"] = (tmp_path / "part.parquet").read_bytes()
    with running(Hub) as address:
        yield address


def run_data(home: Path, **environment) -> subprocess.CompletedProcess:
    """`make data` in a process of its own: the hub's address is read when its library is
    imported."""
    base = {
        "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin",
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-m", "prep.data", "--experiment", "mine"]
    return subprocess.run(
        command, capture_output=True, text=True, env=base | environment, timeout=120
    )


@pytest.mark.parametrize("revision", ["", f"@{Hub.COMMIT}"])
def test_a_hub_data_set_comes_over_http_and_then_from_the_cache(
    make_experiment, hub, tmp_path, revision
):
    make_experiment(f"hf:me/news{revision}", LABELS, data={"rows": {"validation": 4}})
    finished = run_data(tmp_path, HF_ENDPOINT=hub)
    assert finished.returncode == 0, finished.stderr
    assert "40 read; 26 train, 4 validation, 10 test" in finished.stdout
    card = read_json("data/mine/data_card.json")
    assert card["sources"] == {f"hf:me/news{revision}": Hub.COMMIT}
    first = Path("data/mine/train.jsonl").read_bytes()
    Path("data/mine/train.jsonl").unlink()
    again = run_data(tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and Path("data/mine/train.jsonl").read_bytes() == first, (
        again.stderr
    )


def test_a_hub_that_dies_in_the_middle_of_a_file_leaves_nothing_half(
    make_experiment, hub, tmp_path, monkeypatch
):
    make_experiment("hf:me/news", LABELS, data={"rows": {"validation": 4}})
    monkeypatch.setattr(Hub, "dies", True)
    finished = run_data(tmp_path, HF_ENDPOINT=hub)
    assert finished.returncode == 1 and "Traceback" not in finished.stderr, finished.stderr
    assert "hf:me/news: cannot be loaded" in finished.stderr and not list(Path("data").glob("*/*"))
    monkeypatch.setattr(Hub, "dies", False)
    again = run_data(tmp_path, HF_ENDPOINT=hub)
    assert again.returncode == 0 and "40 read; 26 train, 4 validation, 10 test" in again.stdout, (
        again.stderr
    )


def test_no_hub_is_said_in_seconds(make_experiment, tmp_path):
    make_experiment("hf:me/news", LABELS)
    finished = run_data(tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    assert (
        "no hub answers at http://127.0.0.1:9" in finished.stderr
        and "HF_ENDPOINT" in finished.stderr
    )
    assert not list(Path("data").glob("*/*"))


def test_a_missing_hub_data_set_is_said(make_experiment, hub, tmp_path):
    make_experiment("hf:me/nothing", LABELS)
    finished = run_data(tmp_path, HF_ENDPOINT=hub)
    assert finished.returncode == 1 and "hf:me/nothing: cannot be loaded" in finished.stderr
