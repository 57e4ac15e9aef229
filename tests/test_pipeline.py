"""The stages in processes of their own: on Chinese headlines, and trained by two processes at
once."""

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from letterhead.files import read_json, read_jsonl, write_json
from tests.test_data import write_csv
from tests.test_prompt import LABELS, nasty_rows

ROOT = Path(__file__).parent.parent
STAGES = {
    "data": ["prep.data"],
    "sft": ["train.sft"],
    "bert": ["train.heads", "bert"],
    "linear-head": ["train.heads", "linear_head"],
}
# What says that a training is in the midst of its work
MIDST = {
    "sft": "runs/mine/sft/checkpoints/checkpoint-*/trainer_state.json",
    "bert": "runs/mine/results/bert@*.json",
}


def start(stage: str, **variables: str) -> subprocess.Popen:
    log = open(f"{stage}.log", "a")
    command = [sys.executable, "-m", *STAGES[stage], "--experiment", "mine"]
    return subprocess.Popen(
        command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(ROOT)} | variables
    )


def finish(stage: str, **variables: str) -> None:
    assert start(stage, **variables).wait(300) == 0, Path(f"{stage}.log").read_text()[-3000:]


def remove(stage: str) -> None:
    for path in Path("runs/mine/results").glob(f"{stage}[@_]*"):
        path.unlink()
    shutil.rmtree(f"runs/mine/{stage}")


@pytest.mark.skipif(
    not (ROOT / "../shared/data/toutiao/train.csv").exists(),
    reason="no ../shared/data/toutiao beside the repository",
)
def test_chinese_headlines_with_fourteen_classes(make_experiment):
    from prep import data

    read = {}
    for split in ("train", "test"):
        with open(ROOT / f"../shared/data/toutiao/{split}.csv", encoding="utf-8") as file:
            read[split] = list(csv.DictReader(file))
    labels = sorted({row["label"] for row in read["train"]})
    assert len(labels) == 14
    source = str(ROOT.resolve().parent / "shared/data/toutiao/{split}.csv")
    keys = {"rows": {"train": 200, "validation": 100, "test": 300}}
    experiment = make_experiment(source, labels, data=keys)
    data.main(experiment)
    card = read_json("data/mine/data_card.json")
    assert card["rows"]["read"] == 4999 + 997 + 998 and card["rows"]["test"] == 300
    trained = {row["text"].strip() for row in read["train"]}
    assert (
        card["shared_with_train"]["test"]
        == sum(row["text"].strip() in trained for row in read["test"])
        == 38
    )


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_die_with_their_parent(
    make_experiment, tiny_models, tmp_path
):
    write_csv("rows.csv", nasty_rows(140))
    for folder in tiny_models.values():  # dropout draws other numbers in each process
        shutil.copytree(folder, Path("models") / folder.name)
    bert = Path("models") / tiny_models["bert"].name
    config = read_json(bert / "config.json")
    write_json(
        bert / "config.json",
        config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    )
    step = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    head = {"num_train_epochs": 2, "eval_steps": 0.25, "learning_rate": 1e-3, **step}
    make_experiment(
        "rows.csv",
        LABELS,
        sft={"logging_steps": 1, "save_steps": 4, "learning_rate": 1e-3, **step},
        # Whole steps: with two processes a last one that is not full is filled with rows of the
        # epoch's beginning.
        data={"rows": {"train": 96, "validation": 16, "test": 21}},
        decoder_keys={"train_rows": 96, "head": head},
        encoder_keys={
            "model": str(bert),
            "head": head | {"group_by_length": False, "gradient_accumulation_steps": 1},
        },
    )
    finish("data")
    trained = {}
    for n in (1, 2):
        for stage in ("sft", "bert", "linear-head"):
            finish(stage, NPROC=str(n))
            folder = Path(f"runs/mine/{stage}/checkpoints")
            last = sorted(
                folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])
            )
            log = read_json(last[-1] / "trainer_state.json")["log_history"]
            trained[stage, n] = {
                "saved": [path.name for path in last],
                "losses": [
                    (line["step"], line["loss"], line["grad_norm"])
                    for line in log
                    if "loss" in line
                ],
                "weights": load_file(last[-1] / "model.safetensors"),
                "f1": [line["eval_test_f1_macro"] for line in log if "eval_test_f1_macro" in line],
            }
        if n == 1:
            shutil.move("runs/mine", "runs/by-1")
            shutil.copytree("runs/by-1/data", "runs/mine/data")
    for stage in ("sft", "bert", "linear-head"):
        one, two = trained[stage, 1], trained[stage, 2]
        print(
            f"{stage}: saved {two['saved']}; (step, loss, gradient norm) of one process and of two:"
        )
        print(*zip(one["losses"], two["losses"], strict=True), sep="\n")
        assert one["saved"] == two["saved"] and one["f1"] == two["f1"]
        assert np.allclose(one["losses"], two["losses"], rtol=1e-4), (
            stage,
            one["losses"],
            two["losses"],
        )
        for name, weight in one["weights"].items():
            assert torch.allclose(weight, two["weights"][name], atol=1e-5), (stage, name)
    predictions = [
        list(read_jsonl(f"runs/{run}/results/linear_head@24.predictions.jsonl"))
        for run in ("by-1", "mine")
    ]
    assert [p["prediction"] for p in predictions[0]] == [p["prediction"] for p in predictions[1]]

    # Too many processes, and processes that outlive nobody.
    process = start("sft", NPROC="3")
    assert process.wait(100) == 0  # it is up to date, whatever NPROC
    remove("sft")
    assert start("sft", NPROC="3").wait(100) == 1
    assert "NPROC=3 does not divide decoder.sft's step of 4 x 2 rows" in Path("sft.log").read_text()
    for stage, pattern in MIDST.items():
        remove(stage)
        process = start(stage, NPROC="2")
        while process.poll() is None and not list(Path().glob(pattern)):
            time.sleep(0.01)
        started = psutil.Process(process.pid).children(recursive=True)
        assert (
            sum(
                "train.sft_worker" in " ".join(p.cmdline())
                or "train.heads_worker" in " ".join(p.cmdline())
                for p in started
            )
            >= 3
        )
        process.kill()
        process.wait()
        assert not psutil.wait_procs(started, timeout=20)[1]
    finish("bert", NPROC="2")  # goes on from a checkpoint of two processes
