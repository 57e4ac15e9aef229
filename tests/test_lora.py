"""Adapters: what they train is what is scored, merged, resumed, predicted and exported, and the
trained head is never a random one."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
)

from eval import checkpoints as eval_checkpoints
from letterhead.config.models import Lora
from letterhead.files import LetterheadError, read_json
from letterhead.models import adapters, checkpoints, heads, llamafactory, scoring
from letterhead.models.classifier import load_raw, whole_folder
from letterhead.models.precision import with_shared_weights
from letterhead.models.scoring import load_decoder
from letterhead.plan.memory import HALF, QUANTISED, training_memory
from letterhead.runs import results
from prep import data
from serve import export
from tests.conftest import ROOT
from tests.test_data import write_csv
from train import heads as train_heads
from train import sft as train_sft
from train.sft_worker import LessWork

LABELS = ["World", "Sports", "Business"]
LORA = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 20,
    "save_steps": 10,
}
HEAD = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "eval_steps": 0.5,
    "learning_rate": 1e-2,
    "lora": {"rank": 4},
}


@pytest.fixture
def make(make_experiment):
    def make(**keys):
        write_csv(
            "rows.csv", [(f"text {i} of {LABELS[i % 3]} news", LABELS[i % 3]) for i in range(60)]
        )
        rows = {"rows": {"validation": 12, "test": 12}}
        experiment = make_experiment("rows.csv", LABELS, data=rows, **keys)
        data.main(experiment)
        return experiment

    return make


def start_sft() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "train.sft", "--experiment", "mine"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def sft() -> None:
    child = start_sft()
    _, errors = child.communicate()
    assert child.returncode == 0, errors[-3000:]


def added(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """A base's weights with the products of an adapter's matrices added, from the files alone."""
    settings = read_json(folder / "adapter_config.json")
    weights, matrices = (
        load_file(base / "model.safetensors"),
        load_file(next(folder.glob("ad*.s*"))),
    )
    for name, first in matrices.items():
        if name.endswith("lora_A.weight"):
            second = matrices[name.replace("lora_A", "lora_B")]
            key = name.removeprefix("base_model.model.").replace("lora_A.", "")
            weights[key] = weights[key] + settings["lora_alpha"] / settings["r"] * second @ first
    return weights


def test_sft_of_an_adapter_is_scored_merged_resumed_and_predicted(make, monkeypatch):
    experiment = make(sft=LORA)
    sft()
    folder = experiment.sft_folder / "checkpoints"
    first, last = checkpoints.whole_checkpoints(folder)
    assert [checkpoints.step_of(path) for path in (first, last)] == [10, 20]
    assert not list(folder.rglob("model.safetensors")) and checkpoints.base_of(last) != last
    state = load_decoder(last, "float32", packed=False).state_dict()
    base = experiment.decoder.folder
    moved = 0
    for name, weight in added(last, base).items():
        assert torch.allclose(state[name], weight, atol=1e-6), name
        moved += not torch.equal(weight, load_file(base / "model.safetensors")[name])
    assert moved == 14  # seven linear layers in each of two

    # Killed between its checkpoints, it ends as it would have ended.
    shutil.rmtree(experiment.sft_folder)
    child = start_sft()
    while not (first / "trainer_state.json").exists():
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)
    child.kill()
    child.communicate()
    sft()
    assert read_json(experiment.sft_folder / "stage.json")["resumed_from"] == 10
    again = load_decoder(last, "float32", packed=False).state_dict()
    assert all(torch.allclose(weight, again[name], atol=1e-6) for name, weight in state.items())

    loaded, load = [], scoring._load
    monkeypatch.setattr(scoring, "_load", lambda folder: loaded.append(folder) or load(folder))
    scoring._load_base.cache_clear()
    eval_checkpoints.main(experiment)
    assert loaded == [base, base]  # for step 0, and for all checkpoints
    texts = [row["text"] for row in results.read_rows(experiment, "test")]
    for step in (0, 20):
        lines = results.read_predictions(experiment, f"sft@{step}", "test")
        told = [[line["probabilities"][label] for label in LABELS] for line in lines]
        assert np.abs(load_raw(experiment, f"sft@{step}")(texts) - told).max() < 1e-4
    whole = whole_folder(experiment, "sft@20")
    assert read_json(whole / "config.json")["architectures"] == ["LlamaForCausalLM"]
    written = os.stat(whole / "model.safetensors").st_mtime_ns
    assert whole_folder(experiment, "sft@20") == whole
    assert os.stat(whole / "model.safetensors").st_mtime_ns == written  # made once
    for name, weight in added(last, base).items():
        assert torch.allclose(load_file(whole / "model.safetensors")[name], weight, atol=1e-6)


def test_an_adapter_costs_in_service_what_the_whole_model_does(tiny_models):
    whole = heads.load_head(tiny_models["smollm2"], LABELS)
    told = checkpoints.parameters_per_token(whole)
    lora = heads.Head(lora={"rank": 64}).lora
    assert checkpoints.parameters_per_token(adapters.adapted(whole, lora)) == told


def test_an_adapter_on_another_base_than_its_own_is_refused(tiny_models, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_models["smollm2"], base)
    model = adapters.with_adapter(
        heads.load_head(base, LABELS), heads.Head(lora={"rank": 4}).lora, base
    )
    folder = tmp_path / "checkpoint-1"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    checkpoints.note_bases([folder])
    heads.load_head(folder, LABELS)
    other = LlamaForCausalLM.from_pretrained(base)
    torch.nn.init.normal_(other.model.norm.weight)
    other.save_pretrained(base)
    with pytest.raises(LetterheadError, match=r"trained on another model than .*base holds now"):
        heads.load_head(folder, LABELS)


@pytest.mark.parametrize("half", [True, False])
def test_the_base_of_sft_has_the_type_that_is_planned_for(tiny_models, half):
    base = AutoModelForCausalLM.from_pretrained(tiny_models["qwen3"], dtype=torch.float32)
    model = adapters.adapted(base, heads.Head(lora={"rank": 4}).lora)
    LessWork().on_init_end(SimpleNamespace(bf16=half), None, None, model=model)
    for name, weight in model.named_parameters():
        learns = "lora" in name
        expected = torch.bfloat16 if half and not learns else torch.float32
        assert weight.dtype == expected and weight.requires_grad == learns, name


def test_quantised_weights_are_not_cast_and_take_the_memory_of_four_bits(tiny_models):
    base = AutoModelForCausalLM.from_pretrained(tiny_models["qwen3"], dtype=torch.float32)
    model, lora = adapters.adapted(base, Lora(rank=4)), Lora(rank=4)
    packed = [p for name, p in model.named_parameters() if name.endswith("proj.base_layer.weight")]
    for weight in packed:
        weight.quant_state = "as bitsandbytes marks them"
    LessWork().on_init_end(SimpleNamespace(bf16=True), None, None, model=model)
    assert packed and all(weight.dtype == torch.float32 for weight in packed)
    plain, four_bits = (
        training_memory(tiny_models["qwen3"], 2, 16, True, lora=lora, projected=4, quantised=of)
        for of in (False, True)
    )
    spared = sum(weight.numel() for weight in packed) * (HALF - QUANTISED)
    assert plain.weights - four_bits.weights == pytest.approx(spared, abs=1)
    assert plain.activations == four_bits.activations


@pytest.mark.parametrize(
    ("gpu", "told"),
    [
        (False, r"quantization_bit needs a GPU, and none is here; .*quantization_bit=null"),
        (True, r"needs bitsandbytes; run: .*requirements/gpu.txt"),
    ],
)
def test_a_quantised_base_is_refused_where_it_cannot_be_had(make, monkeypatch, gpu, told):
    experiment = make(sft=LORA | {"quantization_bit": 4})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(llamafactory.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LetterheadError, match=told):
        train_sft.train(experiment, experiment.sft_arguments(), None, None, 0)
    assert not list(experiment.sft_folder.glob("checkpoints/checkpoint-*"))


def test_unknown_layers_are_an_error_that_names_those_there_are(tiny_models):
    with pytest.raises(LetterheadError, match="lora.targets: nose: no such layers; .*q_proj"):
        adapters.adapted(
            heads.load_head(tiny_models["qwen3"], LABELS),
            heads.Head(lora={"targets": ["nose"]}).lora,
        )


@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_less_work_gives_an_adapters_loss_and_gradients(tiny_models, name):
    found = []
    for is_less in (False, True):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_models[name], dtype=torch.float32)
        settings = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
        model = get_peft_model(base, settings)
        for parameter in model.parameters():  # an adapter begins at nothing
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.05)
        if is_less:
            LessWork().on_init_end(SimpleNamespace(bf16=False), None, None, model=model)
        ids = torch.arange(40).reshape(2, 20)
        labels = torch.full_like(ids, -100)
        labels[:, -3:] = ids[:, -3:]
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for plain, less in zip(*found, strict=True):
        assert torch.allclose(plain, less, atol=1e-5)


@pytest.mark.parametrize("method", ["bert", "linear_head", "sft_options"])
def test_an_adapters_head_is_the_trained_one_in_scoring_predicting_and_export(
    make, method, tiny_models, monkeypatch
):
    keys = {"decoder_keys": {"head": HEAD, "sft_options": HEAD}}
    keys["encoder_keys"] = {"model": str(tiny_models["bert"]), "head": HEAD}
    experiment = make(**keys)
    train_heads.main(experiment, method)
    name = f"{method}@10"
    lines = results.read_predictions(experiment, name, "test")
    told = np.array([[line["probabilities"][label] for label in LABELS] for line in lines])
    texts = [row["text"] for row in results.read_rows(experiment, "test")]
    assert np.abs(load_raw(experiment, name)(texts) - told).max() < 1e-4
    folder = checkpoints.whole_checkpoints(
        experiment.run_folder / train_heads.METHODS[method].trained_by / "checkpoints"
    )[-1]
    trained = load_file(folder / "adapter_model.safetensors")
    head = "classifier" if method == "bert" else "score"
    loaded = heads.load_head(folder, LABELS)
    assert torch.equal(
        loaded.get_submodule(head).weight, trained[f"base_model.model.{head}.weight"]
    )
    naive = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS))
    with pytest.raises(LetterheadError, match="its weight .* was not loaded"):
        adapters.require_loaded(naive, folder)
    if method == "bert":  # whose files have no pooler
        assert "base_model.model.bert.pooler.dense.weight" in trained
    exported, _ = export.export(experiment, name)
    weights = load_file(exported / "model.safetensors")
    assert not any("lora" in name for name in weights) and not list(exported.glob("adapter*"))
    assert np.abs(load_raw(experiment, str(exported))(texts).argmax(1) == told.argmax(1)).all()

    # Killed after its first checkpoint, it ends as it would have ended.
    shutil.rmtree(folder.parent.parent)
    for path in experiment.results_folder.glob(f"{method}@*"):
        path.unlink()
    save = heads.HeadTrainer._save_checkpoint

    def save_and_die(trainer, *rest) -> None:
        save(trainer, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(heads.HeadTrainer, "_save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train_heads.main(experiment, method)
    train_heads.main(experiment, method)
    stage = folder.parent.parent / "stage.json"
    assert read_json(stage)["resumed_from"] == 5
    again = results.read_predictions(experiment, name, "test")
    assert [line["prediction"] for line in again] == [line["prediction"] for line in lines]
    assert np.allclose(
        [[line["probabilities"][x] for x in LABELS] for line in again], told, atol=1e-4
    )


def test_a_packed_evaluation_leaves_the_base_alone(tiny_models):
    """The copy that is evaluated shares the base's weights, and merging must not add to them."""
    model = adapters.with_adapter(
        heads.load_head(tiny_models["qwen3"], LABELS),
        heads.Head(lora={"rank": 4}).lora,
        tiny_models["qwen3"],
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # it begins at nothing
            torch.nn.init.normal_(weight)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapters.merged(with_shared_weights(model))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"lora_target": "q_proj, lm_head"}, "lora_target names lm_head"),
        ({"lora_target": ["q_proj", "lm_head"]}, "lora_target names lm_head"),
        ({"additional_target": "embed_tokens"}, "additional_target is not supported"),
        ({"adapter_name_or_path": "some/adapter"}, "adapter_name_or_path is not supported"),
        ({"quantization_bit": 8}, "quantization_bit: 4 and finetuning_type: lora"),
        ({"quantization_bit": 4, "finetuning_type": "full"}, "a quantised base has four bits"),
        ({"finetuning_type": "freeze"}, "finetuning_type: full or lora"),
    ],
)
def test_what_would_be_scored_wrongly_is_refused(make_experiment, keys, told):
    write_csv("rows.csv", [("a", LABELS[0])])
    with pytest.raises(LetterheadError, match=told):
        make_experiment("rows.csv", LABELS, sft=LORA | keys)


def test_an_adapter_without_its_base_is_an_error(make, tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "gone"}))
    with pytest.raises(LetterheadError, match="gone: no checkpoint there"):
        checkpoints.require_model(folder)
