"""Rare classes brought up by weights or by rows: what is weighed, and what it does."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight, compute_sample_weight
from transformers.modeling_outputs import SequenceClassifierOutput

from letterhead.files import read_json, read_jsonl
from letterhead.models import heads
from letterhead.models.checkpoints import step_of
from letterhead.models.llamafactory import sft_plan
from letterhead.pipeline import STAGES, inputs_sha256
from letterhead.rows.balance import class_weights, repeats, training_rows
from letterhead.runs import results
from letterhead.stats.metrics import choosing_losses
from prep import data
from tests.test_data import write_csv
from train import fitted
from train.heads import collect
from train.heads import main as train_head
from train.heads_worker import trial_loss
from train.sft import sft_rows

LABELS = ["common", "rare"]


def skewed(n: int, share: float, seed: int) -> list[tuple[str, str]]:
    """Rows whose rarer class is told by few of its words, and by none in a fifth of its rows."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        label = LABELS[int(rng.random() < share)]
        words = rng.integers(0, 300, 12).tolist()
        if label == "rare" and rng.random() < 0.8:
            words[:3] = rng.integers(280, 340, 3).tolist()
        rows.append((f"{i} " + " ".join(f"word{word}" for word in words), label))
    return rows


def make(make_experiment, balance: str, seed: int = 42, **sections):
    write_csv("rows.csv", skewed(1200, 0.1, seed))
    rows = {"validation": 100, "test": 500}
    sections |= {"balance": balance, "seed": seed, "data": {"rows": rows}}
    return make_experiment("rows.csv", LABELS, **sections)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(0, 3))
def test_every_class_comes_up_to_the_largest_and_no_row_is_lost(classes, seed):
    classes = np.array(classes)
    times = repeats(classes, seed)
    counts = Counter(classes.tolist())
    for number, own in counts.items():
        of_class = times[classes == number]
        assert of_class.sum() == max(counts.values())
        assert of_class.max() - of_class.min() <= 1 <= of_class.min()
        assert own < max(counts.values()) or set(of_class) == {1}
    assert np.array_equal(times, repeats(classes, seed))


def test_weights_are_scikit_learns_and_the_loss_torchs(make_experiment):
    experiment = make(make_experiment, "weights")
    truth = ["common"] * 9 + ["rare"]
    rows = [{"label": label} for label in truth]
    weights = class_weights(experiment, truth)
    expected = compute_class_weight("balanced", classes=np.array(LABELS), y=truth)
    assert weights == pytest.approx(expected)
    assert class_weights(experiment, truth[:9]) == [1.0, 0.0]
    logits, labels = torch.randn(10, 2), torch.tensor([0] * 9 + [1])
    own = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    found = heads.mean_over_rows(SequenceClassifierOutput(logits=logits), labels, None, weights)
    assert torch.allclose(found, (own * torch.tensor(weights)[labels]).mean(), atol=1e-6)
    none = make(make_experiment, "none")
    assert class_weights(none, truth) is None and training_rows(none, rows) == rows


def test_what_is_chosen_by_is_scikit_learns_loss_with_scikit_learns_weights():
    rng = np.random.default_rng(1)
    truth = np.array([0] * 30 + [1] * 3)
    probabilities = rng.dirichlet([1, 1], len(truth))
    for balance, weight in (("none", None), ("weights", "balanced"), ("oversample", "balanced")):
        own = compute_sample_weight(weight, truth)
        expected = log_loss(truth, probabilities, sample_weight=own)
        losses = choosing_losses(truth, probabilities, balance)
        assert losses.mean() == pytest.approx(expected)


@pytest.mark.parametrize("balance", ["none", "weights", "oversample"])
def test_sft_reads_rare_rows_again_under_either(make_experiment, balance):
    experiment = make(make_experiment, balance)
    data.main(experiment)
    own = results.read_rows(experiment, "decoder_train")
    counts = Counter(row["label"] for row in own)
    read = Counter(row["output"] for row in read_jsonl("data/mine/sft_train.jsonl"))
    card = read_json("data/mine/data_card.json")
    expected = sum(counts.values()) if balance == "none" else 2 * max(counts.values())
    assert sum(read.values()) == card["shared"]["sft_rows"] == sft_rows(experiment) == expected
    assert balance == "none" or len(set(read.values())) == 1
    held = Counter(row["output"] for row in read_jsonl("data/mine/sft_validation.jsonl"))
    assert sum(held.values()) == 100 if balance == "none" else len(set(held.values())) == 1
    assert card["shared"]["rows"] == len(own)
    assert sft_plan(experiment, expected)[0] == -(-expected // 4)
    assert len(training_rows(experiment, own)) == (
        2 * max(counts.values()) if balance == "oversample" else len(own)
    )


def test_the_rare_class_is_found_more_often_and_f1_is_no_lower(make_experiment):
    for seed in (1, 2, 3):
        reached = {}
        for balance in ("none", "weights"):
            experiment = make(make_experiment, balance, seed)
            data.main(experiment)
            fitted.main(experiment, "tfidf")
            reached[balance] = results.read_result(experiment, "tfidf", "test")
        recall = {kind: result.per_class["rare"]["recall"] for kind, result in reached.items()}
        assert recall["weights"] > recall["none"]
        assert reached["weights"].f1_macro >= reached["none"].f1_macro


def test_a_head_is_kept_and_searched_by_weighted_losses_of_whole_predictions(
    make_experiment, tiny_models
):
    """The loss is held against scikit-learn's on the predictions; a middle step whose predictions
    are cut off, and whose checkpoint is gone, leaves a gap and no crash."""
    head = {"num_train_epochs": 1, "per_device_train_batch_size": 32, "eval_steps": 0.2}
    keys = {"model": str(tiny_models["bert"]), "head": head | {"learning_rate": 3e-3}}
    experiment = make(make_experiment, "weights", encoder_keys=keys)
    data.main(experiment)
    train_head(experiment, "bert")
    folder = experiment.run_folder / "bert/checkpoints"
    state = read_json(max(folder.glob("*"), key=step_of) / "trainer_state.json")
    losses, plain = {}, {}
    for line in state["log_history"]:
        if "eval_validation_choosing_loss" not in line:
            continue
        rows = results.read_predictions(experiment, f"bert@{line['step']}", "validation")
        truth = results.class_numbers(experiment, rows)
        probabilities = [[row["probabilities"][label] for label in LABELS] for row in rows]
        weights = compute_sample_weight("balanced", truth)
        losses[line["step"]] = line["eval_validation_choosing_loss"]
        plain[line["step"]] = line["eval_validation_log_loss"]
        assert losses[line["step"]] == pytest.approx(
            log_loss(truth, probabilities, sample_weight=weights)
        )
    best = min(losses, key=losses.get)
    assert state["best_global_step"] == best and state["best_metric"] == losses[best]
    assert all(abs(losses[step] - plain[step]) > 1e-3 for step in losses)
    trial = SimpleNamespace(report=lambda loss, step: None, should_prune=lambda: False)
    assert trial_loss(experiment, "bert", 3e-3, trial) == pytest.approx(losses[best], abs=1e-3)

    pruned = next(step for step in losses if not (folder / f"checkpoint-{step}").exists())
    name = f"bert@{pruned}"
    hashed = results.read_result(experiment, name, "test").inputs_sha256
    _, predictions = results.result_files(experiment, name, "validation")
    predictions.write_bytes(predictions.read_bytes()[:-40])
    kept, _ = collect(experiment, "bert", hashed)
    assert (pruned, "validation") not in kept and not predictions.exists()
    validation = {step: found for (step, split), found in kept.items() if split == "validation"}
    assert results.chosen_step(experiment, validation) in validation


def test_balance_makes_every_trained_method_anew(make_experiment):
    before, after = make(make_experiment, "none"), make(make_experiment, "weights")
    data.main(after)
    for name in ("data", "tfidf", "embedding", "setfit", "bert", "linear-head", "sft-options"):
        stage = STAGES[name]
        assert inputs_sha256(stage, before) != inputs_sha256(stage, after), name
