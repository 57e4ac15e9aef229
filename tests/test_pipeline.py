"""The stages as a user runs them, in processes of their own: end to end, and killed at random moments."""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from letterhead.records import read_json, read_jsonl, sha256_file, write_json
from letterhead.results import best_step, read_result
from tests.test_prompt import LABELS, nasty_rows, write_csv

ROOT = Path(__file__).parent.parent
STAGES = {
    "data": ["prep.data"],
    "sft": ["sft.train"],
    "eval-ckpts": ["eval.checkpoints"],
    "zero-shot": ["eval.zero_shot"],
    "tfidf": ["baselines.tfidf", "tfidf"],
    "tfidf-all": ["baselines.tfidf", "tfidf_all"],
    "bert": ["baselines.train", "bert"],
    "bert-all": ["baselines.train", "bert_all"],
    "linear-head": ["baselines.train", "linear_head"],
    "compare": ["eval.compare"],
    "report": ["report.build"],
}
# What says that a stage is in the midst of its work; the kill comes up to so many seconds later.
MIDST = {
    "data": ("data/mine/..pool.jsonl.tmp", 2.0),
    "sft": ("runs/mine/sft/checkpoints/checkpoint-*/trainer_state.json", 4.0),
    "eval-ckpts": ("runs/mine/results/sft@*.json", 1.5),
    "linear-head": ("runs/mine/results/linear_head@*.json", 2.0),
    "bert": ("runs/mine/results/bert@*.json", 2.0),
}
METHOD = {"eval-ckpts": "sft", "linear-head": "linear_head", "bert": "bert"}
KILLS = 3


def start(stage: str, **variables: str) -> subprocess.Popen:
    log = open(f"{stage}.log", "a")
    command = [sys.executable, "-m", *STAGES[stage], "--experiment", "mine"]
    return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(ROOT)} | variables)


def finish(stage: str, **variables: str) -> None:
    assert start(stage, **variables).wait(300) == 0, Path(f"{stage}.log").read_text()[-3000:]


def kill_in_the_midst(stage: str, seed: int) -> bool:
    """Start a stage, kill -9 it at a random moment of its work; False where it was done before."""
    pattern, spread = MIDST[stage]
    process = start(stage)
    while process.poll() is None and not list(Path().glob(pattern)):
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, spread))
    killed = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return killed


def made(stage: str) -> dict:
    """What a stage made, without what tells times."""
    if stage == "data":
        return {p.name: sha256_file(p) for p in Path("data/mine").iterdir()}
    if stage == "sft":
        files = {
            str(p): sha256_file(p) if p.suffix == ".safetensors" else None
            for p in Path("runs/mine/sft/checkpoints").glob("checkpoint-*/*")
        }
        state = read_json("runs/mine/sft/checkpoints/checkpoint-12/trainer_state.json")
        losses = [(entry["step"], entry.get("loss")) for entry in state["log_history"] if "loss" in entry]
        return {"files": files, "losses": losses, "final": sha256_file("runs/mine/sft/checkpoints/model.safetensors")}
    method = METHOD[stage]
    results = {p.name: read_json(p) for p in Path("runs/mine/results").glob(f"{method}@*.json")}
    timeless = {
        k: {n: v for n, v in r.items() if n not in ("seconds", "rows_per_second", "training_seconds")}
        for k, r in results.items()
    }
    weights = Path(f"runs/mine/{stage}").glob("checkpoints/checkpoint-*/model.safetensors")
    return {
        "results": timeless,
        "predictions": {p.name: p.read_text() for p in Path("runs/mine/results").glob(f"{method}@*.jsonl")},
        "table": Path(f"runs/mine/results/{method}_checkpoints.md").read_text(),
        "weights": {str(p): sha256_file(p) for p in weights},
    }


def remove(stage: str) -> None:
    if stage in METHOD:
        for path in Path("runs/mine/results").glob(f"{METHOD[stage]}[@_]*"):
            path.unlink()
    if stage == "data":
        shutil.rmtree("data/mine")
    shutil.rmtree(f"runs/mine/{stage}", ignore_errors=True)


def test_stages_end_to_end_and_after_kills_as_if_undisturbed(make_experiment, tiny_models):
    write_csv("rows.csv", nasty_rows(140))
    sft = {"per_device_train_batch_size": 8, "logging_steps": 1, "save_steps": 4, "learning_rate": 1e-3}
    rows = {"rows": {"validation": 20, "test": 20}}
    # Evaluated every 7 steps and logged every 2: neither divides the other, nor the epoch of 12.
    head = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "eval_steps": 0.19, "learning_rate": 1e-3}
    plain = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_length": 128}
    experiment = make_experiment(
        "rows.csv",
        LABELS,
        sft=sft,
        data=rows,
        decoder_keys={"train_rows": 96, "head": head},
        encoder_keys={"model": str(tiny_models["bert"]), "head": plain | {"group_by_length": False}},
        eval={"thinking": {"rows": 4, "tokens": 4, "batch": 2}},
    )
    undisturbed = {}
    for stage in STAGES:
        finish(stage)
        if stage in MIDST:
            undisturbed[stage] = made(stage)

    # The result files are the design's.
    result = read_json("runs/mine/results/sft@12.json")
    keys = "experiment method step seed split n accuracy precision_macro recall_macro f1_macro per_class f1_macro_ci95 ece "
    keys += "train_loss eval_loss seconds rows_per_second tokens device dtype model inputs_sha256 versions"
    assert set(keys.split()) <= set(result) and (result["step"], result["split"], result["n"]) == (12, "test", 20)
    predictions = list(read_jsonl("runs/mine/results/sft@12.predictions.jsonl"))
    assert [p["id"] for p in predictions] == [row["id"] for row in read_jsonl("data/mine/test.jsonl")]
    for p in predictions:
        assert set(p) == {"id", "label", "prediction", "probabilities", "perplexity"}
        assert abs(sum(p["probabilities"].values()) - 1) < 1e-9
        assert p["prediction"] == min(p["perplexity"], key=p["perplexity"].get)
    assert result["accuracy"] == sum(p["label"] == p["prediction"] for p in predictions) / 20
    assert [f"| {step} |" in undisturbed["eval-ckpts"]["table"] for step in (0, 4, 8, 12)] == [True] * 4
    optimizers = sorted(str(p.parent.name) for p in Path("runs/mine/sft/checkpoints").glob("*/optimizer.pt"))
    assert optimizers == ["checkpoint-12"]
    paths = [path for folder in ("data", "runs") for path in Path(folder).rglob("*") if path.name != ".lock"]
    assert "How sure?" in Path("runs/mine/report/report.html").read_text()
    # The best checkpoint on validation and the last are kept, and their results are among those of every evaluation.
    by_step = {step: read_result(experiment, f"linear_head@{step}", "validation") for step in (7, 14, 21, 28, 35, 36)}
    kept = {int(path.name.split("-")[1]) for path in Path("runs/mine/linear-head/checkpoints").glob("checkpoint-*")}
    assert kept == {best_step(by_step), 36}
    state = read_json("runs/mine/linear-head/checkpoints/checkpoint-36/trainer_state.json")
    logged = {line["step"]: line["loss"] for line in state["log_history"] if "loss" in line}
    mean = (2 * logged[16] + 2 * logged[18] + 2 * logged[20] + logged[21]) / 7  # of steps 15 to 21
    assert abs(read_result(experiment, "linear_head@21", "test")["train_loss"] - mean) < 1e-6
    written = {path: path.stat().st_mtime_ns for path in paths}
    for stage in STAGES:  # nothing is done again
        finish(stage)
    assert {path: path.stat().st_mtime_ns for path in paths} == written
    Path("runs/mine/eval-ckpts/stage.json").unlink()
    finish("eval-ckpts")  # the table again, but no score
    scores = [path for path in paths if path.name.startswith("sft@")]
    assert scores and all(path.stat().st_mtime_ns == written[path] for path in scores)

    for stage in reversed(MIDST):
        kills = seed = 0
        while kills < KILLS:
            remove(stage)
            kills += kill_in_the_midst(stage, seed)
            finish(stage)
            assert made(stage) == undisturbed[stage], (stage, seed)
            seed += 1
            assert seed < 3 * KILLS, f"{stage} is too fast to be killed in the midst"

    # A result that is gone is made again, which takes the training that made it.
    Path("runs/mine/results/linear_head@7.json").unlink()
    finish("linear-head")
    assert made("linear-head") == undisturbed["linear-head"]

    # A checkpoint cut in half is set aside, and the table says so.
    half = Path("runs/mine/sft/checkpoints/checkpoint-8/model.safetensors")
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    finish("sft")
    finish("eval-ckpts")
    assert Path("runs/mine/sft/checkpoints/broken-checkpoint-8").exists()
    assert "| 8 | not scored: no whole checkpoint" in Path("runs/mine/results/sft_checkpoints.md").read_text()

    # Other settings train anew and keep the old checkpoints.
    config = Path("sft.yaml").read_text()
    Path("sft.yaml").write_text(config.replace("learning_rate: 0.001", "learning_rate: 0.002"))
    finish("sft")
    assert Path("runs/mine/sft/checkpoints.old/checkpoint-12").exists()
    assert sha256_file("runs/mine/sft/checkpoints/model.safetensors") != undisturbed["sft"]["final"]


@pytest.mark.skipif(
    not (ROOT / "../shared/data/toutiao/train.csv").exists(), reason="no ../shared/data/toutiao beside the repository"
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
    assert card["shared_with_train"]["test"] == sum(row["text"].strip() in trained for row in read["test"]) == 38


def test_two_processes_train_as_one_does_and_die_with_their_parent(make_experiment, tiny_models, tmp_path):
    write_csv("rows.csv", nasty_rows(140))
    for folder in tiny_models.values():  # dropout draws other numbers in each process
        shutil.copytree(folder, Path("models") / folder.name)
    bert = Path("models") / tiny_models["bert"].name
    config = read_json(bert / "config.json")
    write_json(bert / "config.json", config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    step = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    head = {"num_train_epochs": 2, "eval_steps": 0.25, "learning_rate": 1e-3, **step}
    make_experiment(
        "rows.csv",
        LABELS,
        sft={"logging_steps": 1, "save_steps": 4, "learning_rate": 1e-3, **step},
        # Whole steps: with two processes a last one that is not full is filled with rows of the epoch's beginning.
        data={"rows": {"train": 96, "validation": 16, "test": 21}},
        decoder_keys={"train_rows": 96, "head": head},
        encoder_keys={"model": str(bert), "head": head | {"group_by_length": False, "gradient_accumulation_steps": 1}},
    )
    finish("data")
    trained = {}
    for n in (1, 2):
        for stage in ("sft", "bert", "linear-head"):
            finish(stage, NPROC=str(n))
            folder = Path(f"runs/mine/{stage}/checkpoints")
            last = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
            log = read_json(last[-1] / "trainer_state.json")["log_history"]
            trained[stage, n] = {
                "saved": [path.name for path in last],
                "losses": [(line["step"], line["loss"], line["grad_norm"]) for line in log if "loss" in line],
                "weights": load_file(last[-1] / "model.safetensors"),
                "f1": [line["eval_test_f1_macro"] for line in log if "eval_test_f1_macro" in line],
            }
        if n == 1:
            shutil.move("runs/mine", "runs/by-1")
            shutil.copytree("runs/by-1/data", "runs/mine/data")
    for stage in ("sft", "bert", "linear-head"):
        one, two = trained[stage, 1], trained[stage, 2]
        print(f"{stage}: saved {two['saved']}; (step, loss, gradient norm) of one process and of two:")
        print(*zip(one["losses"], two["losses"], strict=True), sep="\n")
        assert one["saved"] == two["saved"] and one["f1"] == two["f1"]
        assert np.allclose(one["losses"], two["losses"], rtol=1e-4), (stage, one["losses"], two["losses"])
        for name, weight in one["weights"].items():
            assert torch.allclose(weight, two["weights"][name], atol=1e-5), (stage, name)
    predictions = [list(read_jsonl(f"runs/{run}/results/linear_head@24.predictions.jsonl")) for run in ("by-1", "mine")]
    assert [p["prediction"] for p in predictions[0]] == [p["prediction"] for p in predictions[1]]

    # Too many processes, and processes that outlive nobody.
    process = start("sft", NPROC="3")
    assert process.wait(100) == 0  # it is up to date, whatever NPROC
    remove("sft")
    assert start("sft", NPROC="3").wait(100) == 1
    assert "NPROC=3 does not divide decoder.sft's step of 4 x 2 rows" in Path("sft.log").read_text()
    for stage, pattern in (("sft", MIDST["sft"][0]), ("bert", MIDST["bert"][0])):
        remove(stage)
        process = start(stage, NPROC="2")
        while process.poll() is None and not list(Path().glob(pattern)):
            time.sleep(0.01)
        started = psutil.Process(process.pid).children(recursive=True)
        assert sum("sft.worker" in " ".join(p.cmdline()) or "baselines.fit" in " ".join(p.cmdline()) for p in started) >= 3
        process.kill()
        process.wait()
        assert not psutil.wait_procs(started, timeout=20)[1]
    finish("bert", NPROC="2")  # goes on from a checkpoint of two processes
