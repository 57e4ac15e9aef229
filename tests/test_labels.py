"""The label of a row is the one that its file gave, whatever the form, the numbering and the
split."""

import csv
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import pipeline as pipeline_of

from eval import compare, decide
from letterhead import pipeline
from letterhead.config.data import Data
from letterhead.files import LetterheadError, read_json
from letterhead.models import classifier
from letterhead.models.classifier import load_classifier
from letterhead.rows.labels import first_label_number, label_name
from letterhead.rows.sources import RawRow, Source, open_source, require_order
from letterhead.runs import results
from prep import data
from report import build
from serve import export, page, predict
from tests.test_data import write_csv
from tests.test_new import place, words, written  # noqa: F401
from train import fitted, heads

NAMES = ["World", "Sports", "Business", "Sci/Tech"]
# A word that stands in the texts of one class alone
WORDS = ["planet", "football", "money", "physics"]
# The methods whose training takes a moment, and the stages of their report
KEPT_METHODS = {"tfidf", "bert"}
KEPT_STAGES = {"data", "tfidf", "bert", "compare", "decide", "report"}


def read_labels(experiment) -> dict[str, str]:
    """The text of every row of all splits → its label."""
    rows = [
        row
        for split in ("train", "validation", "test")
        for row in results.read_rows(experiment, split)
    ]
    return {row["text"]: row["label"] for row in rows}


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("bad_rows", ["stop", "drop"])
def test_numbers_count_from_0_or_from_1_as_the_whole_file_says(
    make_experiment, capsys, first, bad_rows
):
    write_csv("rows.csv", [(f"text {i}", first + i % 4) for i in range(60)])
    experiment = make_experiment("rows.csv", NAMES, data={"bad_rows": bad_rows})
    data.main(experiment)
    assert read_labels(experiment) == {f"text {i}": NAMES[i % 4] for i in range(60)}
    assert f"labels: numbers from {first}: {first} is World" in capsys.readouterr().out
    assert read_json("data/mine/data_card.json")["labels_numbered_from"] == first


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            [0, 1, 2, 3, 4],
            r"rows.csv, row 5 \(line 6\): label 4, .*neither from 0 nor from 1; write a "
            r"map: labels: {0: World",
        ),
        ([1, 2, 3, 4, 99], "label 99, and labels from 1 to 99 number the 4 names"),
        ([-1, 0, 1], "labels from -1 to 1 number the 4 names"),
        (["1.0", "2.0", "3.0", "7.0"], "label 7, and labels from 1 to 7"),
        ([1, 2, 3, 4, 100001], "label 100001"),
        ([1, 2, 3], "the source writes 1, 2, 3, which may count from 0 or from 1; write a map"),
    ],
)
@pytest.mark.parametrize("bad_rows", ["stop", "drop"])
def test_numbers_that_fit_neither_way_or_both_are_refused(
    make_experiment, numbers, message, bad_rows
):
    write_csv("rows.csv", [(f"text {i}", number) for i, number in enumerate(numbers * 12)])
    experiment = make_experiment("rows.csv", NAMES, data={"bad_rows": bad_rows})
    with pytest.raises(LetterheadError, match=message):
        data.main(experiment)


def test_a_hubs_class_label_counts_from_0_whatever_is_missing():
    of = Data(source="hf:a/b", labels=NAMES)
    rows = [
        RawRow("train:1", "a row", "a text", 1),
        RawRow("train:2", "a row", "a text", 2),
    ]
    assert first_label_number(Source({"train": iter(rows)}, {}, numbers_from_zero=True), of) == 0


def test_a_number_in_a_file_of_names_is_a_label_that_nobody_listed(make_experiment):
    write_csv("rows.csv", [*((f"text {i}", NAMES[1 + i % 3]) for i in range(60)), ("odd", "0")])
    with pytest.raises(LetterheadError, match="label '0' is not in data.labels"):
        data.main(make_experiment("rows.csv", NAMES))


def test_a_hubs_names_in_another_order_are_refused():
    hub = ["World", "Sports", "Business", "sci/tech"]
    require_order(Data(source="hf:a/b", labels=NAMES), hub)
    require_order(Data(source="hf:a/b", labels=["Globe", "Games", "Money", "Science"]), hub)
    with pytest.raises(LetterheadError, match="Business is number 2 in hf:a/b, and 0 in the list"):
        require_order(Data(source="hf:a/b", labels=["Business", "World", "Sports"]), hub)


def test_a_label_in_other_capitals_is_told(make_experiment):
    write_csv("rows.csv", [(f"text {i}", NAMES[i % 4].lower()) for i in range(60)])
    with pytest.raises(LetterheadError, match="World differs from it in capitals or spaces alone"):
        data.main(make_experiment("rows.csv", NAMES))


def write_form(form: str, rows: list[tuple[str, object]]) -> str:
    """Rows as a file, or a folder, of a form; returns its path."""
    path = f"rows.{form}"
    if form == "csv":
        write_csv(path, rows)
    elif form == "tsv":
        Path(path).write_text(
            "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)
        )
    elif form == "jsonl":
        Path(path).write_text(
            "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
        )
    elif form == "parquet":
        columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


CASES = (
    st.sampled_from(["csv", "tsv", "jsonl", "parquet"]),
    st.sampled_from(["names", "from 0", "from 1", "map of names", "map of numbers"]),
    st.permutations(NAMES),
    st.integers(2, 4),
    st.integers(0, 2**16),
    st.booleans(),
)


def make_labelled(make_experiment, form, numbering, order, seed, published, **keys):
    """Rows in a file of a form, their labels written in a manner; returns the experiment, with its
    rows made, and the truth: text → name.

    Each text holds a word that stands in the texts of its class alone, so that a method answers
    with what it was taught.
    """
    classes = len(order)
    truth = {
        f"item {i} {WORDS[i % classes]} and {WORDS[i % classes]}": i % classes for i in range(80)
    }
    start = 1 if "1" in numbering else 0
    in_file = {name: name.lower() if numbering == "map of names" else name for name in order}
    labels: list | dict = order
    if numbering.startswith("map"):
        in_file = (
            in_file if "names" in numbering else {name: 7 * i + 3 for i, name in enumerate(order)}
        )
        labels = {in_file[name]: name for name in reversed(order)}
    elif numbering != "names":
        in_file = {name: i + start for i, name in enumerate(order)}
    rows = [(text, in_file[order[number]]) for text, number in truth.items()]
    if published:
        for split, part in (("train", rows[:50]), ("test", rows[50:])):
            Path(write_form(form, part)).rename(f"{split}.{form}")
        source = f"{{split}}.{form}"
    else:
        source = write_form(form, rows)
    sizes = {"seed": seed, "rows": {"validation": 8, "test": 20}}
    experiment = make_experiment(source, labels, data=sizes, **keys)
    data.main(experiment)
    return experiment, {text: order[number] for text, number in truth.items()}


def predict_all(experiment, truth: dict[str, str], method: str) -> dict[str, str]:
    """Text → what `make predict` answers; the answer is the one with the highest probability."""
    write_csv("in.csv", [(text, "") for text in truth])
    predict.main(experiment, "in.csv", "out.csv", method)
    answers = list(csv.DictReader(open("out.csv")))
    for row in answers:
        assert row["prediction"] == max(
            experiment.labels, key=lambda name: float(row[f"p({name})"])
        )
    return {row["text"]: row["prediction"] for row in answers}


@settings(max_examples=12)
@given(*CASES)
def test_training_predict_and_page_have_the_label_that_the_file_gave(
    make_experiment, form, numbering, order, classes, seed, published
):
    order = order[:classes]
    experiment, truth = make_labelled(make_experiment, form, numbering, order, seed, published)
    assert read_labels(experiment).items() <= truth.items()
    fitted.main(experiment, "tfidf")
    assert results.read_result(experiment, "tfidf", "test").accuracy == 1.0
    assert predict_all(experiment, truth, "tfidf") == truth
    classify = {"tfidf": load_classifier(experiment, "tfidf")}
    for text in list(truth)[:classes]:
        [answered] = page.answer(experiment, classify, text)
        assert max(answered.shares, key=answered.shares.get) == truth[text]
    card = read_json("data/mine/data_card.json")
    counted = {
        name: sum(label == name for label in read_labels(experiment).values()) for name in order
    }
    assert counted == {
        name: sum(card["label_counts"][split][name] for split in card["label_counts"])
        for name in order
    }


# Each example trains an encoder, so a failing one is not shrunk.
@settings(max_examples=4, phases=[Phase.explicit, Phase.generate])
@given(*CASES)
def test_export_service_and_the_reports_counts_have_the_label_that_the_file_gave(
    make_experiment, tiny_models, form, numbering, order, classes, seed, published
):
    order = order[:classes]
    head = {
        "per_device_train_batch_size": 8,
        "eval_steps": 0.5,
        "num_train_epochs": 20,
        "learning_rate": 5e-3,
    }
    encoder = {"model": str(tiny_models["bert"]), "head": head}
    for folder in ("runs", "data"):
        shutil.rmtree(folder, ignore_errors=True)
    experiment, truth = make_labelled(
        make_experiment, form, numbering, order, seed, published, encoder_keys=encoder
    )
    with pytest.MonkeyPatch.context() as patch:
        for table, kept in ((pipeline.METHODS, KEPT_METHODS), (pipeline.STAGES, KEPT_STAGES)):
            for name in set(table) - kept:
                patch.delitem(table, name)
        fitted.main(experiment, "tfidf")
        heads.main(experiment, "bert")
        for stage in (compare, decide, build):
            stage.main(experiment)
        assert predict_all(experiment, truth, "bert") == truth
        folder, _ = export.export(experiment, classifier.named_method(experiment, "bert"))
    answers = pipeline_of("text-classification", model=str(folder))(list(truth))
    assert dict(zip(truth, (one["label"] for one in answers), strict=True)) == truth
    in_splits = {
        split: Counter(truth[row["text"]] for row in results.read_rows(experiment, split))
        for split in ("train", "validation", "test")
    }
    report = Path("runs/mine/report/report.html").read_text()
    for split, counts in in_splits.items():
        cells = [split, *(counts[name] for name in experiment.labels), sum(counts.values())]
        assert f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" in report
    comparison = read_json("runs/mine/results/comparison.json")
    for entry in comparison["methods"].values():
        assert entry["accuracy"] == 1.0
        right = [in_splits["test"][name] for name in experiment.labels]
        assert np.array_equal(entry["confusion"], np.diag(right))


def conflicted(n: int = 60) -> list[tuple[str, str]]:
    rows = [(f"text {i}", NAMES[i % 4]) for i in range(n)]
    return [
        *rows,
        ("twice", "World"),
        ("twice", "Sports"),
        ("thrice", "World"),
        ("thrice", "Sports"),
        ("thrice", "Sports"),
    ]


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("drop", []),
        ("majority", [("thrice", "Sports")]),
        ("keep", [("thrice", "World"), ("twice", "World")]),
    ],
)
def test_texts_with_different_labels_are_listed_and_settled(make_experiment, capsys, policy, kept):
    write_csv("rows.csv", conflicted())
    experiment = make_experiment("rows.csv", NAMES, data={"conflicts": policy})
    data.main(experiment)
    assert (
        sorted(item for item in read_labels(experiment).items() if item[0] in ("twice", "thrice"))
        == kept
    )
    conflicts = read_json("data/mine/data_card.json")["conflicts"]
    assert (conflicts["texts"], conflicts["rows"]) == (2, 5)
    assert conflicts["listed"][0] == {
        "text": "twice",
        "labels": {"World": ["train:61"], "Sports": ["train:62"]},
    }
    said = capsys.readouterr().out
    assert (
        "2 texts stand with different labels, for example “twice” is World (train:61) "
        "and Sports (train:62)" in said
    )


def test_conflicts_may_stop_the_run_and_published_test_rows_stay(make_experiment):
    write_csv("rows.csv", conflicted())
    with pytest.raises(
        LetterheadError, match="rows.csv: 2 texts stand with different labels.*data.conflicts: drop"
    ):
        data.main(make_experiment("rows.csv", NAMES, data={"conflicts": "stop"}))
    write_csv("train.csv", [(f"text {i}", NAMES[i % 4]) for i in range(60)])
    write_csv(
        "test.csv",
        [
            ("text 0", "Sports"),
            ("same", "World"),
            ("same", "Sports"),
            *[(f"t {i}", "World") for i in range(9)],
        ],
    )
    experiment = make_experiment(
        "{split}.csv", NAMES, data={"conflicts": "stop", "rows": {"validation": 4}}
    )
    data.main(experiment)
    card = read_json("data/mine/data_card.json")
    assert (
        card["rows"]["test"] == 12
        and card["conflicts"]["texts"] == 2
        and not card["dropped"]["text with different labels"]
    )


def test_names_that_differ_in_capitals_alone_are_refused_with_the_map_that_merges_them():
    with pytest.raises(
        ValueError,
        match=re.escape("write a map with one name for both (Sports: Sports, sports: Sports)"),
    ):
        Data(source="a.csv", labels=["World", "Sports", "sports"])
    Data(source="a.csv", labels={"Sports": "Sports", "sports": "Sports", "World": "World"})


def test_a_label_of_several_is_told(workplace):
    Path("rows.jsonl").write_text('{"text": "a text", "label": ["World", "Sports"]}\n')
    of = Data(source="rows.jsonl", labels=NAMES)
    [row] = open_source(of).splits["train"]
    with pytest.raises(
        LetterheadError, match="row 1: the label is a list .*classes exclude each other"
    ):
        label_name(row, of.labels)


def test_new_merges_spellings_tells_numbers_and_conflicts(written, capsys):  # noqa: F811
    rows = [
        (f"{i} {words(i, 9)}", ["Sports", "sports", " World "][i % 3] if i % 9 else "Sports")
        for i in range(300)
    ]
    write_csv("case.csv", [*rows, *((words(1, 9), label) for label in ("Sports", "World"))])
    experiment = written("case.csv")
    assert experiment.data.labels == {"Sports": "Sports", "World": "World", "sports": "Sports"}
    assert experiment.data.conflicts == "drop"
    said = capsys.readouterr().out
    assert "differ in capitals or spaces alone are one class: 'sports' as 'Sports'" in said
    assert (
        "1 texts stand with different labels, for example “word7" in said
        and "as Sports and World" in said
    )
    write_csv("numbers.csv", [(f"{i} {words(i, 9)}", 1 + i % 2) for i in range(100)])
    assert written("numbers.csv").labels == ["1", "2"]
    assert (
        "the labels are numbers: names would tell the LLM what they mean" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "several", ["a|b", "['a', 'b']", '["a", "b"]', "[2, 3]", "[27]", "('a', 'b')"]
)
def test_new_says_that_labels_look_like_several(written, capsys, several):  # noqa: F811
    write_csv("multi.csv", [(f"{i} {words(i, 9)}", ["a", "b", several][i % 3]) for i in range(120)])
    if several == "a|b":
        written("multi.csv")
        assert (
            "labels such as 'a|b' look like several at once (multi-label)"
            in capsys.readouterr().out
        )
        return
    with pytest.raises(
        LetterheadError, match=r"row 3 \(line 4\): the label .* is a list \(multi-label\)"
    ):
        written("multi.csv")


def test_new_says_that_lists_of_labels_are_several(written):  # noqa: F811
    rows = [
        {"text": f"{i} {words(i, 9)}", "label": ["a"] if i % 2 else ["b", "a"]} for i in range(120)
    ]
    Path("lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(LetterheadError, match=r"the label \['b', 'a'\] is a list \(multi-label\)"):
        written("lists.jsonl")


@pytest.mark.parametrize(
    "first",
    [
        ("3", "Wall St. Bears"),
        ("World", "Wall St."),
        ("x", "a text of more than eight words is a row"),
    ],
)
def test_new_keeps_the_first_row_of_a_file_without_names(written, first):  # noqa: F811
    rows = [(first[0] if i % 2 else "b", f"{i} {words(i, 9)}") for i in range(100)]
    write_csv("bare.csv", rows, header=first)
    experiment = written("bare.csv")
    assert experiment.data.header is False
    assert experiment.data.columns.model_dump() == {"text": "2", "label": "1", "empty_parts": False}
    read = list(open_source(experiment.data).splits["train"])
    assert len(read) == 101 and (read[0].label, read[0].text) == first


def test_windows_quotes_are_read_as_windows_writes_them(written, capsys):  # noqa: F811
    lines = [f"{i} “so it isn’t” {words(i, 9)} – ok…,{'ab'[i % 2]}" for i in range(100)]
    Path("quotes.csv").write_bytes("\r\n".join(["text,label", *lines]).encode("cp1252"))
    assert written("quotes.csv").data.encoding == ["utf-8", "cp1252"]
    assert "by which it says '0 “so it isn’t”" in capsys.readouterr().out


def test_a_file_of_central_europe_is_not_taken_for_one_of_the_west(written):  # noqa: F811
    lines = [
        f"{i} Nő és fű – őszi széljárás, hűvös eső {words(i, 9)},{'ab'[i % 2]}" for i in range(200)
    ]
    quoted = [f'"{line.rpartition(",")[0]}",{line[-1]}' for line in lines]
    Path("east.csv").write_bytes("\r\n".join(["text,label", *quoted]).encode("cp1250"))
    assert "ő" in Path("east.csv").read_bytes().decode(written("east.csv").data.encoding[-1])
