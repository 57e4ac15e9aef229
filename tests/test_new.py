"""make new: from a file to an experiment that loads, with the right columns and labels, and a reason for each choice."""

import json
from pathlib import Path

import pytest

from letterhead.experiment import load_experiment
from letterhead.records import LetterheadError, read_json
from prep import new
from tests.conftest import ROOT
from tests.test_data import write_csv


@pytest.fixture
def place(workplace, fetched, monkeypatch):
    """A folder like the repository's; models lie where they were fetched to."""
    for name in ("llamafactory_configs", "model", ".cache"):
        Path(name).symlink_to(ROOT / name)
    Path("experiments").mkdir()
    Path("experiments/models").symlink_to(ROOT / "experiments/models")
    return workplace


@pytest.fixture
def written(place, monkeypatch):
    """Write an experiment for a source; its rows are not made."""
    monkeypatch.setattr(new.data, "main", lambda experiment: None)
    monkeypatch.setattr(new, "stage_seconds", lambda *_: {})

    def write(source: str):
        new.main(source)
        return load_experiment(Path(source).stem)

    return write


def words(i: int, n: int) -> str:
    return " ".join(f"word{(i * 7 + k * 3) % 50}" for k in range(n))


def test_two_texts_an_id_a_numbered_label_and_its_names(place, capsys):
    header, kinds = ("id", "subject", "body", "kind_id", "kind"), ["low"] * 8 + ["high", "urgent"]
    rows = [(i, f"Subject {i}", "" if i == 5 else words(i, 90), max(0, i % 10 - 7), kinds[i % 10]) for i in range(300)]
    write_csv("tickets.csv", [*rows, (300, "No kind", "at all, but words enough", "", "")], header)
    new.main("tickets.csv")
    experiment = load_experiment("tickets")
    assert experiment.data.columns.text == ["subject", "body"] and experiment.data.columns.label == "kind"
    assert experiment.labels == ["high", "low", "urgent"] and experiment.prompt.options == "letters"
    assert experiment.data.max_words == new.MAX_WORDS and experiment.data.bad_rows == "drop"
    card = read_json("data/tickets/data_card.json")
    assert (
        card["rows"]["test"] == 60
        and card["dropped"]["bad row"] == 1
        and card["sft"]["rows"] == experiment.decoder.train_rows
    )
    said = capsys.readouterr().out
    for reason in ("which names what 'kind_id' numbers", "imbalanced", "1 of 301 rows lack", "low 240", "on this machine"):
        assert reason in said and (reason == "on this machine" or reason in Path("experiments/tickets.yaml").read_text())
    before = Path("experiments/tickets.yaml").read_bytes()
    with pytest.raises(LetterheadError, match=r"experiments/tickets.yaml: is there already and is not overwritten"):
        new.main("tickets.csv")
    assert Path("experiments/tickets.yaml").read_bytes() == before


def test_many_classes_are_answered_by_name_and_rare_ones_left_out(written):
    rows = [{"text": f"{i} {words(i, 20)}", "label": f"class {i % 40}"} for i in range(800)]
    rows.append({"text": words(1, 9), "label": "rare"})
    Path("many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    experiment = written("many.jsonl")
    assert len(experiment.labels) == 40 and experiment.data.labels["rare"] is None
    assert experiment.prompt.options == "names" and experiment.eval.score == "sum"


def test_chinese_texts_get_models_that_read_them(written):
    write_csv(
        "zh.csv", [("正面" if i % 2 else "负面", f"这是第{i}条评论，内容还不错") for i in range(200)], ("kind", "content")
    )
    experiment = written("zh.csv")
    assert experiment.decoder.folder.name.startswith("Qwen2.5") and "{text}" in experiment.prompt.template
    assert experiment.data.columns.text == "content" and experiment.prompt.answer_prefix == ""


def test_a_folder_names_its_labels_and_few_rows_are_trained_on_longer(written):
    for i in range(120):
        path = Path("mails", "spam" if i % 3 else "ham", f"{i}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{i} {words(i, 12)}")
    experiment = written("mails/")
    assert experiment.labels == ["ham", "spam"] and experiment.data.columns.text == "text"
    assert experiment.sft_arguments()["num_train_epochs"] == 5  # of 76 rows, 4 a step: a hundred steps


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("id,price", lambda i: (i, i * 1.5), "no column looks like a label .* among id .100 distinct"),
        ("price,label", lambda i: (i * 1.5, "ab"[i % 2]), "no column looks like a text"),
        ("text,label", lambda i: (f"{i} {words(i, 9)}", "a" if i else "b"), "fewer than two labels have 5 rows"),
    ],
)
def test_data_that_cannot_be_guessed_are_refused_with_what_was_seen(written, header, row, message):
    write_csv("odd.csv", [row(i) for i in range(100)], header.split(","))
    with pytest.raises(LetterheadError, match=message):
        written("odd.csv")
    assert not Path("experiments/odd.yaml").exists()
