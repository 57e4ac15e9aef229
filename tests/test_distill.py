"""A teacher whose endpoint fails in every way: nothing is lost, nothing asked twice, only right
thoughts are learnt."""

import asyncio
import gc
import json
import shutil
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from eval import sft_think
from eval.score import score_model, split_prompts
from letterhead.config.models import Distill
from letterhead.files import LetterheadError, read_json, read_jsonl, sha256_file
from letterhead.models.prompt import load_prompt_encoder
from letterhead.pipeline import DATA, outputs
from letterhead.runs import results
from letterhead.runs.stage import StageRun
from letterhead.serving import endpoint as teacher
from letterhead.serving.endpoint import HostedLLM, read_reply, user_turn
from prep import data
from tests.fakes import Endpoint, completion, running
from tests.test_data import write_csv
from train import distill as teach
from train.sft import sft_rows

LABELS = ["a", "b", "c"]


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr(teacher, "WAIT_S", 0.01)
    monkeypatch.setattr(teacher, "TIMEOUT_S", 0.5)
    Endpoint.answered, Endpoint.failed, Endpoint.refuse_after, Endpoint.burning = (
        Counter(),
        Counter(),
        None,
        (),
    )
    with running(Endpoint) as address:
        yield f"{address}/v1"


@pytest.fixture
def taught(make_experiment, endpoint):
    write_csv("rows.csv", [(f"text {i} of news", LABELS[i % 3]) for i in range(30)])
    settings = {
        "endpoint": endpoint,
        "model": "big",
        "rows": 20,
        "tries": 3,
        "price_of_prompts": 2,
        "price_of_replies": 5,
    }
    sft = {"dataset": "sft_train,distilled"}
    thinking = {"thinking": {"rows": 3, "tokens": 5, "batch": 3}}
    experiment = make_experiment(
        "rows.csv", LABELS, decoder="qwen3", distill=settings, sft=sft, eval=thinking
    )
    data.main(experiment)
    return experiment


def test_an_endpoint_that_fails_in_every_way_loses_nothing_and_repeats_nothing(taught):
    Endpoint.refuse_after = 7
    with pytest.raises(
        LetterheadError,
        match=r"no whole reply in 8 attempts, the last: status 500: the machine burns",
    ):
        teach.main(taught)
    gc.collect()  # the failed run's frames hold its lock
    assert not Path("data/mine/distilled.jsonl").exists()
    (kept,) = Path("runs/mine/distill").glob("tries-*.jsonl")
    before = list(read_jsonl(kept))
    assert len(before) == sum(Endpoint.answered.values()) >= 7
    with open(kept, "a") as file:
        file.write('{"id": "cut o')  # what a kill leaves
    Endpoint.refuse_after = None
    teach.main(taught)
    tries = list(read_jsonl(kept))
    assert tries[: len(before)] == before and len(tries) == sum(Endpoint.answered.values())
    assert len({(one["id"], one["try"]) for one in tries}) == len(tries)
    asked = sum(Endpoint.answered.values())
    teach.main(taught)
    assert sum(Endpoint.answered.values()) == asked

    # Right at once, at the second try, or never; learnt is what was right, and what it cost is
    # counted.
    number = {row["id"]: int(row["text"].split()[1]) for row in teach.draw(taught)}
    assert len(number) == 20
    never = {i for i, n in number.items() if n % 10 == 1}
    wanted = {i: 3 if i in never else 2 if n % 5 == 1 else 1 for i, n in number.items()}
    assert Counter(one["id"] for one in tries) == wanted
    learnt = list(read_jsonl("data/mine/distilled.jsonl"))
    assert len(learnt) == len(number) - len(never)
    record = read_json("runs/mine/distill/stage.json")
    assert (record["rows"], record["asked"], record["tries"]) == (len(learnt), 20, len(tries))
    assert record["cost"] == pytest.approx(len(tries) * (100 * 2 + 10 * 5) / 1e6)
    assert sft_rows(taught) == len(results.read_rows(taught, "decoder_train")) + len(learnt)


def test_a_question_that_alone_fails_is_given_up_and_the_others_are_learnt(taught, monkeypatch):
    bad, *_ = [int(row["text"].split()[1]) for row in teach.draw(taught)]
    monkeypatch.setattr(Endpoint, "burning", (bad,))
    monkeypatch.setattr(Endpoint, "failures", ())
    for concurrency in (1, 4):
        changed = {"concurrency": concurrency, "tries": 1, "temperature": concurrency / 10}
        teach.main(taught.model_copy(update={"distill": taught.distill.model_copy(update=changed)}))
        record = read_json("runs/mine/distill/stage.json")
        assert (record["asked"], record["tries"], record["refused"]) == (20, 20, 1)
        assert f"text {bad} of news" not in Path("data/mine/distilled.jsonl").read_text()


def test_what_is_on_disk_is_of_the_same_text_label_and_teacher(taught, endpoint):
    teach.main(taught)
    asked = sum(Endpoint.answered.values())
    # More tries and more rows go on behind what is there.
    more = taught.distill.model_copy(update={"tries": 4, "rows": 22})
    teach.main(taught.model_copy(update={"distill": more}))
    number = {int(row["text"].split()[1]) for row in teach.draw(taught)}
    never = sum(n % 10 == 1 for n in number)
    others = {
        int(row["text"].split()[1])
        for row in teach.draw(taught.model_copy(update={"distill": more}))
    } - number
    of_others = sum(4 if n % 10 == 1 else 2 if n % 5 == 1 else 1 for n in others)
    assert len(others) == 2 and sum(Endpoint.answered.values()) == asked + never + of_others

    # A row of another text is asked, and its old thought is not learnt.
    rows = list(read_jsonl("data/mine/decoder_train.jsonl"))
    drawn = {row["id"] for row in teach.draw(taught)}
    changed = next(
        row for row in rows if row["id"] in drawn and int(row["text"].split()[1]) % 5 != 1
    )
    before = dict(Endpoint.answered)
    was, changed["text"] = changed["text"], f"text {int(changed['text'].split()[1]) + 300} of news"
    Path("data/mine/decoder_train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    data_stage, rows_file = Path("runs/mine/data/stage.json"), Path("data/mine/decoder_train.jsonl")
    record = read_json(data_stage)
    record["outputs"][str(rows_file)] |= {
        "bytes": rows_file.stat().st_size,
        "sha256": sha256_file(rows_file),
    }
    data_stage.write_text(json.dumps(record))
    teach.main(taught)
    assert sum(Endpoint.answered.values()) - sum(before.values()) == 1
    learnt = Path("data/mine/distilled.jsonl").read_text()
    assert changed["text"] in learnt and was not in learnt

    # Another endpoint is another teacher, though its model has the same name.
    asked = sum(Endpoint.answered.values())
    other = taught.distill.model_copy(
        update={"endpoint": endpoint.replace("127.0.0.1", "localhost")}
    )
    teach.main(taught.model_copy(update={"distill": other}))
    assert sum(Endpoint.answered.values()) > asked + 20


def test_what_is_learnt_is_the_thinking_prompt_and_the_thought(taught):
    teach.main(taught)
    encoder = load_prompt_encoder(taught, thinking=True)
    texts = {encoder.instruction(row["text"]): row["label"] for row in teach.draw(taught)}
    for row in read_jsonl("data/mine/distilled.jsonl"):
        assert not row["instruction"].endswith("/no_think") and teach.HOW not in row["instruction"]
        option = "ABC"["abc".index(texts[row["instruction"]])]
        assert row["output"] == f"<think>\nIt says so < |im_end|> plainly.\n</think>\n\n{option}"
    registry = read_json("data/mine/dataset_info.json")
    assert {name: entry["file_name"] for name, entry in registry.items()} == {
        "sft_train": "sft_train.jsonl",
        "sft_validation": "sft_validation.jsonl",
        "distilled": "distilled.jsonl",
    }


def test_what_was_learnt_is_measured_with_thinking(taught):
    data_made = outputs(DATA, taught)
    score_model(taught, 7, taught.decoder.folder, data_made, *split_prompts(taught))
    StageRun(taught, "sft", 0).finish([], rows=34, training_seconds=1.0)
    files = [
        file for split in results.SPLITS for file in results.result_files(taught, "sft@7", split)
    ]
    StageRun(taught, "eval-ckpts", 0).finish(files, rows=8, scoring_seconds=1.0)
    sft_think.main(taught)
    found = results.read_result(taught, "sft_think@7", "test")
    assert (found.n, found.thinking["budget_tokens"]) == (3, 5)
    assert (
        found.thinking["answered"] + found.thinking["unfinished"] + found.thinking["unparsed"] == 3
    )
    # Another seed thinks about the same rows, so that both can be averaged.
    other = taught.model_copy(update={"name": "other", "seed": 5})
    shutil.copytree("data/mine", "data/other")
    shutil.copytree("runs/mine", "runs/other")
    shutil.rmtree("runs/other/sft-think")
    sft_think.main(other)
    first, second = (results.read_predictions(of, "sft_think@7", "test") for of in (taught, other))
    assert [line["id"] for line in first] == [line["id"] for line in second]


def test_another_experiments_teacher_is_not_asked_again(taught, make_experiment):
    teach.main(taught)
    asked = sum(Endpoint.answered.values())
    settings = taught.distill.model_dump() | {"of": "mine"}
    other = taught.model_copy(update={"name": "other", "distill": Distill(**settings)})
    data.main(other)
    teach.main(other)
    assert sum(Endpoint.answered.values()) == asked
    assert (
        Path("data/other/distilled.jsonl").read_bytes()
        == Path("data/mine/distilled.jsonl").read_bytes()
    )
    with pytest.raises(LetterheadError, match="run: make distill EXP=none"):
        teach.main(
            taught.model_copy(
                update={"name": "other", "distill": Distill(**settings | {"of": "none"})}
            )
        )


@pytest.mark.parametrize(
    ("reply", "thought", "answer"),
    [
        (completion("<think>\nhm\n</think>\n\nB"), "hm", "B"),
        (completion("hm</think>B"), "hm", "B"),  # the template began the thought
        (completion("B", reasoning_content="hm"), "hm", "B"),
        (completion("B", reasoning="hm"), "hm", "B"),
        (completion("First this,\nthen that.\nB"), "First this,\nthen that.", "B"),
        (completion("It is a match. So it is Sports."), "It is a match.", "So it is Sports."),
        (completion("讲的是比赛。所以是体育。"), "讲的是比赛。", "所以是体育。"),
        (completion("讲的是比赛。\n答案：体育！！"), "讲的是比赛。", "体育！！"),
        (
            completion("A match.\n**Answer:** B. Sports\nExplanation: it is no news."),
            "A match.",
            "B. Sports",
        ),
        (
            completion("A match. The correct one is B. Sports"),
            "A match.",
            "The correct one is B. Sports",
        ),
        (completion("Answer: B. Sports"), "", "B. Sports"),
        (completion("<think>hm</think>Clear. No doubt.\nAnswer:\nB"), "hm", "B"),
        (completion("B"), "", "B"),
        (completion("<think></think>B"), "", "B"),
        ({"choices": completion("hm</think>B")["choices"]}, "hm", "B"),  # without usage
    ],
)
def test_the_thought_is_found_where_endpoints_put_it(reply, thought, answer):
    read = read_reply(reply)
    assert (*read.parts(), read.ended) == (thought, answer, True)
    assert not read_reply(completion("hm", finish="length")).ended


def test_a_refusal_is_not_asked_again_and_the_rate_is_kept(endpoint, monkeypatch):
    slept = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(teacher.asyncio, "sleep", sleep)
    monkeypatch.setattr(Endpoint, "failures", ())
    settings = Distill(endpoint=endpoint, model="big", requests_per_minute=30, concurrency=3)

    async def ask(*questions: tuple) -> list:
        return [key async for key, _ in HostedLLM(endpoint, settings).ask_all(questions)]

    assert sorted(asyncio.run(ask(*((i, user_turn(f"text {i} ."), i) for i in range(5))))) == list(
        range(5)
    )
    assert [round(seconds) for seconds in sorted(slept)] == [
        2,
        4,
        6,
        8,
    ]  # one request every two seconds
    asked = []
    monkeypatch.setattr(
        Endpoint, "do_POST", lambda self: (asked.append(1), self.send(400, b"too long"))
    )
    assert (
        asyncio.run(ask((0, user_turn("text 0 ."), 0))) == [0] and len(asked) == 1
    )  # this one is, others may not be
    garbage = {"choices": [{"message": {"content": [{"text": "B"}]}, "finish_reason": "stop"}]}
    monkeypatch.setattr(
        Endpoint, "do_POST", lambda self: self.send(200, json.dumps(garbage).encode())
    )
    with pytest.raises(LetterheadError, match="8 attempts, the last: not a completion"):
        asyncio.run(ask((0, user_turn("text 0 ."), 0)))
    slept.clear()
    asked.clear()
    monkeypatch.setattr(
        Endpoint, "do_POST", lambda self: (asked.append(1), self.send(401, b"no key"))
    )
    settings = Distill(endpoint=endpoint, model="big", concurrency=3)
    with pytest.raises(LetterheadError, match="chat/completions: status 401: no key"):
        asyncio.run(ask(*((i, user_turn(f"text {i} ."), i) for i in range(9))))
    assert not slept and len(asked) <= 3  # what was on its way, and nothing after


def test_retry_after_is_heard(endpoint, monkeypatch):
    slept, replies = [], []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def ask() -> list:
        asked = HostedLLM(endpoint, Distill(endpoint=endpoint, model="big")).ask_all(
            [(0, user_turn("text 0 ."), 0)]
        )
        return [reply.content async for _, reply in asked]

    monkeypatch.setattr(teacher.asyncio, "sleep", sleep)
    monkeypatch.setattr(Endpoint, "do_POST", lambda self: self.send(*replies.pop(0)))
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    for told, least, most in [
        ("7", 7, 7),
        ("2.5", 2.5, 2.5),
        (later, 50, 60),
        ("9999", 300, 300),
        ("soon", 0, 1),
        ("-3", 0, 1),
    ]:
        slept.clear()
        replies += [
            (429, b"slower", None, {"Retry-After": told}),
            (200, json.dumps(completion("A")).encode()),
        ]
        assert asyncio.run(ask()) == ["A"] and len(slept) == 1
        assert least <= slept[0] <= most, (told, slept)
