"""A cascade is chosen on validation rows alone, counted among what may err, and answers in predict
as it was compared."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import log_loss

from eval import cascade as stage
from letterhead import pipeline
from letterhead.config.experiment import load_experiment
from letterhead.files import LetterheadError, read_json, read_jsonl, write_jsonl
from letterhead.models import classifier
from letterhead.pipeline import CASCADES, EMBEDDING, STAGES, TFIDF, find_method
from letterhead.runs import contenders, results
from letterhead.stats import cascade
from letterhead.stats.cascade import Cascade, Member, choose_pairs, freeze
from letterhead.stats.decision import decide as decide_among
from letterhead.stats.metrics import temperature, tempered
from prep import data
from serve import export, predict
from tests.conftest import experiment_maker
from tests.test_data import write_csv
from tests.test_prompt import LABELS, nasty_rows
from tests.test_report import drawn
from tests.test_serve import read, said_by_the_cards_code
from train import fitted

CLASSES = 3


def member(rng, name: str, family: str, price: float, accuracy: float, truth: np.ndarray) -> Member:
    """A method that is as sure as it is right."""
    right = rng.random(len(truth)) < accuracy
    answer = np.where(right, truth, (truth + rng.integers(1, CLASSES, len(truth))) % CLASSES)
    sure = np.where(right, rng.uniform(0.7, 1.0, len(truth)), rng.uniform(0.4, 0.8, len(truth)))
    probabilities = np.repeat(((1 - sure) / (CLASSES - 1))[:, None], CLASSES, axis=1)
    probabilities[np.arange(len(truth)), answer] = sure
    return Member(name, family, price, probabilities)


def test_pairs_are_of_the_best_dear_methods_and_their_surest_cheap_partners():
    rng = np.random.default_rng(0)
    truth = np.arange(400) % CLASSES
    members = [
        member(rng, "tfidf", "tfidf", 1, 0.80, truth),
        member(rng, "tfidf_all", "tfidf", 1, 0.88, truth),
        member(rng, "bert", "bert", 10, 0.93, truth),
        member(rng, "bert_all", "bert", 10, 0.96, truth),
        member(rng, "letter", "letter", 15, 0.92, truth),
        member(rng, "poor", "poor", 15, 0.60, truth),
        member(rng, "near", "near", 3.9, 0.99, truth),  # no partner at a quarter of its price
    ]
    losses = {
        one.name: log_loss(
            truth, tempered(one.probabilities, temperature(truth, one.probabilities))
        )
        for one in members
    }
    pairs = choose_pairs(truth, members, most=3)
    surest = min(("tfidf", "tfidf_all"), key=losses.get)
    assert pairs[:2] == [(surest, "bert_all"), (surest, "letter")]
    assert not {"bert", "near"} & {dear for _, dear in pairs}
    assert choose_pairs(truth, members, most=1) == pairs[:1]


def test_a_cascade_that_harms_its_cheap_half_on_validation_rows_is_left_out():
    """Where the cheap half is unsure, the dear one, right on most rows, is surer and errs more."""
    truth = np.arange(400) % CLASSES
    is_hard = np.arange(400) >= 200

    def answers(errors_in_hard_rows: int, sure_of_hard_rows: float) -> np.ndarray:
        wrong = is_hard & (np.arange(400) % 20 < errors_in_hard_rows)
        sure = np.where(is_hard, sure_of_hard_rows, 0.99)
        probabilities = np.repeat(((1 - sure) / (CLASSES - 1))[:, None], CLASSES, axis=1)
        probabilities[np.arange(400), np.where(wrong, (truth + 1) % CLASSES, truth)] = sure
        return probabilities

    cheap = Member("cheap", "cheap", 1, answers(5, 0.6))
    worse, better = (Member("dear", "dear", 9, answers(n, 0.99)) for n in (8, 1))
    assert freeze(truth, cheap, worse).validation_share == 0.5
    assert choose_pairs(truth, [cheap, worse], most=3) == []
    assert choose_pairs(truth, [cheap, better], most=3) == [("cheap", "dear")]


def test_so_many_validation_rows_so_many_cascades(monkeypatch):
    def most(rows: int) -> int:
        card = {"rows": {"validation": rows}, "shared": {"rows": 9, "sft_rows": 9}}
        monkeypatch.setattr(pipeline, "read_card", lambda _: card)
        return pipeline.most_cascades(None)

    assert [most(rows) for rows in (0, 99, 100, 299, 300, 9000)] == [0, 0, 2, 2, 3, 3]


def test_the_threshold_is_the_dear_methods_share_of_hits():
    rng = np.random.default_rng(1)
    truth = np.arange(200) % CLASSES
    cheap, dear = (
        member(rng, "cheap", "a", 1, 0.8, truth),
        member(rng, "dear", "b", 9, 0.9, truth),
    )
    frozen = freeze(truth, cheap, dear)
    hits = (dear.probabilities.argmax(1) == truth).sum()
    assert frozen.threshold == (hits + 1) / 202
    surest = tempered(cheap.probabilities, temperature(truth, cheap.probabilities)).max(1)
    assert frozen.validation_share == np.mean(surest < frozen.threshold)


def test_with_prices_the_threshold_is_that_of_the_least_expected_cost():
    """Against all thresholds, in expectation: a row that the cheap half keeps costs its risk of an
    error; one that is passed on costs the dear one's risk and its price."""
    truth = np.arange(1000) % CLASSES
    sure = np.linspace(0.35, 1.0, 1000)
    probabilities = np.repeat(((1 - sure) / (CLASSES - 1))[:, None], CLASSES, axis=1)
    right = np.random.default_rng(4).random(1000) < sure
    probabilities[np.arange(1000), np.where(right, truth, (truth + 1) % CLASSES)] = sure
    is_right = (np.arange(1000) % 20 > 0).astype(float)
    answers = np.eye(CLASSES)[np.where(is_right, truth, (truth + 1) % CLASSES)]
    cheap = Member("cheap", "cheap", 1, probabilities)
    for price, error in ((0.0, 1.0), (0.002, 0.02), (0.01, 0.02), (0.03, 0.02)):
        frozen = freeze(truth, cheap, Member("dear", "dear", 9, answers, price / error))
        kept = tempered(probabilities, frozen.temperatures[0]).max(1)

        def cost(threshold: float, kept=kept, price=price, error=error) -> float:
            return np.where(kept < threshold, 0.05 * error + price, (1 - kept) * error).sum()

        least = min(cost(threshold) for threshold in np.linspace(0, 1.001, 2000))
        assert cost(frozen.threshold) <= least * 1.001
        assert (frozen.validation_share == 0) == (price > error)


@pytest.mark.parametrize("threshold", [0.0, 1.01])
def test_a_share_of_none_or_all_is_the_one_or_the_other(threshold):
    rng = np.random.default_rng(2)
    truth = np.arange(50) % CLASSES
    cheap, dear = (member(rng, name, name, 1, 0.7, truth).probabilities for name in "ab")
    frozen = Cascade("a", "b", (1.0, 1.0), threshold, 0.0)
    deferred = frozen.is_deferred(cheap)
    both = frozen.combine(cheap, dear[deferred], deferred)
    assert deferred.all() == (threshold > 1) and deferred.any() == (threshold > 1)
    assert np.allclose(both, dear if threshold > 1 else cheap)


def test_a_cascade_whose_confidence_says_nothing_is_wrongly_shipped_no_more_often_than_alpha():
    """The cheap half is at the margin's edge below the dear one, and passes on rows by chance: with
    none passed on the cascade loses the margin itself, with some less. To be shipped at a loss of
    the margin is the error."""
    rng, margin, rows, shipped = np.random.default_rng(3), 0.05, 600, 0
    for _ in range(300):
        truth = np.arange(rows) % 4
        both_err = rng.random(rows)
        dear = np.where(both_err < 0.05, (truth + 1) % 4, truth)
        # Half of the rows are passed on, so the cheap half alone loses twice the margin.
        cheap = np.where(both_err < 0.05 + 2 * margin, (truth + 1) % 4, truth)
        passed = rng.random(rows) < 0.5
        composed = np.where(passed, dear, cheap)
        found = {"dear": dear[None], "cheap": cheap[None], "both": composed[None]}
        prices = {"dear": 9.0, "cheap": 1.0, "both": 5.0}
        decided = decide_among(truth, found, prices, 4, margin)
        shipped += decided["established"] and decided["ship"] != "dear"
    assert shipped <= 0.05 * 300 + 2 * (0.05 * 0.95 * 300) ** 0.5


@pytest.fixture(scope="module")
def compared_once(fetched, tiny_models, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("cascades"))
        drawn(experiment_maker(fetched, tiny_models), validation=120)
    return folder


@pytest.fixture
def compared(compared_once, workplace):
    shutil.copytree(compared_once, workplace, dirs_exist_ok=True)
    return load_experiment("mine")


def test_other_labels_of_test_rows_leave_the_frozen_cascades_as_they_are(compared):
    path = pipeline.cascades_file(compared)
    frozen = path.read_bytes()
    assert read_json(path)
    for file in [*compared.results_folder.glob("*.predictions.jsonl")]:
        if ".validation." in file.name:
            continue
        lines = list(read_jsonl(file))
        labels = [line["label"] for line in lines]
        write_jsonl(
            file,
            [
                line | {"label": label}
                for line, label in zip(lines, labels[1:] + labels[:1], strict=True)
            ],
        )
    (compared.run_folder / CASCADES.name / "stage.json").unlink()
    stage.main(compared)
    assert path.read_bytes() == frozen


def test_a_cascade_is_compared_priced_with_an_interval_and_counted(compared):
    names = list(read_json(pipeline.cascades_file(compared)))
    comparison = read_json(compared.results_folder / "comparison.json")
    decided = read_json(compared.results_folder / "decision.json")
    assert names and set(names) <= set(comparison["methods"])
    for name in names:
        entry = comparison["methods"][name]
        halves = entry["halves"]
        cheap, dear = (halves[half] for half in ("cheap", "dear"))
        assert entry["title"].count(" → ") == 1 and entry["n"] == 150
        truth = [line["label"] for line in results.read_predictions(compared, name, "test")]
        asked = {half: results.read_predictions(compared, half, "test") for half in (cheap, dear)}
        assert len(truth) == 150
        passed = 0
        for line, of_cheap, of_dear in zip(
            results.read_predictions(compared, name, "test"), *asked.values(), strict=True
        ):
            sure = tempered(
                np.array([list(of_cheap["probabilities"].values())]), halves["temperatures"][0]
            ).max()
            is_passed = sure < halves["threshold"]
            passed += is_passed
            assert line["prediction"] == (of_dear if is_passed else of_cheap)["prediction"]
        assert passed == halves["deferred"]
        low, high = decided["price_intervals"][name]
        prices = {
            half: comparison["methods"][half]["cost"]["multiply_adds_per_row"]
            for half in (cheap, dear)
        }
        assert low < prices[cheap] + passed / 150 * prices[dear] < high
        assert decided["prices"][name] == high
        assert any("of the test rows" in line for line in decided["how_dear"])
    assert not any(name in (pair["a"], pair["b"]) for pair in comparison["pairs"] for name in names)


def test_each_training_has_a_cascade_of_its_own_files(make_experiment):
    experiment = drawn(make_experiment, validation=120, seeds=[7, 8, 9])
    frozen = read_json(pipeline.cascades_file(experiment))
    comparison = read_json(experiment.results_folder / "comparison.json")
    assert frozen
    for name, trainings in frozen.items():
        halves = [find_method(trainings[0][half]) for half in ("cheap", "dear")]
        if not any(STAGES[half.stage].retrained for half in halves):
            assert len(trainings) == 1
            continue
        assert len(trainings) == 3
        assert len({one["threshold"] for one in trainings}) > 1
        assert len({tuple(one["sha256"]) for one in trainings}) == 3
        entry = comparison["methods"][name]
        assert [training["seed"] for training in entry["trainings"]] == [7, 8, 9]
        values = [training["f1_macro"] for training in entry["trainings"]]
        assert entry["f1_macro"] == pytest.approx(np.mean(values))
        for training in experiment.trainings():
            assert results.read_result(training, name, "test").seed == training.seed


@pytest.fixture(scope="module")
def frozen_once(fetched, tiny_models, tmp_path_factory):
    """The folder of an experiment with a cascade of TF-IDF and embeddings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("frozen"))
        write_csv("rows.csv", nasty_rows(400))
        rows = {"validation": 110, "test": 60}
        made = experiment_maker(fetched, tiny_models)("rows.csv", LABELS, data={"rows": rows})
        data.main(made)
        for module in (stage, pipeline):
            patch.setattr(module, "cascade_members", lambda _: [TFIDF, EMBEDDING])
        pair = ("tfidf", "embedding")
        patch.setattr(cascade, "choose_pairs", lambda truth, members, most: [pair])
        for name in pair:
            fitted.main(made, name)
        stage.main(made)
    return folder


@pytest.fixture
def experiment(frozen_once, workplace):
    shutil.copytree(frozen_once, workplace, dirs_exist_ok=True)
    return load_experiment("mine")


@pytest.mark.parametrize("processes", [1, 2])
def test_predict_answers_as_the_comparison_does_and_says_who_answered(
    experiment, monkeypatch, capfd, processes
):
    monkeypatch.setattr(predict, "process_count", lambda: processes)
    monkeypatch.setattr(predict, "CHUNK", 16)
    rows = results.read_rows(experiment, "test")
    with open("in.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text",), *((row["text"],) for row in rows)])
    predict.main(experiment, "in.csv", "out.csv", "cascade:embedding")
    with open("out.csv", encoding="utf-8", newline="") as file:
        _, *lines = csv.reader(file)
    expected = results.read_predictions(experiment, "cascade:embedding", "test")
    assert [line[1] for line in lines] == [line["prediction"] for line in expected]
    shown = np.array([[float(value) for value in line[2:]] for line in lines])
    told = contenders.read_probabilities(experiment, "cascade:embedding", "test")
    assert np.abs(shown - told).max() < 1e-4
    deferred = results.read_result(experiment, "cascade:embedding", "test").halves["deferred"]
    assert 0 < deferred < 60
    assert f"embedding was asked about {deferred} of 60 texts" in capfd.readouterr().out
    # The page and the server ask each half by itself.
    loaded = classifier.load_classifier(experiment, "cascade:embedding")
    assert isinstance(loaded, classifier.CascadeClassifier)
    found, passed = loaded.answer([row["text"] for row in rows])
    assert passed.sum() == deferred and np.abs(found - told).max() < 1e-4


@pytest.mark.parametrize("name", ["tfidf", "cascade:embedding"])
def test_what_is_exported_answers_as_the_method_does(experiment, name):
    rows = [(row["text"], "") for row in results.read_rows(experiment, "test")]
    write_csv("in.csv", rows)
    predict.main(experiment, "in.csv", "method.csv", name)
    folder, _ = export.export(experiment, name)
    assert not [file for file in folder.rglob("*") if file.suffix in (".pkl", ".joblib", ".pt")]
    predict.main(experiment, "in.csv", "export.csv", str(folder))
    own, exported = read("method.csv"), read("export.csv")
    width = len(LABELS)
    assert [line[:-width] for line in own] == [line[:-width] for line in exported]
    shares = [np.array([line[-width:] for line in one[1:]], float) for one in (own, exported)]
    assert np.abs(shares[0] - shares[1]).max() < 1e-4
    if name == "tfidf":
        said = said_by_the_cards_code(folder)
        printed = [float(one) for one in said.partition("[")[2].rstrip("]\n").split(", ")]
        [expected] = classifier.load_classifier(experiment, name)([export.EXAMPLE])
        assert printed == pytest.approx(expected, abs=1e-6)
        assert all(repr(label) in said for label in LABELS)
    else:
        threshold = read_json(pipeline.cascades_file(experiment))[name][0]["threshold"]
        assert f"{threshold:.6f}" in (folder / "README.md").read_text()


def test_a_cascade_that_was_not_frozen_is_refused_by_name(experiment):
    with pytest.raises(LetterheadError, match="cascade:bert: .*holds cascade:embedding"):
        classifier.load_classifier(experiment, "cascade:bert")


def test_too_few_validation_rows_make_no_cascade(make_experiment, tiny_models, capsys):
    write_csv("rows.csv", nasty_rows(120))
    made = make_experiment("rows.csv", LABELS, data={"rows": {"validation": 20, "test": 20}})
    data.main(made)
    stage.main(made)
    assert not pipeline.cascades_file(made).exists()
    assert not any(method.name == "cascade" for method in pipeline.compared_methods(made))
    assert not Path(made.run_folder / CASCADES.name / "stage.json").exists()
