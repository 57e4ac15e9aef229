"""Zero-shot: what an answer is read as, the thinking prompt, calibration, and going on after a
kill."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import rank, zero_shot
from eval.score import split_prompts
from letterhead.config.experiment import load_experiment
from letterhead.files import LetterheadError, read_json, read_jsonl
from letterhead.models.answers import read_answer
from letterhead.models.prompt import draw_examples, load_prompt_encoder, load_scoring_encoder
from letterhead.models.scoring import load_decoder
from letterhead.runs import results
from letterhead.stats.metrics import NO_ANSWER
from prep import data
from tests.conftest import ROOT
from tests.test_data import write_csv
from tests.test_prompt import LABELS, nasty_rows

LETTERS = ["A", "B", "C", "D"]
NAMES = ["World", "Sports", "Science/Technology", "World Business"]


@pytest.mark.parametrize(
    ("text", "ended", "options", "expected"),
    [
        ("<think>\nIt is about A or D.\n</think>\n\nC. Business", True, LETTERS, (2, "answered")),
        ("<think>\nhm\n</think>\n\nC", False, LETTERS, (2, "answered")),
        ("<think>\nIt could be A, or B", False, LETTERS, (NO_ANSWER, "unfinished")),
        ("<think>\nI stop here. B", True, LETTERS, (NO_ANSWER, "unfinished")),
        ("<think></think>\nBusiness", True, LETTERS, (NO_ANSWER, "unparsed")),
        ("<think></think>\nABCD, DAB and Business; (D)", True, LETTERS, (3, "answered")),
        ("The answer is B.", True, LETTERS, (1, "answered")),  # a model that does not think
        ("The answer is B.", False, LETTERS, (NO_ANSWER, "unfinished")),
        ("", True, LETTERS, (NO_ANSWER, "unparsed")),
        ("<think>Sports</think> it is WORLD business, not World", True, NAMES, (3, "answered")),
        ("<think></think> science/technology", True, NAMES, (2, "answered")),
        ("<think></think> Worldwide", True, NAMES, (NO_ANSWER, "unparsed")),
        ("<think></think>答案是C。", True, LETTERS, (2, "answered")),
        ("<think></think>这是体育新闻", True, ["科技", "体育"], (1, "answered")),
    ],
)
def test_the_option_is_read_behind_the_thought(text, ended, options, expected):
    assert read_answer(text, ended, options) == expected


@pytest.mark.parametrize("enable", [True, False])
def test_the_thinking_prompt_is_the_prompt_without_no_think_and_without_a_think_block(
    make_experiment, enable
):
    experiment = make_experiment(
        "rows.csv", LABELS, decoder="qwen3", sft={"enable_thinking": enable}
    )
    encoder = load_prompt_encoder(experiment, thinking=True)
    text = encoder.tokenizer.decode(
        encoder.encode("Shares fell."), clean_up_tokenization_spaces=False
    )
    plain = load_prompt_encoder(experiment).instruction("Shares fell.")
    assert plain.endswith("/no_think")  # as Qwen3's chat template writes a turn:
    assert (
        text
        == f"<|im_start|>user\n{plain.removesuffix('/no_think')}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_examples_that_do_not_fit_are_cut_and_counted_before_anything_is_trained(
    make_experiment, capsys
):
    write_csv("rows.csv", [(f"{i} " + f"word{i} " * 200, LABELS[i % 4]) for i in range(60)])
    experiment = make_experiment("rows.csv", LABELS, eval={"examples": 3})
    data.main(experiment)
    said = capsys.readouterr().out
    assert (
        "eval.examples: 3 of 3 examples and 4 of 4 test texts are cut so that a prompt "
        "has at most 512 tokens" in said
    )
    encoder = load_scoring_encoder(experiment)
    for text in ("short", "long " * 4000):
        assert len(encoder.encode(text)) + max(len(answer.ids) for answer in encoder.answers) <= 512
    assert len(encoder.encode("long " * 4000)) > 460
    with pytest.raises(
        LetterheadError,
        match="eval.examples: 40 examples leave . tokens for each text .*ask for fewer",
    ):
        data.main(load_experiment("mine", "eval.examples=40"))


def test_examples_are_dealt_from_the_training_rows(make_experiment):
    write_csv("rows.csv", nasty_rows(60))
    keys = {"examples": 7, "option_order": "rotated"}
    experiment = make_experiment(
        "rows.csv", LABELS, eval=keys, sft={"cutoff_len": 4096}, data={"max_words": 30}
    )
    data.main(experiment)
    drawn = draw_examples(experiment)
    train = [(row["text"], row["label"]) for row in results.read_rows(experiment, "decoder_train")]
    assert set(drawn) <= set(train) and len(set(drawn)) == 7
    first, second = [label for _, label in drawn[:5]], [label for _, label in drawn[5:]]
    assert set(first) == set(LABELS) and first != LABELS and len(set(second)) == 2
    other = load_experiment("mine", "seed=7")
    assert draw_examples(experiment) == drawn != draw_examples(other)
    encoder, prompts = split_prompts(experiment)
    rows, ids = prompts("test")
    user = encoder.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert all(one.count(user) == 2 * 8 for one in ids) and len(rows) == len(ids) == 4
    assert "A. Sports" in encoder.tokenizer.decode(ids[0])
    with pytest.raises(LetterheadError, match="eval.examples asks for 70 rows, but train holds 54"):
        draw_examples(load_experiment("mine", "eval.examples=70"))


def test_training_rows_are_ranked_by_the_margin_of_the_right_option(make_experiment):
    write_csv("rows.csv", nasty_rows(40))
    experiment = make_experiment(
        "rows.csv", LABELS, prompt={"options": "names"}, data={"max_words": 30}
    )
    data.main(experiment)
    rank.main(experiment)
    ranked = {line["id"]: line["margin"] for line in read_jsonl("runs/mine/rank/margins.jsonl")}
    rows, encoder = results.read_rows(experiment, "train"), load_prompt_encoder(experiment)
    assert set(ranked) == {row["id"] for row in rows}
    decoder = load_decoder(experiment.decoder.folder, "float32")
    for row in rows[:5]:
        found = []
        for answer in encoder.answers:  # plainly, one option at a time
            ids = encoder.encode(row["text"]) + answer.ids
            begin = len(ids) - len(answer.ids) + answer.start
            end = (
                len(ids) - len(answer.ids) + answer.stop + 1
            )  # names are scored with the end of the turn
            given = torch.tensor([ids])
            log = decoder(given).logits[0].detach().log_softmax(-1)
            found.append(float(log[range(begin - 1, end - 1), given[0, begin:end]].sum()))
        own = found.pop(LABELS.index(row["label"]))
        assert ranked[row["id"]] == pytest.approx(own - max(found), abs=1e-3)


def timeless(name: str, split: str = "test") -> tuple:
    result = read_json(f"runs/mine/results/{name}{'' if split == 'test' else '.' + split}.json")
    thought = {
        key: value
        for key, value in (result["thinking"] or {}).items()
        if key != "times_one_forward"
    }
    timed = ("seconds", "rows_per_second", "thinking")
    return {key: value for key, value in result.items() if key not in timed}, thought


def test_the_rows_and_a_run_cut_off_while_it_thinks(make_experiment, monkeypatch):
    write_csv("rows.csv", nasty_rows(80))
    keys = {"rows": {"validation": 10, "test": 20}}
    settings = {"rows": 7, "tokens": 6, "batch": 3}
    experiment = make_experiment("rows.csv", LABELS, data=keys, eval={"thinking": settings})
    data.main(experiment)
    zero_shot.main(experiment)
    names = ("zero_shot_no_think", "zero_shot_calibrated", "zero_shot_think")
    whole = {name: timeless(name) for name in names}
    test = results.read_rows(experiment, "test")
    assert whole["zero_shot_think"][0]["n"] == 7 and whole["zero_shot_think"][0]["ece"] is None
    assert (
        sum(whole["zero_shot_think"][1][kind] for kind in ("answered", "unfinished", "unparsed"))
        == 7
    )
    assert timeless("zero_shot_no_think", "validation")[0]["n"] == 10

    # sft@0 and zero_shot_no_think are one computation.
    lines = results.read_predictions(experiment, "zero_shot_no_think", "test")
    assert lines == results.read_predictions(experiment, "sft@0", "test") and [
        line["id"] for line in lines
    ] == [row["id"] for row in test]
    # Calibrated: each option's score minus its score after a text without content.
    from letterhead.models.scoring import load_decoder, score_options

    encoder = load_prompt_encoder(experiment)
    empty = score_options(
        load_decoder(experiment.decoder.folder, "float32"),
        [encoder.encode("N/A")],
        encoder.answers,
        False,
        512,
    )
    score = np.array(
        [[-np.log(line["perplexity"][label]) for label in LABELS] for line in lines]
    ) + np.log(empty.perplexity)
    expected = np.exp(score) / np.exp(score).sum(1, keepdims=True)
    calibrated = results.read_predictions(experiment, "zero_shot_calibrated", "test")
    found = np.array([[line["probabilities"][label] for label in LABELS] for line in calibrated])
    assert np.abs(found - expected).max() < 1e-9

    # Cut off in the second batch, run again: the same answers.
    (answers,) = Path("runs/mine/zero-shot").glob("answers-*.jsonl")
    lines = answers.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    texts = [answer["text"] for line in lines for answer in json.loads(line)]
    assert len(set(texts)) > 1
    answers.write_bytes(lines[0] + lines[1][: len(lines[1]) // 2])
    Path("runs/mine/zero-shot/stage.json").unlink()
    zero_shot.main(experiment)
    assert {name: timeless(name) for name in names} == whole
    assert [
        answer["text"] for line in answers.read_bytes().splitlines() for answer in json.loads(line)
    ] == texts

    # In two processes, and in batches of another size behind a kill: what is done stays, and NPROC
    # decides nothing.
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    answers.unlink()
    Path("runs/mine/zero-shot/stage.json").unlink()
    zero_shot.main(experiment)
    assert {name: timeless(name) for name in names} == whole
    answers.write_bytes(lines[0])
    Path("runs/mine/zero-shot/stage.json").unlink()
    zero_shot.main(load_experiment("mine", "eval.thinking.batch=2"))
    kept = [json.loads(line) for line in answers.read_bytes().splitlines()]
    assert kept[0] == json.loads(lines[0]) and sum(map(len, kept)) == 7
