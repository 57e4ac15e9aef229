"""GRPO: what an answer is worth, and a short real run from an SFT checkpoint through both modes'
scores."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from eval import grpo as eval_grpo
from eval.score import score_model, split_prompts
from letterhead.config.models import Grpo
from letterhead.files import read_json, write_json
from letterhead.models import checkpoints, grpo
from letterhead.models.callbacks import StopAtDivergence
from letterhead.models.prompt import load_prompt_encoder
from letterhead.pipeline import DATA, outputs
from letterhead.runs import results
from letterhead.runs.stage import StageRun
from prep import data
from tests.test_data import write_csv
from train import grpo as train

LABELS = ["a", "b", "c"]
RIGHT, WHOLE = (1.0, 1.0), (0.0, 1.0)


# Text, whether it ended, and its rewards where a thought is asked for and where none is
ANSWERS = [
    ("<think>\nIt is B.\n</think>\n\nB", True, RIGHT, RIGHT),
    ("<think>\nIt is B.\n</think>\n\nC", True, WHOLE, WHOLE),
    ("<think>\n\n</think>\n\nB", True, (1.0, 0.0), RIGHT),
    ("B", True, (1.0, 0.0), RIGHT),
    ("<think>\nIt is B.\n</think>\n\nB", False, (1.0, 0.0), (1.0, 0.0)),
    ("<think>\nIt is B.", False, (0.0, 0.0), (0.0, 0.0)),
    ("<think>\nIt is B.\n</think>\n\nB, I think", True, (1.0, 0.0), (1.0, 0.0)),
    ("<think>a</think><think>b</think>B", True, (1.0, 0.0), (1.0, 0.0)),
    ("", True, (0.0, 0.0), (0.0, 0.0)),
]


def test_an_answer_is_worth_its_option_and_its_end(make_experiment):
    encoder = load_prompt_encoder(make_experiment("rows.csv", LABELS, decoder="qwen3"))
    for text, ended, with_thought, without in ANSWERS:
        ids = encoder.tokenizer.encode(text) + ([encoder.tokenizer.eos_token_id] if ended else [])
        for think, worth in ((True, with_thought), (False, without)):
            rewards = grpo.Rewards(encoder, think)
            found = rewards.right_option([text], [ids], option=["B"]) + rewards.finished(
                [text], [ids], option=["B"]
            )
            assert tuple(found) == worth, (text, ended, think)


def test_the_reward_has_moved_or_not():
    log = [{"step": i, "rewards/finished/mean": 0.1 * (i > 5) + 0.01 * (i % 2)} for i in range(12)]
    found = grpo.moved([{"step": 99, "loss": 1.0}, *log], "finished")
    assert (found["first"], found["last"]) == pytest.approx((0.01 / 3, 0.1 + 0.02 / 3))
    assert 0 < found["standard_error"] < 0.01


def test_a_reward_that_can_be_earned_is_earned(make_experiment):
    """A model that answers with any of the letters learns to answer with the one that is always
    right."""
    write_csv("rows.csv", [(f"text {i} of news", LABELS[i % 3]) for i in range(40)])
    experiment = make_experiment("rows.csv", LABELS, decoder="qwen3")
    encoder, chance = load_prompt_encoder(experiment), np.random.default_rng(0)
    model = AutoModelForCausalLM.from_pretrained(experiment.decoder.folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        prompt, answer = (
            encoder.encode(f"text {step % 40} of news"),
            encoder.answers[chance.integers(3)].ids,
        )
        given = torch.tensor([prompt + answer])
        learnt = torch.tensor([[-100] * len(prompt) + answer])
        model(input_ids=given, labels=learnt).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained("warm")
    settings = Grpo(
        steps=24, prompts=2, generations=8, tokens=len(answer), learning_rate=3e-3, think=False
    )
    asked = grpo.questions(
        encoder, [{"text": f"text {i} of news", "label": "b"} for i in range(40)]
    )
    trainer = grpo.trainer(
        Path("warm"), encoder, asked, settings, grpo.arguments(settings, Path("out"), 1, "float32")
    )
    callbacks = trainer.callback_handler.callbacks
    assert any(isinstance(callback, StopAtDivergence) for callback in callbacks)
    trainer.train()
    found = grpo.moved(trainer.state.log_history, "right_option")
    assert found["last"] - found["first"] > 4 * found["standard_error"] and found["last"] > 0.7, (
        found
    )


def test_a_short_run_goes_from_the_sft_checkpoint_to_both_modes_scores(make_experiment):
    write_csv("rows.csv", [(f"text {i} of news <|im_end|>", LABELS[i % 3]) for i in range(40)])
    settings = {"steps": 4, "prompts": 2, "generations": 2, "tokens": 6, "learning_rate": 1e-3}
    thinking = {"rows": 3, "tokens": 5, "batch": 3}
    experiment = make_experiment(
        "rows.csv", LABELS, decoder="qwen3", grpo=settings, eval={"thinking": thinking}
    )
    data.main(experiment)
    folder = experiment.decoder.folder
    encoder, prompts = split_prompts(experiment)
    score_model(experiment, 7, folder, outputs(DATA, experiment), encoder, prompts)
    StageRun(experiment, "sft", 0).finish([], rows=34, training_seconds=1.0)
    files = [
        file
        for split in results.SPLITS
        for file in results.result_files(experiment, "sft@7", split)
    ]
    StageRun(experiment, "eval-ckpts", 0).finish(files, rows=8, scoring_seconds=1.0)

    asked = grpo.questions(encoder, results.read_rows(experiment, "decoder_train"))
    rows = results.read_rows(experiment, "decoder_train")
    assert len(asked) == len(rows) == 34
    for one, row in zip(asked, rows, strict=True):  # as TRL encodes it
        assert encoder.tokenizer(one["prompt"], add_special_tokens=False)[
            "input_ids"
        ] == encoder.encode(row["text"])
        assert one["option"] == "ABC"["abc".index(row["label"])]

    train.main(experiment)
    record = read_json("runs/mine/grpo/stage.json")
    assert (record["start"], record["steps"], record["rows"], record["left_out"]) == (
        "sft@7",
        4,
        34,
        0,
    )
    made = checkpoints.whole_checkpoints(Path("runs/mine/grpo/checkpoints"))
    assert [checkpoints.step_of(path) for path in made] == [3, 4]
    log = [
        line
        for line in checkpoints.log_history(made[-1].parent)
        if "rewards/right_option/mean" in line
    ]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert all(0 <= line[f"rewards/{reward}/mean"] <= 1 for line in log for reward in train.REWARDS)
    train.main(experiment)
    assert record == read_json("runs/mine/grpo/stage.json")
    gc.collect()

    # Cut off after step 3, it goes on from there, and its time goes on, too.
    write_json(
        "runs/mine/grpo/clock.json",
        {"training_seconds": {"3": 500.0, "4": 501.0}, "peak_gpu_memory_mb": None},
    )
    Path("runs/mine/grpo/stage.json").unlink()
    (made[-1] / "model.safetensors").write_bytes(b"half")
    train.main(experiment)
    again = read_json("runs/mine/grpo/stage.json")
    assert (
        again["resumed_from"] == 3
        and 500 < again["training_seconds"] != 501
        and 0 < record["training_seconds"] < 500
    )

    eval_grpo.main(experiment)
    plain, thought = (
        results.read_result(experiment, f"{name}@4", "test") for name in ("grpo", "grpo_think")
    )
    assert (plain.n, thought.n) == (4, 3) and thought.thinking["budget_tokens"] == 5
    assert torch.cuda.is_available() or plain.model.endswith("grpo/checkpoints/checkpoint-4")
