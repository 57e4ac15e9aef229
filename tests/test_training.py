"""The article's training parameters as LLaMA-Factory reads them; checkpoints whole, broken, resumed
and pruned."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from llamafactory.hparams import get_train_args
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from safetensors.torch import save_file
from torch.utils.data import TensorDataset
from transformers import DefaultFlowCallback, Trainer, TrainerControl, TrainerState
from transformers.trainer_utils import sort_checkpoints

from bench.peers.sft import plain_loop
from letterhead.files import LetterheadError
from letterhead.models import checkpoints, llamafactory
from letterhead.runs import stage
from letterhead.runs.stage import StageRun
from prep import data
from tests.test_data import write_csv
from train import sft_worker as worker

ROOT = Path(__file__).parent.parent


def steps_of(arguments, max_steps: int, what: str) -> list[int]:
    """The steps at which HF's own flow control wants something: should_save, should_evaluate."""
    state = TrainerState(max_steps=max_steps)
    state.compute_steps(arguments, max_steps)
    flow, steps = DefaultFlowCallback(), []
    for state.global_step in range(1, max_steps + 1):
        if getattr(flow.on_step_end(arguments, state, TrainerControl()), what):
            steps.append(state.global_step)
    return steps


def test_the_articles_yaml_means_1250_steps_and_five_checkpoints():
    values = yaml.safe_load((ROOT / "llamafactory_configs/qwen3_0.6b_full_sft.yaml").read_text())
    values |= {"use_cpu": True, "report_to": "none"}  # all that a machine without a GPU needs
    _, data_args, args, finetuning_args, _ = get_train_args(values)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (12, 8)
    assert (args.learning_rate, args.num_train_epochs, args.lr_scheduler_type) == (
        1.2e-5,
        1,
        "cosine",
    )
    assert args.bf16 and args.get_warmup_steps(1250) == 13  # 0.01 of 1,250, rounded up
    assert (data_args.cutoff_len, data_args.template, data_args.dataset) == (
        512,
        "qwen3",
        ["agnews_train"],
    )
    assert (args.save_strategy, args.logging_strategy, args.logging_steps) == (
        "steps",
        "steps",
        0.01,
    )
    assert (
        data_args.preprocessing_num_workers == 8
        and data_args.overwrite_cache
        and args.overwrite_output_dir
    )
    assert (
        finetuning_args.stage == "sft"
        and finetuning_args.finetuning_type == "full"
        and finetuning_args.plot_loss
    )
    assert data_args.enable_thinking  # the think block is trained on, as in the article

    trainer = Trainer(
        torch.nn.Linear(1, 1), args, train_dataset=TensorDataset(torch.zeros(120_000, 1))
    )
    loader = trainer.get_train_dataloader()
    *_, max_steps = trainer.set_initial_training_values(args, loader)
    assert max_steps == 1250
    assert steps_of(args, max_steps, "should_save") == [250, 500, 750, 1000, 1250]


def test_the_small_yaml_needs_no_gpu_and_no_override():
    values = yaml.safe_load((ROOT / "llamafactory_configs/smollm2_135m_full_sft.yaml").read_text())
    args = get_train_args(values)[2]
    assert not args.bf16 and args.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def write_checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"weight": torch.zeros(100)}, path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": 1}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    return path


def test_whole_checkpoints_are_found_by_step_and_old_optimizer_states_go(tmp_path):
    made = [write_checkpoint(tmp_path, step) for step in (100, 20, 3)]
    (tmp_path / "checkpoint-tmp").mkdir()
    assert checkpoints.whole_checkpoints(tmp_path) == made[::-1]
    for age, path in enumerate(made):
        os.utime(path, (1e9 - 60 * age, 1e9 - 60 * age))
    checkpoints.prune_optimizer_states(tmp_path)
    assert [(path / "optimizer.pt").exists() for path in made] == [True, False, False]
    assert checkpoints.resumable(tmp_path) == made[0]
    # The Trainer deletes the oldest by time of change, so that a state that goes must not make its
    # checkpoint young.
    assert sort_checkpoints(str(tmp_path), use_mtime=True)[:3] == [
        str(path) for path in reversed(made)
    ]


def test_times_in_the_future_do_not_make_an_old_checkpoint_the_newest(tmp_path):
    for step in (3, 20):
        os.utime(write_checkpoint(tmp_path, step), (4e9 - step, 4e9 - step))
    assert checkpoints.set_aside_broken(tmp_path) == []
    last = write_checkpoint(tmp_path, 100)
    by_age = sort_checkpoints(
        str(tmp_path), use_mtime=True
    )  # of which the Trainer deletes the first
    assert by_age == [str(tmp_path / f"checkpoint-{step}") for step in (3, 20, 100)] and by_age[
        -1
    ] == str(last)


@pytest.mark.parametrize(
    "broken",
    ["model.safetensors", "optimizer.pt", "trainer_state.json", "scheduler.pt", "rng_state.pth"],
)
@pytest.mark.parametrize("how", ["cut in half", "missing"])
def test_a_broken_checkpoint_is_set_aside_and_the_one_before_it_is_resumed(tmp_path, broken, how):
    good, bad = write_checkpoint(tmp_path, 10), write_checkpoint(tmp_path, 20)
    file = bad / broken
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    if how == "missing":
        file.unlink()
    if how == "missing" and broken in ("scheduler.pt", "rng_state.pth"):
        pytest.skip("the Trainer goes on without")
    if (broken, how) == ("optimizer.pt", "missing"):  # whole to score, but nothing to resume from
        assert checkpoints.set_aside_broken(tmp_path) == []
    else:
        assert checkpoints.set_aside_broken(tmp_path) == [tmp_path / "broken-checkpoint-20"]
        assert checkpoints.whole_checkpoints(tmp_path) == [good]
    assert checkpoints.resumable(tmp_path) == good


def test_a_stage_runs_once_at_a_time(make_experiment, monkeypatch):
    monkeypatch.setattr(stage, "LOCK_PATIENCE_S", 0)
    experiment = make_experiment("rows.csv", ["a", "b"])
    first = StageRun(experiment, "sft", 1)
    with pytest.raises(LetterheadError, match="another process is running this stage"):
        StageRun(experiment, "sft", 1)
    del first
    StageRun(experiment, "sft", 1)


@pytest.mark.parametrize("decides", ["on_step_end", "on_epoch_end"])
def test_the_clock_leaves_out_saving_and_goes_on_after_a_resume(tmp_path, decides, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])
    file = tmp_path / "clock.json"

    def train(first: int, last: int) -> dict:
        """10 s a step, 100 s a checkpoint after each second step."""
        clock, state = worker.Clock(file), TrainerState(is_world_process_zero=True)
        state.global_step = first
        clock.on_train_begin(None, state, TrainerControl())
        for state.global_step in range(first + 1, last + 1):
            now[0] += 10
            control = TrainerControl(should_save=state.global_step % 2 == 0)
            getattr(clock, decides)(None, state, control)
            if control.should_save:
                now[0] += 100
                clock.on_save(None, state, control)
        clock.on_train_end(None, state, TrainerControl())
        return json.loads(file.read_text())["training_seconds"]

    assert train(0, 4) == {"2": 20.0, "4": 40.0}
    assert train(2, 6) == {
        "2": 20.0,
        "4": 40.0,
        "6": 60.0,
    }  # killed after step 4, resumed from step 2


def test_the_plain_loop_of_the_bench_accumulates_to_the_same_step(make_experiment):
    write_csv("rows.csv", [(f"text {i} of {'ab'[i % 2] * (i % 7)}", i % 2) for i in range(60)])
    found = []
    for batch, accumulation in [(4, 1), (2, 2)]:
        sft = dict(zip(llamafactory.STEP, (batch, accumulation), strict=True))
        sft |= {"learning_rate": 1e-3}
        keys = {"data": {"rows": {"validation": 8, "test": 8}}, "bench": {"sft_steps": 4}}
        experiment = make_experiment("rows.csv", ["a", "b"], sft=sft, **keys)
        data.main(experiment)
        found.append(plain_loop(experiment, half=False)["losses"])
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0][0] != found[0][1]


def test_sft_puts_rows_of_like_length_together_where_it_is_asked():
    values = yaml.safe_load((ROOT / "llamafactory_configs/smollm2_135m_full_sft.yaml").read_text())
    _, _, args, finetuning_args, _ = get_train_args(
        values
        | {"use_cpu": True, "report_to": "none", "train_sampling_strategy": "group_by_length"}
    )
    lengths = [8 * (i % 25 + 1) for i in range(400)]
    rows = Dataset.from_dict({"input_ids": [[1] * n for n in lengths]})
    trainer = object.__new__(CustomSeq2SeqTrainer)
    trainer.args, trainer.train_dataset, trainer.processing_class = args, rows, None
    trainer.finetuning_args = finetuning_args
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(400))
    batch = args.per_device_train_batch_size
    widths = [[lengths[i] for i in order[at : at + batch]] for at in range(0, 400, batch)]
    padded = sum(max(of) * len(of) for of in widths) / sum(lengths)
    assert padded < 1.1  # 1.8 by chance
