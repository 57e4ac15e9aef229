"""Training that ends when it no longer gains, and the search for a learning rate."""

import math
import shutil
from pathlib import Path

import optuna
import pytest
from transformers import TrainerCallback

from letterhead.config.models import Head, Search
from letterhead.files import LetterheadError, read_json
from letterhead.models import checkpoints, heads
from letterhead.models.callbacks import Diverged, evaluations_without_gain, has_ended
from letterhead.runs import results
from prep import data
from tests.conftest import ROOT
from tests.test_data import write_csv
from tests.test_heads import random_rows
from tests.test_prompt import LABELS
from train import heads as train
from train import heads_worker, sft
from train.search import RATE, Searched, finished, search


@pytest.fixture
def trained(tiny_models, tmp_path):
    """What trains a tiny BERT with patience 2 on given validation losses, one an evaluation; gives
    the rates after each, and the steps that were saved."""

    def train_on(losses: list[float], resume: str | None = None) -> tuple[list[float], list[int]]:
        head = Head(
            per_device_train_batch_size=8,
            num_train_epochs=1,
            eval_steps=0.1,
            lr_scheduler_type="constant_with_warmup",
            patience=2,
        )
        arguments = heads.training_arguments(head, tmp_path, 0, "validation_log_loss")
        arguments.report_to = []
        rows, seen, rates, saved = random_rows(80), iter(losses), [], []

        class Watch(TrainerCallback):
            def on_step_end(self, args, state, control, lr_scheduler, **kwargs):
                rates.append(lr_scheduler.get_last_lr()[0])

            def on_save(self, args, state, control, **kwargs):
                saved.append(state.global_step)

        trainer = heads.HeadTrainer(
            heads.load_head(tiny_models["bert"], list("abcd")),
            arguments,
            heads.load_tokenizer(tiny_models["bert"]),
            rows,
            {"test": rows, "validation": rows},
            lambda split, *_: {"log_loss": next(seen) if split == "validation" else 0.0},
            patience=head.patience,
        )
        trainer.add_callback(Watch())
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / resume))
        return rates, saved

    return train_on


def test_training_ends_without_gain_at_a_falling_rate_and_saves_its_last_step(trained, tmp_path):
    rates, saved = trained([0.9, 0.5, 0.6, 0.4, 0.5, 0.6, 0.1])
    assert len(rates) == 6 and saved == [1, 2, 4, 6]
    assert rates[2] == pytest.approx(1e-4) and rates[3] == pytest.approx(1e-4 / 3)
    assert rates[5] == pytest.approx(1e-4 / 9)
    state = read_json(tmp_path / "checkpoint-6" / "trainer_state.json")
    assert evaluations_without_gain(state) == 2
    assert has_ended(state, 2) and not has_ended(state, 3) and not has_ended(state, None)


def test_a_resumed_training_goes_on_counting_at_the_fallen_rate(trained, tmp_path):
    """Killed in the fifth evaluation, after one evaluation without a gain: the second ends it."""
    rates, saved = trained([0.9, 0.5, 0.4, 0.6, 0.7])
    assert saved[-1] == 5 and rates[4] < rates[3]
    for path in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(StopIteration):
        trained([0.9, 0.5, 0.4, 0.6])
    again, more = trained([0.7], resume="checkpoint-4")
    assert again == pytest.approx(rates[4:]) and more == [5]


def test_patience_wants_a_schedule_without_a_known_end():
    with pytest.raises(ValueError, match="patience: the rate of cosine comes down at a known end"):
        Head(patience=2)


def make(make_experiment, **keys):
    write_csv("rows.csv", [(f"text {i} of {LABELS[i % 3]} news", LABELS[i % 3]) for i in range(90)])
    rows = {"validation": 12, "test": 12}
    return make_experiment("rows.csv", LABELS, data={"rows": rows}, **keys)


def with_search(**keys) -> dict:
    """A decoder whose head is searched at the rate 1e-3, at 1e-6 and 3e-3, and between."""
    head = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "eval_steps": 0.5}
    head |= {"learning_rate": 1e-3, "search": {"trials": 4, "rates": [1e-6, 3e-3]} | keys}
    return {"decoder_keys": {"head": head}}


def test_the_winner_on_validation_is_trained_and_no_trial_sees_test_rows(
    make_experiment, monkeypatch
):
    experiment = make(make_experiment, **with_search())
    data.main(experiment)
    seen, read, trial_loss = {}, [], heads_worker.trial_loss

    def watched(experiment, method, rate, trial):
        loss = trial_loss(experiment, method, rate, trial)
        seen[rate] = loss
        assert "test" not in read
        return loss

    def read_rows(experiment, name, read_rows=results.read_rows):
        read.append(name)
        return read_rows(experiment, name)

    monkeypatch.setattr(heads_worker, "trial_loss", watched)
    monkeypatch.setattr(results, "read_rows", read_rows)
    train.main(experiment, "linear_head")
    assert "test" in read
    found = read_json("runs/mine/linear-head/stage.json")["search"]
    assert found["trials"] == 4 and len(seen) == 4 - found["pruned"]
    assert found["rate"] == min(seen, key=seen.get) and found["loss"] == min(seen.values())
    assert list(seen)[:2] == pytest.approx([1e-3, 1e-6])
    assert found["loss_before"] == seen[1e-3] and found["rate"] > 1e-5
    log = checkpoints.log_history(experiment.run_folder / "linear-head" / "checkpoints")
    rates = [line["learning_rate"] for line in log if "learning_rate" in line]
    assert 0 < max(rates) <= found["rate"] * 1.001
    losses = [
        line["eval_validation_log_loss"] for line in log if "eval_validation_log_loss" in line
    ]
    assert min(losses) == pytest.approx(found["loss"], abs=1e-6)


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "interrupted"])
def test_a_search_that_was_cut_off_goes_on_and_repeats_no_finished_trial(
    make_experiment, tmp_path, killed
):
    experiment = make(make_experiment)
    data.main(experiment)
    tried, settings = [], Search(trials=4, rates=[1e-6, 3e-3])

    def train_at(rate: float, trial: optuna.Trial) -> float:
        tried.append(rate)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return 1 / len(tried)

    def go_on(inputs: str) -> Searched:
        return search(settings, 1e-3, train_at, tmp_path, "head.search", experiment, inputs)

    with pytest.raises(KeyboardInterrupt):
        go_on("0")
    study = optuna.load_study(study_name="0", storage=f"sqlite:///{tmp_path / 'search.db'}")
    if killed:  # which tells nobody
        study.enqueue_trial({RATE: 2e-4})
        study.ask().suggest_float(RATE, 1e-6, 3e-3, log=True)
    found = go_on("0")
    expected = [1e-3, 1e-6, *([2e-4, 1e-6, 3e-3] if killed else [3e-3, 1e-6])]
    assert tried[: len(expected)] == pytest.approx(expected)
    assert found.trials == 4 and len(tried) == 5
    go_on("0")
    assert len(tried) == 5
    go_on("other inputs")
    assert len(tried) == 9


def test_a_search_that_goes_on_draws_the_rates_that_an_undisturbed_one_does(
    make_experiment, tmp_path
):
    experiment = make(make_experiment)
    data.main(experiment)
    settings, rates = Search(trials=7, rates=[1e-6, 3e-3]), {}
    for name, cut_off in (("undisturbed", None), ("disturbed", 5)):
        tried: list[float] = []
        (folder := tmp_path / name).mkdir()

        def train_at(rate: float, trial: optuna.Trial, tried=tried, cut_off=cut_off) -> float:
            tried.append(rate)
            if len(tried) == cut_off:
                raise KeyboardInterrupt
            return 1 / len(tried)

        def go_on(folder=folder, train_at=train_at) -> Searched:
            return search(settings, 1e-3, train_at, folder, "head.search", experiment, "0")

        if cut_off:
            with pytest.raises(KeyboardInterrupt):
                go_on()
        go_on()
        rates[name] = tried
    assert len(set(rates["undisturbed"])) == 7
    cut = rates["disturbed"]
    assert cut[4] == pytest.approx(cut[5])  # the one that was cut off, again
    assert [*cut[:4], *cut[5:]] == pytest.approx(rates["undisturbed"])


def test_no_trial_begins_after_its_seconds_and_what_diverges_is_no_winner(
    make_experiment, monkeypatch, tmp_path
):
    experiment = make(make_experiment)
    data.main(experiment)
    settings = Search(trials=9, seconds=1e-6, rates=[1e-6, 3e-3])

    def find(train_at, settings=settings) -> Searched:
        key = "encoder.head.search"
        return search(settings, 1e-3, train_at, tmp_path, key, experiment, str(train_at))

    assert find(lambda rate, trial: 1.0).trials == 1

    def diverges(rate: float, trial: optuna.Trial) -> float:
        if rate > 1e-5:
            raise Diverged("the training diverged")
        return 2.0

    found = find(diverges, Search(trials=3, rates=[1e-6, 3e-3]))
    assert (found.rate, found.pruned, found.loss_before) == (pytest.approx(1e-6), 2, None)
    with pytest.raises(
        LetterheadError, match="search: every trial diverged; name lower rates. .*: the training"
    ):
        find(lambda rate, trial: diverges(1.0, trial))

    def fails(rate: float, trial: optuna.Trial) -> float:
        raise LetterheadError("disk full")

    with pytest.raises(LetterheadError, match="disk full"):
        find(fails)
    study = optuna.load_study(study_name=str(fails), storage=f"sqlite:///{tmp_path / 'search.db'}")
    assert [trial.state.name for trial in study.trials][:1] == ["FAIL"] and not finished(study)
    with pytest.raises(LetterheadError, match="every trial diverged"):
        find(lambda rate, trial: math.nan)
    monkeypatch.setattr(results, "read_rows", lambda *_: [])
    with pytest.raises(LetterheadError, match="encoder.head.search: there are no validation rows"):
        find(lambda rate, trial: 1.0)


def test_sft_is_searched_and_ends_without_gain_by_llamafactory(make_experiment, monkeypatch):
    """At rates that teach nothing the loss stays as the first evaluation found it."""
    write = {"num_train_epochs": 8, "save_steps": 2, "per_device_train_batch_size": 16}
    keys = {"overrides": write | {"learning_rate": 1e-30, "logging_steps": 1}, "patience": 2}
    keys |= {"search": {"trials": 2, "rates": [1e-29]}, "config": "sft.yaml"}
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    experiment = make(make_experiment, decoder_keys={"sft": keys})
    data.main(experiment)
    sft.main(experiment)
    record = read_json("runs/mine/sft/stage.json")
    found = record["search"]
    assert found["trials"] == 2 and found["rate"] == pytest.approx(1e-30)
    (*_, last) = checkpoints.whole_checkpoints(Path("runs/mine/sft/checkpoints"))
    state = read_json(last / "trainer_state.json")
    losses = [line["eval_loss"] for line in state["log_history"] if "eval_loss" in line]
    assert losses == pytest.approx([found["loss"]] * 3, rel=1e-3)
    assert record["steps"] == 6 < state["max_steps"] == 40
    assert has_ended(state, 2) and not Path("runs/mine/sft/trial").exists()
    Path("runs/mine/sft/stage.json").unlink()
    Path("runs/mine/sft/checkpoints/all_results.json").unlink()  # killed before its closing files
    monkeypatch.setattr(sft, "run_llamafactory", lambda *_: pytest.fail("trained on"))
    sft.main(experiment)
    assert read_json("runs/mine/sft/stage.json")["steps"] == record["steps"]
