"""A training that diverges ends in one line that names step and rate, leaves no checkpoint of it,
and predicts nothing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from letterhead.files import LetterheadError, read_json, write_json
from letterhead.models import checkpoints
from letterhead.models.callbacks import StopAtDivergence
from letterhead.runs import results
from prep import data
from serve import predict
from tests.conftest import ROOT
from tests.test_data import write_csv
from train import heads as train_head

LABELS = ["World", "Sports", "Business"]
HUGE = 1e30


@pytest.fixture
def make(make_experiment, tiny_models):
    def make(**keys):
        write_csv(
            "rows.csv", [(f"text {i} of {LABELS[i % 3]} news", LABELS[i % 3]) for i in range(60)]
        )
        experiment = make_experiment(
            "rows.csv", LABELS, data={"rows": {"validation": 8, "test": 8}}, **keys
        )
        data.main(experiment)
        return experiment

    return make


def run(module: str, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", module, *more, "--experiment", "mine"]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def test_sft_that_diverges_fails_and_is_never_called_whole_or_up_to_date(make):
    rate = {
        "learning_rate": HUGE,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "save_steps": 1,
    }
    experiment = make(
        sft=rate
        | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 4}
    )
    for _ in range(
        2
    ):  # the second run is not "up to date", and resumes from nothing that has diverged
        ended = run("train.sft")
        assert ended.returncode != 0
        [told] = re.findall(r"error: the training diverged.*", ended.stderr)
        assert re.search(
            r"diverged at step \d: .*\(learning rate there 1e\+30\); lower the learning rate", told
        )
        assert "error: LLaMA-Factory's training diverged" in ended.stderr
        assert "runs/mine/sft/log.txt ends with" in ended.stderr
        assert not (experiment.run_folder / "sft" / "stage.json").exists()
    for path in checkpoints.whole_checkpoints(experiment.sft_folder / "checkpoints"):
        weights = load_file(path / "model.safetensors")
        assert all(torch.isfinite(weight).all() for weight in weights.values())


@pytest.mark.parametrize("method", ["bert", "linear_head", "sft_options"])
def test_a_head_that_diverges_fails_in_one_line(make, tiny_models, method):
    head = {
        "learning_rate": HUGE,
        "warmup_ratio": 0,
        "per_device_train_batch_size": 8,
        "eval_steps": 0.2,
    }
    keys = {"decoder_keys": {"head": head, "sft_options": head}}
    experiment = make(**keys, encoder_keys={"model": str(tiny_models["bert"]), "head": head})
    with pytest.raises(
        LetterheadError, match=r"the training diverged at step \d: .*learning rate there .*; lower"
    ):
        train_head.main(experiment, method)
    assert not (experiment.run_folder / method.replace("_", "-") / "stage.json").exists()
    assert not list(experiment.results_folder.glob(f"{method}*"))


def damaged(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_a_checkpoint_of_no_numbers_is_not_whole_not_resumed_and_predicts_nothing(
    make, tiny_models
):
    head = {"per_device_train_batch_size": 8, "eval_steps": 0.5, "num_train_epochs": 1}
    experiment = make(encoder_keys={"model": str(tiny_models["bert"]), "head": head})
    train_head.main(experiment, "bert")
    folder = experiment.run_folder / "bert" / "checkpoints"
    last = checkpoints.whole_checkpoints(folder)[-1]
    name = f"bert@{checkpoints.step_of(last)}"
    before = (last / "model.safetensors").read_bytes()
    damaged(last, "bert.encoder.layer.0.attention.self.query.bias")
    assert (
        last not in checkpoints.whole_checkpoints(folder) and checkpoints.resumable(folder) != last
    )
    with pytest.raises(LetterheadError, match=f"{name}: no whole checkpoint"):
        predict.main(experiment, "rows.csv", "out.csv", name)
    (last / "model.safetensors").write_bytes(before)
    assert last in checkpoints.whole_checkpoints(folder)
    damaged(last, "bert.embeddings.word_embeddings.weight")  # of the matrices alone
    assert last not in checkpoints.whole_checkpoints(folder)
    with pytest.raises(LetterheadError, match="model.safetensors: its weights are not numbers"):
        checkpoints.require_finite_weights(last)
    # A model of somebody's own, named by its path
    shutil.copytree(last, "own")
    with pytest.raises(
        LetterheadError, match="predicting: the probabilities of 60 of 60 rows are not"
    ):
        predict.main(experiment, "rows.csv", "out.csv", str(Path("own").absolute()))
    assert not Path("out.csv").exists()


def test_no_result_holds_what_is_not_a_number(make):
    experiment = make()
    rows = results.read_rows(experiment, "test")
    probabilities = np.full((len(rows), 3), np.nan)
    with pytest.raises(
        LetterheadError, match="sft@3, test rows: the probabilities of 8 of 8 rows are .*some/model"
    ):
        results.write_result(
            experiment, "sft@3", "test", rows, probabilities, seconds=1.0, model="some/model"
        )
    assert not list(experiment.results_folder.glob("*"))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_the_callback_names_the_first_step_and_the_rate(wrong):
    model, callback = torch.nn.Linear(2, 2), StopAtDivergence()
    schedule = SimpleNamespace(get_last_lr=lambda: [0.5])
    state, args = (
        SimpleNamespace(global_step=6),
        SimpleNamespace(fp16=False, logging_nan_inf_filter=True),
    )
    control = SimpleNamespace(should_save=True, should_evaluate=False)
    told = {"model": model, "lr_scheduler": schedule}
    callback.on_train_begin(args, state, control)
    assert not args.logging_nan_inf_filter
    model.weight.grad = torch.zeros(2, 2)
    for step in (callback.on_pre_optimizer_step, callback.on_step_end, callback.on_train_end):
        step(args, state, control, **told)
    callback.on_log(args, state, control, logs={"loss": 1.0, "epoch": 1}, **told)
    model.weight.grad[0, 1] = wrong
    with pytest.raises(
        LetterheadError, match=r"diverged at step 7: the gradient's norm is .*rate there 0.5"
    ):
        callback.on_pre_optimizer_step(args, state, control, **told)
    callback.on_pre_optimizer_step(
        SimpleNamespace(fp16=True), state, control, **told
    )  # the loss is scaled down
    with pytest.raises(LetterheadError, match="diverged at step 6: loss is"):
        callback.on_log(args, state, control, logs={"loss": wrong}, **told)
    with torch.no_grad():
        model.bias[1] = wrong
    with pytest.raises(
        LetterheadError, match="diverged at step 6: the weights bias are not finite"
    ):
        callback.on_step_end(args, state, control, **told)


def test_a_head_that_is_there_is_left_out_and_a_decoder_without_a_vocabulary_refused(
    make, tiny_models, capsys
):
    from letterhead.models import heads

    for size in (2, 3):  # of another number of classes, and of as many
        torch.manual_seed(size)
        old = heads.load_head(tiny_models["bert"], [f"old {i}" for i in range(size)])
        with torch.no_grad():
            old.classifier.weight.fill_(7.0)
        old.save_pretrained("with-head")
        heads.load_tokenizer(tiny_models["bert"]).save_pretrained("with-head")
        model = heads.load_head(Path("with-head"), LABELS, new_head=True)
        assert (
            model.classifier.weight.shape[0] == 3
            and model.classifier.weight.detach().abs().max() < 1
        )
        assert model.config.id2label == dict(enumerate(LABELS))
        kept = model.bert.encoder.layer[0].output.dense.weight
        assert torch.equal(kept, old.bert.encoder.layer[0].output.dense.weight)
        assert (
            "with-head: holds a head already; it is left out, and a new one for World"
            in capsys.readouterr().out
        )
    classifier = heads.load_head(tiny_models["smollm2"], LABELS)
    classifier.save_pretrained("no-decoder")
    heads.load_tokenizer(tiny_models["smollm2"]).save_pretrained("no-decoder")
    assert read_json("no-decoder/config.json")["architectures"] == [
        "LlamaForSequenceClassification"
    ]
    with pytest.raises(
        LetterheadError, match="no-decoder: LlamaForSequenceClassification, not a language model"
    ):
        make(decoder_folder=Path("no-decoder"))


def test_a_tokenizer_that_ends_texts_with_its_padding_pads_with_another_token(
    tiny_models, tmp_path
):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    from letterhead.models import heads

    tokenizer = AutoTokenizer.from_pretrained(tiny_models["smollm2"])
    tokenizer.pad_token = tokenizer.eos_token
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end[0]}", special_tokens=[end]
    )
    tokenizer.save_pretrained(tmp_path)
    loaded = heads.load_tokenizer(tmp_path)
    assert loaded("a text")["input_ids"][-1] == loaded.eos_token_id != loaded.pad_token_id
    torch.manual_seed(0)
    model = heads.load_head(tiny_models["smollm2"], LABELS).eval()
    model.config.pad_token_id = loaded.pad_token_id
    ids = loaded(["a text", "a text that is longer"])["input_ids"]
    together = heads.class_logits(model, loaded, ids, 64)
    with torch.inference_mode():  # what a service reads: the last token
        score = model.score(model.model(torch.tensor([ids[0]])).last_hidden_state[:, -1])
    assert np.abs(together[0] - score[0].numpy()).max() < 1e-4
    config = read_json(tmp_path / "tokenizer_config.json")
    only = {
        key: tokenizer.eos_token
        for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        if key in config
    }
    extra = {"additional_special_tokens": [], "extra_special_tokens": []}
    write_json(tmp_path / "tokenizer_config.json", config | only | extra)
    with pytest.raises(
        LetterheadError, match="ends each text with .*, which is its padding, too; give it another"
    ):
        heads.load_tokenizer(tmp_path)
