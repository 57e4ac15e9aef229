"""The small server: vLLM's route and reply, batches, limits, clear errors, and an end that loses
nothing."""

import asyncio
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import uvicorn

from letterhead.files import LetterheadError
from letterhead.models.classifier import CascadeClassifier, load_classifier
from letterhead.runs import results
from letterhead.runs.processes import free_port
from letterhead.serving import server
from letterhead.serving.process import ServerProcess, http_client
from letterhead.serving.vllm import classify_route
from letterhead.stats.cascade import Cascade
from prep import data
from serve import start
from tests.conftest import ROOT
from tests.test_data import write_csv
from tests.test_prompt import LABELS, nasty_rows
from train import fitted

NAMES = ("even", "odd")


def parity(texts: Sequence[str]) -> np.ndarray:
    """The more letters a text has, the surer."""
    sure = np.array([min(0.99, 0.5 + len(text) / 100) for text in texts])
    odd = np.array([len(text) % 2 for text in texts])
    return np.stack([np.where(odd, 1 - sure, sure), np.where(odd, sure, 1 - sure)], axis=1)


@contextmanager
def running(classify, **keys) -> Iterator[str]:
    """The address of a server in a thread of its own."""
    port = free_port()
    application = server.create(server.Served("mine", NAMES, classify, **keys))
    settings = {"host": server.HOST, "port": port, "log_level": "warning"}
    here = uvicorn.Server(uvicorn.Config(application, **settings))
    thread = threading.Thread(target=here.run, daemon=True)
    thread.start()
    until = time.time() + 20
    try:
        while not here.started:
            assert thread.is_alive() and time.time() < until
            time.sleep(0.01)
        yield f"http://{server.HOST}:{port}"
    finally:
        here.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


def ask(url: str, body, **more) -> httpx.Response:
    return httpx.post(f"{url}/classify", json=body, trust_env=False, timeout=60, **more)


def test_a_reply_is_read_as_vllms_and_tells_labels_and_doubt():
    texts = ["one", "twelve letters or more than that, so that it is sure", "  four "]
    with running(parity, least_sure=0.9, max_words=9) as url:
        route = classify_route()
        for text in texts:
            number, shares = route.read(ask(url, route.body(text)).json())
            (expected,) = parity([" ".join(text.split()[:9])])
            assert shares == pytest.approx(expected) and number == expected.argmax()
        reply = ask(url, {"input": texts}).json()
        assert [one["label"] for one in reply["data"]] == ["odd", "even", "even"]
        assert [one["abstain"] for one in reply["data"]] == [True, False, True]
        assert [one["index"] for one in reply["data"]] == [0, 1, 2]
        assert httpx.get(f"{url}/health").json() == {"status": "ok", "model": "mine"}
        told = httpx.get(f"{url}/metrics").text
        assert 'letterhead_requests_total{status="200"} 4.0' in told
        assert 'letterhead_texts_total{label="even"} 4.0' in told
        assert "letterhead_abstained_total 4.0" in told
        assert "letterhead_seconds_count 4.0" in told and "letterhead_waiting_texts 0.0" in told
        assert httpx.get(f"{url}/health", headers={"Host": "evil.example"}).status_code == 400
        schema = httpx.get(f"{url}/openapi.json").json()["paths"]["/classify"]["post"]
        assert set(schema["responses"]) == {"200", "4XX", "5XX"}
        page = httpx.get(f"{url}/docs").text
        assert "POST /classify" in page and not re.search(r"https?:|src=", page)
    with running(parity) as url:
        assert ask(url, {"input": "x"}).json()["data"][0]["abstain"] is None


BAD = {
    "no input": ({"inputs": "x"}, 400, "input", "Field required"),
    "a number": ({"input": 7}, 400, "input", "valid string"),
    "ids": ({"input": [1, 2]}, 400, "input[0]", "valid string"),
    "a list in a list": ({"input": ["a", ["b"]]}, 400, "input[1]", "valid string"),
    "nothing": ({"input": []}, 400, "input", "at least 1 item"),
    "an empty text": ({"input": ["a", " "]}, 400, "input[1]", "the text is empty"),
    "too many": ({"input": ["a"] * 1025}, 400, "input", "at most 1024 items"),
    "a list": (["a"], 400, "body", "dictionary"),
}


def test_bad_requests_name_the_field_and_none_is_a_failure_of_the_server():
    with running(parity) as url:
        for what, (body, status, field, said) in BAD.items():
            reply = ask(url, body)
            error = reply.json()["error"]
            assert (reply.status_code, error["field"]) == (status, field), (what, error)
            assert said in error["message"] and error["message"].startswith(field), what
        post = {"url": f"{url}/classify", "headers": {"Content-Type": "application/json"}}
        broken = httpx.post(content=b'{"input": "a', **post)
        assert broken.status_code == 400 and broken.json()["error"]["field"] == "body"
        latin = httpx.post(content='{"input": "é"}'.encode("latin-1"), **post)
        assert latin.status_code == 400 and latin.json()["error"]["field"] == "body"
        assert httpx.get(f"{url}/nothing").status_code == 404
        assert httpx.get(f"{url}/classify").status_code == 405
        assert ask(url, {"input": "fine"}).status_code == 200


def test_a_body_that_is_too_long_or_does_not_come_is_told(monkeypatch):
    monkeypatch.setattr(server, "MOST_BYTES", 10_000)
    monkeypatch.setattr(server, "BODY_S", 0.5)
    with running(parity) as url:
        for length in (20_000, 5_000_000):
            reply = ask(url, {"input": "x" * length})
            assert reply.status_code == 413 and "more than 10,000 bytes" in reply.text
        assert ask(url, {"input": "x" * 9_000}).status_code == 200
        with socket.create_connection((server.HOST, int(url.rpartition(":")[2]))) as hanging:
            hanging.sendall(
                b"POST /classify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b'Content-Length: 99\r\n\r\n{"input'
            )
            hanging.settimeout(10)
            assert hanging.recv(4096).startswith(b"HTTP/1.1 408")
        assert ask(url, {"input": "fine"}).status_code == 200


def test_what_waits_is_classified_together_within_the_budget_one_batch_at_a_time(monkeypatch):
    monkeypatch.setattr(server, "MOST_WAITING", 40)
    batches, at_once = [], threading.Semaphore(1)

    def slow(texts: Sequence[str]) -> np.ndarray:
        assert at_once.acquire(blocking=False)
        batches.append(list(texts))
        time.sleep(0.2)
        at_once.release()
        return parity(texts)

    async def go(url: str, texts: list[str]) -> list[httpx.Response]:
        async with http_client() as client:
            return await asyncio.gather(
                *(client.post(f"{url}/classify", json={"input": text}) for text in texts)
            )

    texts = [f"{'x' * 35}{i:03d}" for i in range(30)]  # of ten tokens each
    with running(slow, batch_tokens=100) as url:
        replies = asyncio.run(go(url, texts))
        for text, reply in zip(texts, replies, strict=True):
            assert reply.json()["data"][0]["probs"] == pytest.approx(parity([text])[0])
        assert sorted(text for batch in batches for text in batch) == texts
        assert max(map(len, batches)) == 10 and len(batches) <= 6
        replies = asyncio.run(go(url, texts * 3))
        codes = [reply.status_code for reply in replies]
        assert set(codes) == {200, 429} and codes.count(200) >= 40
        refused = next(reply for reply in replies if reply.status_code == 429)
        assert refused.headers["Retry-After"] == "1" and "ask again" in refused.text
        long = ask(url, {"input": ["x" * 3000, "y"]})
        assert long.status_code == 200 and batches[-1] == ["x" * 3000, "y"]


def test_a_cascade_whose_dear_half_dies_answers_what_its_cheap_half_is_sure_of():
    alive, asked = threading.Event(), []
    alive.set()

    def dear(texts: Sequence[str]) -> np.ndarray:
        asked.extend(texts)
        if not alive.is_set():
            raise LetterheadError("the service is gone")
        return np.tile([0.25, 0.75], (len(texts), 1))

    frozen = Cascade("cheap", "dear", (1.0, 1.0), 0.8, 0.0)
    sure, unsure = "x" * 40, "xx"
    with running(CascadeClassifier(frozen, parity, dear)) as url:
        reply = ask(url, {"input": [sure, unsure, unsure]}).json()["data"]
        assert [one["label"] for one in reply] == ["even", "odd", "odd"] and len(asked) == 2
        alive.clear()
        assert ask(url, {"input": sure}).status_code == 200
        refused = ask(url, {"input": [sure, unsure]})
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"
        assert "no answer now: the service is gone" in refused.json()["error"]["message"]
        alive.set()
        assert ask(url, {"input": unsure}).json()["data"][0]["label"] == "odd"
        told = httpx.get(f"{url}/metrics").text
        assert "letterhead_deferred_total 4.0" in told
        assert 'letterhead_requests_total{status="503"} 1.0' in told


def test_a_classifier_that_fails_is_told_as_json_and_the_next_request_is_answered():
    def classify(texts: Sequence[str]) -> np.ndarray:
        if "bad" in texts:
            raise ValueError("secret")
        return parity(texts)

    with running(classify) as url:
        failed = ask(url, {"input": "bad"})
        assert failed.status_code == 500 and "secret" not in failed.text
        assert failed.json()["error"]["message"] == "the server failed: ValueError"
        assert ask(url, {"input": "good"}).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
        assert 'requests_total{status="500"} 1.0' in httpx.get(f"{url}/metrics").text


def test_a_text_that_fails_fails_no_other_request_of_its_batch():
    batches = []

    def classify(texts: Sequence[str]) -> np.ndarray:
        batches.append(list(texts))
        time.sleep(0.2)
        if "bad" in texts:
            raise ValueError("no")
        return parity(texts) if "short" not in texts else parity(texts)[:0]

    async def go(url: str) -> list[int]:
        async with http_client() as client:

            async def one(text: str) -> int:
                return (await client.post(f"{url}/classify", json={"input": text})).status_code

            first = asyncio.create_task(one("first"))
            await asyncio.sleep(0.05)
            return [*await asyncio.gather(*map(one, ("a", "bad", "b", "short"))), await first]

    with running(classify) as url:
        assert asyncio.run(go(url)) == [200, 500, 200, 500, 200]
        assert sorted(batches[1]) == ["a", "b", "bad", "short"]  # and then each alone
        assert sorted(map(len, batches[2:])) == [1, 1, 1, 1]
        assert ask(url, {"input": "after"}).status_code == 200


@pytest.fixture
def experiment(make_experiment):
    write_csv("rows.csv", nasty_rows(120))
    made = make_experiment("rows.csv", LABELS, data={"rows": {"validation": 10, "test": 20}})
    data.main(made)
    fitted.main(made, "tfidf")
    return made


def test_a_server_that_is_told_to_end_under_load_answers_all_that_it_accepted(
    experiment, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    port = free_port()
    command = [sys.executable, "-m", "serve.start", "--experiment", "mine", "--set", ""]
    command += ["--model", "tfidf", "--port", str(port), "--error", ""]
    texts = [row["text"] for row in results.read_rows(experiment, "test")]
    expected = load_classifier(experiment, "tfidf")(texts)
    replies, refused = [], []

    async def client(url: str) -> None:
        async with http_client() as asking:
            for _ in range(10_000):
                try:
                    reply = await asking.post(f"{url}/classify", json={"input": texts})
                except httpx.HTTPError as error:  # nobody listens any more, or reads
                    refused.append(error)
                    return
                replies.append(reply)

    async def load(url: str, pid: int) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(client(url))
            await asyncio.sleep(2)
            subprocess.run(["pkill", "-TERM", "-P", str(pid)], check=True)

    with ServerProcess(command, port, Path("server.log"), "tfidf") as here:
        asyncio.run(load(here.url, here.pid))
        psutil.wait_procs(psutil.Process(here.pid).children(), timeout=60)
    assert len(refused) == 8 and len(replies) > 50
    for reply in replies:
        shares = [one["probs"] for one in reply.json()["data"]]
        assert np.abs(np.array(shares) - expected).max() < 1e-6
    log = Path("server.log").read_text()
    answered = f"{len(replies):,}"
    assert "tfidf is loaded" in log
    assert log.rstrip().endswith(f"ended; {answered} of {answered} requests were answered")


def test_which_methods_go_to_vllm(experiment):
    for name in ("sft@0", "linear_head@10", "sft_options@3", "folded@0"):
        assert start.is_decoder(experiment, name)
    for name in ("tfidf", "bert@10", "./a/folder"):
        assert not start.is_decoder(experiment, name)
    longer = experiment.model_copy(deep=True)
    longer.decoder.head.long_texts = "chunks"
    assert not start.is_decoder(longer, "linear_head@10") and start.is_decoder(longer, "sft@0")
    with pytest.raises(LetterheadError, match="vLLM, which serves sft@0, can't abstain"):
        start.main(experiment, "sft@0", str(free_port()), "0.05")
    with pytest.raises(LetterheadError, match="PORT=high: not a port"):
        start.main(experiment, "tfidf", "high")
