"""Labels that look wrong are found, told with the likely one, and none is changed."""

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from letterhead.files import read_jsonl
from letterhead.stats.label_errors import find_suspects
from prep import data
from report import audit
from tests.test_data import write_csv

SPORTS = "The team won the {} match against its rivals after extra time, says the coach"
MONEY = "Shares of the {} bank fell by five percent as interest rates rose again"
NAMES = [f"{a} {b}" for a in ("north", "old", "royal", "city") for b in range(15)]


def flipped() -> tuple[list[tuple[str, str]], set[str]]:
    """120 texts of two classes, and those among them whose label is the other one."""
    rows = [(SPORTS.format(name), "sports") for name in NAMES]
    rows += [(MONEY.format(name), "money") for name in NAMES]
    wrong = set(range(0, 120, 20))
    swap = {"sports": "money", "money": "sports"}
    labelled = [(t, swap[c] if i in wrong else c) for i, (t, c) in enumerate(rows)]
    return labelled, {labelled[i][0] for i in wrong}


def test_flipped_labels_are_the_most_suspect_with_the_right_one_beside(make_experiment, capsys):
    rows, wrong = flipped()
    odd = "<script>alert(1)</script> " + MONEY.format("<b>bad</b>")
    write_csv("rows.csv", [*rows, (odd, "sports")])
    keys = {"rows": {"validation": 12, "test": 24}}
    experiment = make_experiment("rows.csv", ["sports", "money"], data=keys)
    data.main(experiment)
    before = {split: list(read_jsonl(f"data/mine/{split}.jsonl")) for split in audit.SPLITS}
    audit.main(experiment)
    with open("runs/mine/audit/suspects.csv", encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    improbable = [row for row in found if row["likely"]]
    assert {row["text"] for row in improbable[:7]} == wrong | {odd}
    by_text = dict(rows) | {odd: "sports"}
    for row in improbable[:7]:
        assert row["label"] == by_text[row["text"]] != row["likely"]
        assert float(row["p(likely)"]) > 0.5 > float(row["p(label)"])
    alike = [row for row in found if row["alike"]]
    assert alike and all(row["alike"].rpartition(": ")[2] != row["label"] for row in alike)
    after = {split: list(read_jsonl(f"data/mine/{split}.jsonl")) for split in audit.SPLITS}
    assert before == after
    page = Path("runs/mine/audit/audit.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page and "<b>bad" not in page
    assert "labels look wrong: runs/mine/audit/suspects.csv" in capsys.readouterr().out
    audit.main(experiment)
    assert "up to date" in capsys.readouterr().out


def test_a_class_of_one_row_is_left_alone(make_experiment):
    rows, _ = flipped()
    write_csv("rows.csv", [*rows, ("A recipe for soup with leeks and cream", "food")])
    keys = {"rows": {"validation": 12, "test": 24}}
    experiment = make_experiment("rows.csv", ["sports", "money", "food"], data=keys)
    data.main(experiment)
    audit.main(experiment)
    assert "leeks" not in Path("runs/mine/audit/suspects.csv").read_text()


def test_a_row_is_not_judged_by_others_of_its_group(make_experiment, monkeypatch):
    """A customer's texts are alike and all labelled wrongly, so that each confirms the others; and
    a class that one customer alone has can't be judged."""
    customers = [(f"{label} {i}", label, f"{label} {i % 20}") for label in "ab" for i in range(60)]
    wrong = [(f"a too {i}", "b", "wrong") for i in range(12)]
    alone = [(f"c {i}", "c", "cook") for i in range(8)]
    write_csv("rows.csv", [*customers, *wrong, *alone], ("text", "label", "customer"))
    places = {"a": [1, 0, 0, 0], "b": [0, 1, 0, 0], "c": [0, 0, 1, 0], "a too": [0.8, 0, 0, 0.6]}

    class Embedder:
        def __init__(self, experiment):
            pass

        def embed(self, texts, keep):
            noise = np.random.default_rng(0).normal(0, 0.01, (len(texts), 4))
            return SimpleNamespace(
                vectors=np.array([places[text.rstrip(" 0123456789")] for text in texts]) + noise
            )

    judged = {}

    def kept(experiment, vectors, labelled, groups):
        probabilities = out_of_sample(experiment, vectors, labelled, groups)
        judged[experiment.name] = dict(zip(texts(experiment), probabilities, strict=True))
        return probabilities

    def texts(experiment):
        rows = (read_jsonl(experiment.data_folder / f"{split}.jsonl") for split in audit.SPLITS)
        return [row["text"] for split in rows for row in split]

    out_of_sample = audit.out_of_sample
    monkeypatch.setattr(audit, "Embedder", Embedder)
    monkeypatch.setattr(audit, "out_of_sample", kept)
    for name, group in (("alone", None), ("grouped", "customer")):
        keys = {"group": group, "rows": {"validation": 12, "test": 24}}
        experiment = make_experiment("rows.csv", ["a", "b", "c"], name=name, data=keys)
        data.main(experiment)
        audit.main(experiment)
    for text, *_ in wrong:
        assert judged["alone"][text].argmax() == 1 and judged["grouped"][text].argmax() == 0
    for text, *_ in alone:
        assert judged["alone"][text][2] < 1 and judged["grouped"][text].tolist() == [0, 0, 1]


def test_thresholds_are_the_classes_own_means():
    """By hand: the means of the own probabilities are 0.65 and 0.65. Row 4 reaches the first; row 1
    is more probably of the second, and does not reach it."""
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.05, 0.95], [0.05, 0.95], [0.95, 0.05]])
    suspects = find_suspects(probabilities, np.array([0, 0, 1, 1, 1]))
    assert suspects.likely.tolist() == [0, 0, 1, 1, 0] and suspects.ranked().tolist() == [4]


@pytest.mark.parametrize("seed", range(5))
def test_half_of_the_flips_are_in_as_many_rows_as_were_flipped(seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 5, 2000)
    logits = rng.normal(0, 1, (2000, 5)) + 3 * np.eye(5)[truth]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    wrong = rng.random(2000) < 0.05
    given = np.where(wrong, (truth + rng.integers(1, 5, 2000)) % 5, truth)
    first = find_suspects(probabilities, given).ranked()[: wrong.sum()]
    assert wrong[first].mean() > 0.5
