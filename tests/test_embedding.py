"""Frozen embeddings: the model's own pooling, kept on disk, with logistic regression on top."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import setfit
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModel, AutoTokenizer

from eval import compare
from letterhead.files import LetterheadError, read_json, write_json
from letterhead.models import embeddings
from letterhead.models.classifier import load_classifier
from letterhead.models.embeddings import C, Embedder
from letterhead.models.fitted import fit_regression
from letterhead.models.setfit import fit as fit_setfit
from letterhead.runs import contenders, results
from letterhead.stats.metrics import calibration_error, tempered
from prep import data
from serve import export, predict
from tests.test_data import write_csv
from tests.test_prompt import LABELS, nasty_rows
from tests.test_serve import read, said_by_the_cards_code
from train import fitted

TEXTS = ["A short one", "Shares of the firm fell by 3 % on Monday, said [SEP] the bank.", "Ein Tor"]


def make(make_experiment, labels=LABELS, **keys):
    write_csv("rows.csv", nasty_rows(120))
    return make_experiment(
        "rows.csv", labels, data={"rows": {"validation": 10, "test": 20}}, encoder_keys=keys
    )


def pooled_by_hand(folder, texts: list[str]) -> np.ndarray:
    """The mean of the last hidden states over a text's tokens, scaled to length one."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        means = [
            model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            for text in texts
        ]
    vectors = torch.stack(means).double().numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("prefix", ["", "query: "])
def test_an_embedding_is_the_models_own_pooling_of_the_neutralised_text(make_experiment, prefix):
    experiment = make(make_experiment, prefix=prefix)
    found = Embedder(experiment).embed(TEXTS)
    clean = [prefix + text.replace("[SEP]", "[ SEP]") for text in TEXTS]
    expected = pooled_by_hand(experiment.encoder.folder, clean)
    assert np.abs(found.vectors - expected).max() < 1e-5
    assert found.tokens >= len(AutoTokenizer.from_pretrained(experiment.encoder.folder)(clean[1]))


def test_what_was_embedded_is_kept_by_model_prefix_and_text(make_experiment, monkeypatch):
    experiment = make(make_experiment)
    embedder = Embedder(experiment)
    first = embedder.embed(TEXTS, keep=True)
    again = Embedder(experiment)
    monkeypatch.setattr(again, "_compute", lambda texts: pytest.fail(f"computed {texts}"))
    kept = again.embed([*reversed(TEXTS), TEXTS[0]], keep=True)
    order = [2, 1, 0, 0]
    assert np.array_equal(kept.vectors, first.vectors[order])
    assert kept.saved_seconds > first.saved_seconds == 0
    assert Embedder(make(make_experiment, prefix="passage: ")).file != embedder.file
    folder = Path("encoder")
    shutil.copytree(experiment.encoder.folder, folder)
    other = make(make_experiment, model=str(folder))
    before = Embedder(other).file
    pooling = folder / "1_Pooling/config.json"
    cls = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    write_json(pooling, read_json(pooling) | cls)
    assert Embedder(other).file != before
    again.file.write_bytes(again.file.read_bytes()[:5000])
    mended = Embedder(experiment).embed(TEXTS, keep=True)
    assert np.array_equal(mended.vectors, first.vectors)


def test_c_is_chosen_on_training_rows_alone_as_scikit_learn_does_it():
    rng = np.random.default_rng(0)
    truth = np.array(["a", "b", "c"])[rng.integers(0, 3, 150)]
    centres = {"a": 0, "b": 1, "c": 2}
    features = rng.normal(size=(150, 8)) + np.array([centres[one] for one in truth])[:, None]
    chosen = fit_regression(features, truth, C, 42, None)
    assert chosen.C in embeddings.C
    plain = LogisticRegression(C=chosen.C, max_iter=1000).fit(features, truth)
    assert np.allclose(chosen.coef_, plain.coef_, atol=1e-2)
    lone = fit_regression(features[:4], ["a", "a", "a", "b"], C, 42, None)
    assert embeddings.C[0] == lone.C


def test_a_class_without_training_rows_has_no_share_and_one_class_is_refused(make_experiment):
    experiment = make(make_experiment, labels=[*LABELS, "Nowhere"])
    data.main(experiment)
    rows = results.read_rows(experiment, "train")
    shares = embeddings.fit(experiment, rows).score(TEXTS).probabilities
    assert not shares[:, -1].any() and np.allclose(shares.sum(axis=1), 1)
    with pytest.raises(LetterheadError, match="rows of one class only"):
        embeddings.fit(experiment, [row for row in rows if row["label"] == LABELS[0]])


@pytest.mark.parametrize(
    ("method", "classes", "prefix"),
    [("embedding", 2, ""), ("embedding", len(LABELS), "query: "), ("setfit", 3, "query: ")],
)
def test_the_stage_predict_the_export_and_its_card_answer_alike(
    make_experiment, method, classes, prefix
):
    labels = LABELS[:classes]
    write_csv("rows.csv", [row for row in nasty_rows(160) if row[1] in labels])
    experiment = make_experiment(
        "rows.csv",
        labels,
        data={"rows": {"validation": 10, "test": 20}},
        encoder_keys={
            "prefix": prefix,
            "setfit": {"rows_per_class": 1000, "most_steps": 3, "learning_rate": 1e-4},
        },
    )
    data.main(experiment)
    fitted.main(experiment, method)
    rows = results.read_rows(experiment, "test")
    evaluated = [
        [line["probabilities"][label] for label in labels]
        for line in results.read_predictions(experiment, method, "test")
    ]
    texts = [row["text"] for row in rows]
    classify = load_classifier(experiment, method)
    at, answered = contenders.temperature_of(experiment, method), classify(texts)
    assert at != 1 and np.abs(answered - tempered(np.array(evaluated), at)).max() < 1e-6
    told = compare.calibration(experiment, method, results.read_result(experiment, method, "test"))
    truth = results.class_numbers(experiment, rows)
    error = calibration_error(answered.max(axis=1), answered.argmax(axis=1) == truth)
    assert told["temperature"] == at and told["ece"] == pytest.approx(error, abs=1e-6)
    write_csv("in.csv", [(text, "") for text in texts])
    predict.main(experiment, "in.csv", "method.csv", method)
    folder, _ = export.export(experiment, method)
    predict.main(experiment, "in.csv", "export.csv", str(folder))
    own, exported = read("method.csv"), read("export.csv")
    assert [line[:-classes] for line in own] == [line[:-classes] for line in exported]
    shares = [np.array([line[-classes:] for line in one[1:]], float) for one in (own, exported)]
    assert np.abs(shares[0] - shares[1]).max() < 1e-4
    said = said_by_the_cards_code(folder)
    assert repr(dict(enumerate(labels))) in said
    printed = [float(one) for one in re.findall(r"\d\.\d+(?:e-\d+)?", said.partition("tensor")[2])]
    (own,) = classify([export.EXAMPLE])
    assert printed == pytest.approx(own, abs=1e-3)
    assert "library_name: sentence-transformers" in (folder / "README.md").read_text()
    assert not list(Path(folder).rglob("*.bin"))
    assert embeddings.is_saved(folder) and not embeddings.is_saved(experiment.encoder.folder)
    encoder = experiment.encoder.model_copy(update={"prefix": "passage: "})
    changed = experiment.model_copy(update={"encoder": encoder})
    with pytest.raises(LetterheadError, match=f"not measured as it would be .*: make {method}"):
        export.export(changed, method)


@pytest.mark.parametrize(("most", "steps"), [(1000, 3), (2, 2)])
def test_setfit_reads_its_pairs_once(make_experiment, monkeypatch, most, steps):
    """20 rows, each in two pairs: 40, of which 16 make a step."""
    settings = {"rows_per_class": 64, "iterations": 1, "most_steps": most}
    experiment = make(make_experiment, setfit=settings, head={"max_length": 32})
    data.main(experiment)
    made, train = [], setfit.Trainer.train

    def watched(self, *arguments, **more):
        train(self, *arguments, **more)
        made.append(self.st_trainer.state.global_step)

    monkeypatch.setattr(setfit.Trainer, "train", watched)
    rows = results.read_rows(experiment, "train")[:20]
    found = fit_setfit(experiment, rows)
    assert made == [steps]
    frozen = embeddings.fit(experiment, rows)
    texts = [row["text"] for row in rows]
    shares = [one.score(texts).probabilities for one in (found, frozen)]
    assert np.allclose(shares[0].sum(axis=1), 1) and np.abs(shares[0] - shares[1]).max() > 1e-3
