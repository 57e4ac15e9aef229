"""A hosted LLM whose service fails in every way: no row is asked twice, what it says is read, and
what it costs is counted."""

import csv
import gc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from eval import cascade
from eval import endpoint as ask
from letterhead import pipeline
from letterhead.files import LetterheadError, read_json, read_jsonl
from letterhead.models.prompt import load_prompt_encoder
from letterhead.pipeline import HOSTED_LLM, TFIDF
from letterhead.runs import contenders, results
from letterhead.serving import endpoint as service
from letterhead.serving.endpoint import Reply
from letterhead.serving.hosted import read
from letterhead.stats.cascade import Cascade
from letterhead.stats.metrics import NO_ANSWER
from prep import data
from serve import predict
from tests.fakes import LetterEndpoint, running
from tests.test_data import write_csv
from train import fitted

LABELS = ["a", "b", "c"]


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setattr(service, "WAIT_S", 0.01)
    monkeypatch.setattr(service, "TIMEOUT_S", 0.5)
    LetterEndpoint.answered, LetterEndpoint.failed = Counter(), Counter()
    LetterEndpoint.refuse_after, LetterEndpoint.asked = None, []
    with running(LetterEndpoint) as url:
        yield f"{url}/v1"


@pytest.fixture
def make(make_experiment, address):
    def make(total: int = 90, validation: int = 20, **keys):
        write_csv("rows.csv", [(f"text {i} of news", LABELS[i % 3]) for i in range(total)])
        settings = {"url": address, "model": "big", "price_of_prompts": 2, "price_of_replies": 5}
        experiment = make_experiment(
            "rows.csv",
            LABELS,
            data={"rows": {"validation": validation, "test": 30}},
            endpoint=settings | keys,
        )
        data.main(experiment)
        return experiment

    return make


def number_of(row: dict) -> int:
    return int(row["text"].split()[1])


def test_a_service_that_fails_in_every_way_is_asked_about_no_row_twice(make):
    experiment = make()
    LetterEndpoint.refuse_after = 31
    with pytest.raises(LetterheadError, match=r"no whole reply in 8 attempts.*run again to go on"):
        ask.main(experiment)
    gc.collect()  # the failed run's frames hold its lock
    assert not results.result_files(experiment, "endpoint", "test")[0].exists()
    (kept,) = Path("runs/mine/endpoint").glob("replies-*.jsonl")
    before = list(read_jsonl(kept))
    assert len(before) == sum(LetterEndpoint.answered.values()) >= 31
    with open(kept, "a") as file:
        file.write('{"id": "cut o')  # what a kill leaves
    LetterEndpoint.refuse_after = None
    ask.main(experiment)
    lines = list(read_jsonl(kept))
    assert lines[: len(before)] == before
    # 30 test rows twice, 20 validation rows once
    assert len(lines) == sum(LetterEndpoint.answered.values()) == 80
    asked = len(LetterEndpoint.asked)
    ask.main(experiment)
    assert len(LetterEndpoint.asked) == asked

    result = results.read_result(experiment, "endpoint", "test")
    rows = results.read_rows(experiment, "test")
    wrong = sum(number_of(row) % 10 == 0 for row in rows)
    assert result.accuracy == pytest.approx(1 - wrong / 30)
    told = result.hosted
    assert (told["prompt_tokens"], told["reply_tokens"]) == (3000, 300)
    assert told["cost"] == pytest.approx((3000 * 2 + 300 * 5) / 1e6)
    assert told["cost_per_million"] == pytest.approx(1e6 * told["cost"] / 30)
    assert told["asked_again"] == 30
    assert told["answered_otherwise"] == sum(number_of(row) % 7 == 0 for row in rows) > 0


def test_probabilities_come_from_the_first_token_and_without_them_the_text_is_read(make):
    experiment = make()
    ask.main(experiment)
    # "A" and " A" are one answer; options that are not among the likeliest are the least of them
    shares = np.array([np.exp(-0.2) + np.exp(-2.5), np.exp(-3.0), np.exp(-3.0)])
    shares /= shares.sum()
    for line in results.read_predictions(experiment, "endpoint", "test"):
        assert sorted(line["probabilities"].values()) == pytest.approx(sorted(shares))
    without = make(logprobs=False)
    ask.main(without)
    result = results.read_result(without, "endpoint", "test")
    assert result.log_loss is None and result.ece is None
    assert not any("logprobs" in body for body in LetterEndpoint.asked[80:])
    assert result.accuracy > 0.7


@pytest.mark.parametrize("choose", ["random", "nearest"])
def test_examples_are_training_rows_asked_and_answered_before_the_question(make, choose):
    experiment = make(examples=2, choose=choose, rows=5)
    ask.main(experiment)
    train = {row["text"]: row["label"] for row in results.read_rows(experiment, "decoder_train")}
    assert len(LetterEndpoint.asked) == 15 and LetterEndpoint.asked[0]["temperature"] == 0
    for body in LetterEndpoint.asked:
        turns = body["messages"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2 + ["user"]
        for question, answer in zip(turns[:-1:2], turns[1::2], strict=True):
            text = next(line for line in question["content"].splitlines() if "of news" in line)
            assert answer["content"] == "ABC"[LABELS.index(train[text])]
        assert "/no_think" not in turns[-1]["content"]
    assert results.read_result(experiment, "endpoint", "test").n == 5


def test_a_service_that_refuses_every_question_is_told_with_its_words(make, monkeypatch):
    experiment = make()
    monkeypatch.setattr(LetterEndpoint, "do_POST", lambda self: self.send(400, b"no logprobs here"))
    with pytest.raises(LetterheadError, match=r"refuses every question: status 400: no logprobs"):
        ask.main(experiment)
    assert read_json("runs/mine/endpoint/stage.json") is None


def test_a_refused_row_is_no_answer_and_is_asked_again_by_the_next_run(make, monkeypatch):
    monkeypatch.setattr(LetterEndpoint, "failures", ())
    experiment = make()
    refused = results.read_rows(experiment, "test")[0]
    answered = LetterEndpoint.do_POST
    is_open = []

    def post(self):
        if is_open:
            return answered(self)
        body = self.rfile.peek(int(self.headers["Content-Length"]))
        if f"{refused['text']}\\n".encode() in body:
            return self.send(400, b"not that")
        return answered(self)

    monkeypatch.setattr(LetterEndpoint, "do_POST", post)
    ask.main(experiment)
    first = results.read_predictions(experiment, "endpoint", "test")[0]
    assert first["prediction"] is None and set(first["probabilities"].values()) == {1 / 3}
    assert results.read_result(experiment, "endpoint", "test").hosted["refused"] == 1
    is_open.append(True)
    Path("runs/mine/endpoint/stage.json").unlink()
    asked = len(LetterEndpoint.asked)
    ask.main(experiment)
    assert len(LetterEndpoint.asked) - asked == 2  # it, and it again
    assert results.read_predictions(experiment, "endpoint", "test")[0]["prediction"] is not None


@pytest.mark.parametrize(
    ("content", "first", "option"),
    [
        ("B", {"B": -0.1, "A": -3.0}, 1),
        ("The best option is B", {"The": -0.1, "A": -5.0, "B": -6.0}, 1),
        ("A or B", {"It": -0.1, "A": -2.0}, NO_ANSWER),
    ],
)
def test_log_probabilities_count_where_the_reply_begins_with_an_option(
    make, content, first, option
):
    encoder = load_prompt_encoder(make())
    found, shares = read(Reply(content, None, True, 1, 1, first=first), encoder)
    assert found == option and (shares is not None) == (content == "B")


def test_more_examples_than_training_rows_are_refused(make):
    with pytest.raises(
        LetterheadError, match="endpoint.examples asks for 99 rows, but train holds"
    ):
        ask.main(make(examples=99))


@pytest.mark.parametrize(
    ("logprobs", "price_of_error", "share"), [(True, None, 0.0), (False, 0.01, 0.025)]
)
def test_it_is_the_dear_half_of_a_cascade_which_predict_asks_for_the_rows_that_go_to_it(
    make, monkeypatch, logprobs, price_of_error, share
):
    monkeypatch.setattr(LetterEndpoint, "failures", ())
    keys = {"logprobs": logprobs, "price_of_error": price_of_error}
    experiment = make(total=240, validation=100, **keys)
    for module in (cascade, pipeline):
        monkeypatch.setattr(module, "cascade_members", lambda _: [TFIDF, HOSTED_LLM])
    fitted.main(experiment, "tfidf")
    ask.main(experiment)
    cascade.main(experiment)
    [frozen] = read_json(pipeline.cascades_file(experiment))["cascade:endpoint"]
    lines = results.read_predictions(experiment, "endpoint", "validation")
    hits = sum(line["label"] == line["prediction"] for line in lines)
    assert (frozen["cheap"], frozen["dear"]) == ("tfidf", "endpoint")
    # Each question has 100 tokens at 2 a million, its reply 10 at 5.
    assert frozen["threshold"] == pytest.approx((hits + 1) / 102 - share)
    asked = len(LetterEndpoint.asked)
    LetterEndpoint.answered.clear()
    rows = results.read_rows(experiment, "test")
    write_csv("in.csv", [(row["text"], "") for row in rows])
    predict.main(experiment, "in.csv", "out.csv", "cascade:endpoint")
    expected = results.read_predictions(experiment, "cascade:endpoint", "test")
    with open("out.csv", encoding="utf-8", newline="") as file:
        found = [line["prediction"] for line in csv.DictReader(file)]
    assert found == [line["prediction"] for line in expected]
    deferred = results.read_result(experiment, "cascade:endpoint", "test").halves["deferred"]
    assert len(LetterEndpoint.asked) - asked == deferred > 0


def test_without_an_answer_the_cheap_halfs_stays_and_predict_leaves_the_row_empty(
    make, monkeypatch
):
    shares = contenders.as_probabilities(np.array([1, NO_ANSWER]), 3, 0.9)
    assert shares[0] == pytest.approx([0.05, 0.9, 0.05]) and not shares[1].any()
    frozen = Cascade("cheap", "dear", (1.0, 1.0), 0.99, 0.0)
    cheap = np.array([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [1.0, 0.0, 0.0]])
    deferred = frozen.is_deferred(cheap)
    assert deferred.tolist() == [True, True, False]
    both = frozen.combine(cheap, shares, deferred)
    assert both.argmax(axis=1).tolist() == [1, 0, 0] and both[1] == pytest.approx(cheap[1])

    monkeypatch.setattr(LetterEndpoint, "failures", ())
    experiment = make(logprobs=False)
    reply = {"choices": [{"message": {"content": "Hm."}, "finish_reason": "stop"}]}
    monkeypatch.setattr(LetterEndpoint, "answer", lambda *_: reply)
    write_csv("in.csv", [("text 1 of news", "")])
    predict.main(experiment, "in.csv", "out.csv", "endpoint")
    assert Path("out.csv").read_text().splitlines()[1] == "text 1 of news,,,,,"
