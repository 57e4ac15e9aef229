"""Service: vLLM answers as the scorer does, its failures are told clearly, and nothing that was
started stays behind."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch

from bench import contenders as rows
from bench import rps
from bench.peers import soak as bench_soak
from eval import thinking, zero_shot
from letterhead.config.experiment import load_experiment
from letterhead.files import LetterheadError, write_json
from letterhead.models import folding
from letterhead.models.prompt import Answer, load_prompt_encoder
from letterhead.models.scoring import load_decoder, score_options
from letterhead.pipeline import METHODS
from letterhead.runs import processes, results
from letterhead.serving import load
from letterhead.serving import vllm as service
from letterhead.serving.process import Route, http_client
from letterhead.stats.metrics import NO_ANSWER
from prep import data
from report import build
from tests.conftest import ROOT
from tests.fakes import Stub, running
from tests.test_data import write_csv
from tests.test_prompt import LABELS, nasty_rows

SERVED_ROWS = 16
needs_vllm = pytest.mark.skipif(
    not (ROOT / ".venv-serve").exists(), reason="no serving environment: make setup-serve"
)


@pytest.fixture
def served(make_experiment, fetched, monkeypatch):
    """The real SmolLM2 as an experiment's decoder, and where vLLM lies."""
    monkeypatch.setattr(service, "ENVIRONMENT", ROOT / ".venv-serve")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write_csv("rows.csv", nasty_rows(120))
    experiment = make_experiment(
        "rows.csv",
        LABELS,
        decoder_folder=fetched["smollm2"],
        data={"rows": {"validation": 10, "test": 20}},
    )
    data.main(experiment)
    return experiment


def ask_all(server: service.VllmServer, route: Route, prompts: list[list[int]]) -> list:
    async def go() -> list:
        async with http_client() as client:
            return await asyncio.gather(*(server.ask(client, route, ids) for ids in prompts))

    return asyncio.run(go())


def processes_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def gone(processes: list[psutil.Process], patience_s: float = 20) -> bool:
    return not psutil.wait_procs(processes, timeout=patience_s)[1]


@needs_vllm
def test_vllm_answers_as_the_scorer_does_and_outlives_its_clients(served):
    encoder, model = load_prompt_encoder(served), load_decoder(served.decoder.folder, "float32")
    texts = [text for text, _ in nasty_rows(SERVED_ROWS)]
    scores = score_options(
        model, [encoder.encode(text) for text in texts], encoder.answers, False, 2048
    )
    ids = [encoder.encode_before_option(text) for text in texts]
    with service.VllmServer(served.decoder.folder, "generate", 512, Path("vllm.log")) as server:
        started = processes_of(server.pid)
        told = ask_all(server, service.one_token_route(encoder.answers), ids)
        assert [answer for answer, _ in told] == scores.log_likelihood.argmax(1).tolist()
        assert np.abs(np.array([p for _, p in told]) - scores.probabilities("mean")).max() < 1e-4

        before = server.phases()
        asked = [encoder.encode(text) for text in texts[:4]]
        answers = ask_all(server, service.generate_route(encoder.answers), asked)
        assert all(
            answer == NO_ANSWER and p is None for answer, p in answers
        )  # SmolLM2 was not taught the answer
        # Take what HF's generate writes for an answer that was taught: vLLM must write the same
        # ids, and they are read.
        model.generation_config.eos_token_id = None
        made = model.generate(torch.tensor([asked[0]]), max_new_tokens=40, do_sample=False)[
            0, len(asked[0]) :
        ].tolist()
        end = next(
            i for i in range(3, 40) if made[i] not in made[:i]
        )  # the end token must not come before its place
        taught = [
            Answer([*made[: end - 1], 0, made[end]], end - 1, end),
            Answer(made[: end + 1], end - 1, end),
        ]
        assert ask_all(server, service.generate_route(taught), asked[:1]) == [(1, None)]
        assert all(server.phases()[phase] > before[phase] for phase in service.PHASES)

        # More prompts with a seed at once than a batch has tokens for; none may be cut in two.
        sampled = service.sampled_route(1, [], {"temperature": 1.0, "seed": 1})
        assert all(ask_all(server, sampled, [(ids[0] * 10)[:500]] * 6))

        long = {"model": service.NAME, "prompt": ids[0], "max_tokens": 300, "ignore_eos": True}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=long, timeout=0.5)
        again = ask_all(server, service.one_token_route(encoder.answers), ids[:1])
        assert again[0][0] == told[0][0]
        with pytest.raises(LetterheadError, match="status 400"):
            ask_all(server, service.text_route(4), [ids[0] * 10])
        with pytest.raises(LetterheadError, match=f"port {server.port} of 127.0.0.1 is taken"):
            service.VllmServer(
                served.decoder.folder, "generate", 512, Path("other.log"), port=server.port
            )

        for process in started:
            process.kill()
        with pytest.raises(LetterheadError, match="vLLM ended .*vllm.log says"):
            ask_all(server, service.one_token_route(encoder.answers), ids)
    assert gone(started)


@needs_vllm
def test_vllm_classifies_with_the_folded_model_as_the_scorer_does(served):
    folder, _ = folding.export_folded(served, "sft@0")
    encoder, model = load_prompt_encoder(served), load_decoder(served.decoder.folder, "float32")
    texts = [text for text, _ in nasty_rows(SERVED_ROWS)]
    scores = score_options(
        model, [encoder.encode(text) for text in texts], encoder.answers, False, 2048
    )
    with service.VllmServer(folder, "pooling", 512, Path("vllm.log")) as server:
        started = processes_of(server.pid)
        told = ask_all(
            server, service.classify_route(), [encoder.encode_before_option(text) for text in texts]
        )
    assert gone(started)
    assert [answer for answer, _ in told] == scores.log_likelihood.argmax(1).tolist()
    assert np.abs(np.array([p for _, p in told]) - scores.probabilities("sum")).max() < 1e-4


@pytest.mark.slow
@needs_vllm
def test_thoughts_that_vllm_generates_go_on_row_by_row_behind_a_kill(served, monkeypatch):
    """The route of a GPU, on the CPU's vLLM: `engine` decides, and is patched."""
    monkeypatch.setattr(thinking, "engine", lambda: "vllm")
    experiment = load_experiment("mine", "eval.thinking.rows=6 eval.thinking.tokens=10")
    zero_shot.main(experiment)
    result = results.read_result(experiment, "zero_shot_think", "test")
    assert result.n == 6 and result.thinking["engine"] == "vllm" and result.seconds > 0
    (path,) = Path("runs/mine/zero-shot").glob("answers-*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    whole = {answer["id"]: answer["text"] for line in lines for answer in json.loads(line)}
    assert len(lines) == len(whole) == 6 and len(set(whole.values())) > 1

    path.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    Path("runs/mine/zero-shot/stage.json").unlink()
    asked = []
    monkeypatch.setattr(
        thinking, "_ask", lambda *given, ask=thinking._ask: asked.append(given[3]) or ask(*given)
    )
    zero_shot.main(experiment)
    assert len(asked[0]) == 3  # the missing rows alone
    again = {
        answer["id"]: answer["text"]
        for line in path.read_bytes().splitlines()
        for answer in json.loads(line)
    }
    assert again == whole


@needs_vllm
def test_a_model_that_vllm_cannot_serve_is_told_from_one_that_does_not_fit(served, tiny_models):
    with (
        pytest.raises(
            LetterheadError, match=r"(?s)vLLM ended \(exit code \d+\) on .*max_model_len"
        ),
        service.VllmServer(served.decoder.folder, "generate", 10_000_000, Path("vllm.log")),
    ):
        pass
    write_json(
        "strange/config.json", {"architectures": ["StrangeForCausalLM"], "model_type": "llama"}
    )
    with (
        pytest.raises(
            service.NotSupported,
            match=r"strange: vLLM says: Model architectures \['StrangeForCausalLM'\]",
        ),
        service.VllmServer(Path("strange"), "generate", 64, Path("vllm.log")),
    ):
        pass


def test_without_a_serving_environment_the_error_names_the_target(workplace):
    with pytest.raises(LetterheadError, match="no serving environment; run: make setup-serve"):
        service.VllmServer(Path("model"), "generate", 64, Path("vllm.log"))


@pytest.mark.parametrize("whom", ["parent", "guard"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_guarded_command_dies_with_its_parent_and_with_its_guard(tmp_path, how, whom):
    # Parent → guard → command → the command's own children.
    command = (
        f"import subprocess; subprocess.Popen(['sleep', '600']); "
        f"open({str(tmp_path / 'up')!r}, 'w'); input()"
    )
    if (
        whom == "guard" and how == signal.SIGKILL
    ):  # nobody is left to kill the group: the command must look after its own
        command = f"open({str(tmp_path / 'up')!r}, 'w'); input()"
    parent = (
        "import subprocess, sys; from letterhead.runs.processes import guarded; "
        f"subprocess.Popen(guarded([sys.executable, '-c', {command!r}]), "
        f"stdin=subprocess.PIPE).wait()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", parent], env=environment, preexec_fn=listen_to_signals
    )
    while not (tmp_path / "up").exists():
        time.sleep(0.05)
    started = processes_of(process.pid)
    guard = psutil.Process(process.pid).children()[0]
    assert len(started) >= 2
    (process if whom == "parent" else guard).send_signal(how)
    assert process.wait(20) is not None
    assert gone(started)


def listen_to_signals() -> None:
    """As a terminal starts a process: one that is started in the background inherits that signals
    are ignored."""
    for how in (signal.SIGINT, signal.SIGHUP):
        signal.signal(how, signal.SIG_DFL)


def test_a_guard_whose_parent_is_gone_already_starts_nothing_that_stays():
    command = [
        sys.executable,
        "-m",
        "letterhead.runs.processes",
        "1",
        "sleep",
        "600",
    ]  # as if an ancestor had taken it in
    assert subprocess.run(command, cwd=ROOT, timeout=20).returncode != 0


def test_answers_are_read_by_their_token_ids():
    answers = [Answer([7, 8, 30, 2, 9], 2, 3), Answer([7, 8, 31, 2, 9], 2, 3)]
    route = service.generate_route(answers)
    assert route.body([5])["max_tokens"] == 4 and route.body([5])["stop_token_ids"] == [2]

    def generated(ids: list[int]) -> int:
        return route.read({"choices": [{"token_ids": ids}]})[0]

    assert [generated([7, 8, 31, 2]), generated([7, 8, 30, 2])] == [1, 0]
    assert generated([7, 8, 31]) == generated([8, 31, 2]) == generated([]) == NO_ANSWER
    told = {
        "choices": [
            {
                "logprobs": {
                    "top_logprobs": [{"token_id:31": -1.0, "token_id:30": -3.0, "token_id:4": 0.0}]
                }
            }
        ]
    }
    answer, probabilities = service.one_token_route(answers).read(told)
    assert answer == 1 and probabilities == pytest.approx(
        torch.tensor([-3.0, -1.0]).softmax(0).tolist()
    )


def test_closed_loops_keep_so_many_requests_in_flight():
    flying, most = 0, 0

    async def send(request: int) -> int:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0.01)
        flying -= 1
        return request * 2

    measured = asyncio.run(load.closed_loop(send, range(40), 4, "test"))
    assert most == 4 and measured.answers.tolist() == [2 * i for i in range(40)]
    figures = measured.figures()
    assert figures["requests"] == 40 and figures["p50_ms"] >= 10 and figures["rps"] <= 400
    batches = []

    def answer(batch: list[int]) -> list[int]:
        batches.append(len(batch))
        return list(batch)

    measured = load.closed_loop_of_batches(answer, list(range(10)), 4, "test")
    assert batches == [4, 4, 2] and measured.answers.tolist() == list(range(10))


def test_open_loops_count_the_wait_and_break_off_when_the_objective_is_missed():
    async def loop(rate: float, objective_s: float) -> tuple[load.Measured, bool]:
        worker = asyncio.Semaphore(1)

        async def send(request: int) -> int:
            async with worker:  # one at a time, 10 ms each: 100 a second at most
                await asyncio.sleep(0.01)
            return request

        return await load.open_loop(send, range(200), rate, objective_s, 1, "test")

    slow, held = asyncio.run(loop(30, 0.5))
    assert held and slow.answers.tolist() == list(range(200))
    assert slow.seconds == pytest.approx(
        200 / 30, rel=0.35
    )  # Poisson arrivals: 6.7 s, standard deviation 7 %
    fast, held = asyncio.run(loop(400, 0.3))
    assert not held and len(fast.answers) < 200
    assert (fast.latencies > 0.3).sum() == 3  # 1 % of 200 may miss it, the third breaks it off


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_soaks_answers_may_differ_by_what_the_method_computes_in(
    make_experiment, monkeypatch, dtype
):
    monkeypatch.setattr(bench_soak.torch.cuda, "is_available", lambda: False)
    write_csv("rows.csv", [("a", "x"), ("b", "y")] * 20)
    made = make_experiment("rows.csv", ["x", "y"], decoder_keys={"dtype": dtype})
    computed = {
        name: bench_soak.dtype_of(made, name, in_vllm=in_vllm)
        for name, in_vllm in (
            ("tfidf", False),
            ("embedding", False),
            ("bert", False),
            ("cascade:bert", False),
            ("runs/other/export", False),
            ("linear_head", True),
        )
    }
    fitted = {"tfidf": "float32", "embedding": "float32", "linear_head": "float32"}
    assert computed == dict.fromkeys(computed, dtype) | fitted


@pytest.mark.parametrize("wrong_every", [0, 20])
def test_a_soak_counts_wrong_answers_and_what_bad_clients_got(monkeypatch, tmp_path, wrong_every):
    monkeypatch.setattr(Stub, "wrong_every", wrong_every)
    monkeypatch.setattr(Stub, "numbers", itertools.count(1))
    monkeypatch.setattr(bench_soak, "PAUSES", dict.fromkeys(bench_soak.PAUSES, 0.1))
    monkeypatch.setattr(bench_soak, "HANGING_S", 0.5)
    requests = [[i, 5] for i in range(12)]
    with running(Stub) as url:
        tally = asyncio.run(
            bench_soak.soak(
                url, service.classify_route(), requests, 3.0, lambda: (100.0, 10, 4), 1e-3
            )
        )
    found = bench_soak.figures(tally)
    assert found["requests"] > 10 and found["memory_mib"] == [100.0, 100.0]
    # A bad client that leaves takes one of the wrong answers now and then.
    most = next(Stub.numbers) // wrong_every if wrong_every else 0
    assert min(1, most) <= found["wrong"] <= most and found["failed"] == 0, found
    assert {of.partition(":")[0] for of in found["bad_clients"]} == set(bench_soak.PAUSES)
    assert found["bad_clients"]["hangs: nothing"] > 1
    assert found["bad_clients"]["no JSON: 400"] > 1 and found["bad_clients"]["leaves: left"] > 1
    bench_soak.draw_picture(tmp_path / "soak.png", "a test", tally)
    record = found | {"name": "stub", "seconds": 3, "left_running": []}
    assert bench_soak.faults_of(record) == (
        [f"{found['wrong']} answers are wrong"] if wrong_every else []
    )
    grown = {
        "memory_mib": [100.0, 120.0],
        "bad_clients": {"garbage: 500": 1, "no JSON: closed": 2},
        "left_running": [7],
    }
    assert len(bench_soak.faults_of(record | grown)) == 4 + bool(wrong_every)
    told = bench_soak.sentence(record)
    assert f"{found['wrong']} answered wrongly" in told and "processes left: 0" in told


def test_every_row_of_the_bench_has_a_place_and_a_title():
    measured = rps.rows_of(METHODS.values())
    assert {row.method for row in measured} >= {"tfidf", "embedding", "bert", "sft"}
    assert all(build.served(vars(row)) for row in measured)


def test_a_bench_row_is_measured_once_on_texts_that_never_come_twice(make_experiment, monkeypatch):
    write_csv("rows.csv", nasty_rows(120))
    bench = {"requests": 10, "concurrency": [4, 1], "open_requests": 0}
    experiment = make_experiment(
        "rows.csv", LABELS, data={"rows": {"validation": 10, "test": 20}}, bench=bench
    )
    data.main(experiment)
    assert [clients for clients, _ in rows.loops(experiment)] == [1, 4]
    for clients, drawn in rows.loops(experiment):
        assert len(drawn) == {1: 10, 4: 12}[clients] and {row["split"] for row in drawn} == {"test"}
        assert len({row["text"] for row in drawn}) == len(drawn)
    many = rows.draw(experiment, 1000, 3)
    assert len({row["text"] for row in many}) == len(many) == 120
    assert [row["split"] for row in many] == ["test"] * 20 + ["validation"] * 10 + ["train"] * 90

    measured = (rows.Row("sft", "hf", "forward"), rows.Row("sft", "hf", "generate"))
    done, skipped = rows.measure_rows(experiment, measured, {"sft": "sft@0"}, Path("bench"))
    assert not skipped and [row["decode"] for row in done] == ["forward", "generate"]
    forward, generate = done
    assert (
        forward["closed"].keys() == {"1", "4"}
        and forward["requests"] == 10
        and forward["accuracy_requests"] == 22
    )
    assert forward["p50_ms"] <= forward["p95_ms"] <= forward["p99_ms"] and forward["rps_single"] > 0
    encoder, model = (
        load_prompt_encoder(experiment),
        load_decoder(experiment.decoder.folder, "float32"),
    )
    asked = [row for _, drawn in rows.loops(experiment) for row in drawn]
    scores = score_options(
        model, [encoder.encode(r["text"]) for r in asked], encoder.answers, False, 2048
    ).log_likelihood
    right = [LABELS[i] == row["label"] for i, row in zip(scores.argmax(1), asked, strict=True)]
    assert forward["accuracy"] == pytest.approx(np.mean(right)) and forward["unread_answers"] == 0
    assert (
        generate["unread_answers"] == 22 and generate["accuracy"] == 0
    )  # random weights never write the answer
    assert generate["prefill_ms"] > 0 and generate["decode_ms"] > 0

    monkeypatch.setattr(rows, "measure", lambda *_: pytest.fail("measured again"))
    assert rows.measure_rows(experiment, measured, {"sft": "sft@0"}, Path("bench")) == (done, [])


def test_options_of_several_tokens_are_left_out_with_the_reason(make_experiment):
    write_csv("rows.csv", nasty_rows(120))
    keys = {"rows": {"validation": 10, "test": 20}}
    experiment = make_experiment("rows.csv", LABELS, data=keys, prompt={"options": "names"})
    for row in (rows.Row("sft", "vllm", "one_token"), rows.Row("sft_folded", "vllm", "head")):
        assert (
            "names of several tokens"
            in rows.measure(experiment, row, "sft@0", Path("bench"))["why"]
        )


def test_a_process_that_is_killed_is_an_error_that_says_so():
    with pytest.raises(
        LetterheadError, match="kill_myself: its process was killed, most likely for want of memory"
    ):
        processes.call_in_a_process(kill_myself)


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
