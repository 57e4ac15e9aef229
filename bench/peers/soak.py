"""A service under load and abuse for minutes: are all answers right, is memory flat, are errors
clear, does it end clean?

    python -m bench.peers.soak --experiment quick --model bert

Closed loops and requests that come by chance ask test rows, whose answers the fresh server gave one
by one; beside them clients hang, leave, send garbage and bodies of 10 MB. runs/EXPERIMENT/soak/
takes soak.json and soak.png.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import torch
from tqdm import tqdm

from bench.contenders import Row, asked_of_vllm, draw, model_length
from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, write_json
from letterhead.models.classifier import asks_a_service, named_method
from letterhead.models.precision import precision
from letterhead.pipeline import LINEAR_HEAD, SFT, find_method, method_of
from letterhead.runs.devices import device_name, machine
from letterhead.runs.processes import free_port
from letterhead.runs.stage import StageRun, run
from letterhead.runs.terminal import progress
from letterhead.serving import vllm as service
from letterhead.serving.process import Route, ServerProcess, http_client
from letterhead.stats.figures import caption_of, plt, save

ROWS, CLIENTS, SHARE = (
    64,
    4,
    0.25,
)  # of a single stream's rate come by chance beside the closed loops
EVERY_S = 5.0  # memory is read
BIG = 10_000_000
HANGING_S, PATIENCE_S, ENDING_S = 10.0, 60.0, 20.0
GROWN = 1.05  # from the first quarter's memory to the last's is called growth
# Probabilities of a text that is asked again may differ by so much, for another batch: in bfloat16,
# whose numbers have 8 bits, logits of 2 to 4 lie 2**-6 apart.
NEAR = {"float32": 1e-3, "bfloat16": 1e-2}
ODD = ("text", -1, None, [[]], 1e30, {"a": 1})
# So long does each kind of client pause before it comes again
PAUSES = {
    "hangs": 1.0,
    "leaves": 0.5,
    "garbage": 0.5,
    "no JSON": 0.5,
    "wrong types": 0.5,
    "10 MB": 20.0,
}

TOLD = ("garbage", "no JSON", "wrong types", "10 MB")  # are to hear what is wrong
RIGHT, WRONG, FAILED = "right", "wrong", "failed"


@dataclass
class Tally:
    """What a soak saw. `answered` holds (seconds since the start, latency in seconds, RIGHT, WRONG
    or FAILED); `memory` (seconds since the start, MiB, open files, threads); `replies` counts what
    kinds of bad clients got, `said` has one reply of each, in words."""

    answered: list[tuple[float, float, str]] = field(default_factory=list)
    memory: list[tuple[float, float, int, int]] = field(default_factory=list)
    replies: Counter = field(default_factory=Counter)
    said: dict[str, str] = field(default_factory=dict)


def main(experiment: Experiment, source: str, overrides: str, model: str) -> None:
    name = named_method(experiment, model)
    stage = StageRun(experiment, "soak", None)
    log = stage.folder / "server.log"
    texts = [row["text"] for row in draw(experiment, ROWS, 0)]
    in_vllm = runs_in_vllm(experiment, name)
    at_work, route, requests = (
        by_vllm(experiment, name, texts, log)
        if in_vllm
        else by_small_server(source, overrides, name, texts, log)
    )
    with at_work as server:
        family = psutil.Process(server.pid).children(recursive=True)
        tally = asyncio.run(
            soak(
                server.url,
                route,
                requests,
                experiment.bench.soak_seconds,
                lambda: held(server.pid),
                near=NEAR[dtype_of(experiment, name, in_vllm)],
            )
        )
    left = [process.pid for process in psutil.wait_procs(family, timeout=ENDING_S)[1]]
    record = figures(tally) | {
        "name": name,
        "left_running": left,
        "device": device_name(),
        "machine": machine(),
    }
    record |= {"seconds": experiment.bench.soak_seconds, "vllm": service.vllm_version()}
    path, picture = stage.folder / "soak.json", stage.folder / "soak.png"
    write_json(path, record)
    draw_picture(picture, caption_of(experiment), tally)
    stage.finish([path, picture], rows=record["requests"])
    print(f"{sentence(record)}\n{path}, {picture.name} beside it", flush=True)
    if faults := faults_of(record):
        raise LetterheadError(f"{name}: {'; '.join(faults)}; see {path} and {log}")


def runs_in_vllm(experiment: Experiment, name: str) -> bool:
    """Whether a method is soaked in vLLM.

    Raises
    ------
    LetterheadError : vLLM serves it in a way that is not soaked, or it asks a hosted LLM
    """
    if asks_a_service(experiment, name):
        raise LetterheadError(f"{name}: asks a hosted LLM, which is paid by the token")
    method = find_method(name)
    if method and method.runner and method not in (SFT, LINEAR_HEAD):
        raise LetterheadError(f"{name}: choose MODEL=sft, linear_head, or a method that is no LLM")
    return bool(method and method.runner)


def dtype_of(experiment: Experiment, name: str, in_vllm: bool) -> str:
    """What a method computes in: bfloat16 where a part of it may. vLLM on a CPU and what is fitted
    compute in float32."""
    if in_vllm and not torch.cuda.is_available():
        return "float32"
    method = find_method(name)
    if method and method.fitter:
        return "float32"
    sections = [experiment.decoder, experiment.encoder]
    if method and method.model:
        sections = [method.section(experiment)]
    dtypes = {precision(experiment.decoder.dtype, section.folder) for section in sections}
    return min(dtypes)  # "bfloat16" comes before "float32"


def by_vllm(
    experiment: Experiment, name: str, texts: Sequence[str], log: Path
) -> tuple[ServerProcess, Route, list]:
    """A server, the route that is asked, and what it is asked about each text.

    Raises
    ------
    LetterheadError : SFT on names, of which one token says nothing
    """
    method = method_of(name)
    if method is SFT and experiment.prompt.options == "names":
        raise LetterheadError(
            f"{name}: vLLM is asked for one token, and the options are names; choose another method"
        )
    service.prepare_environment()
    row = Row(method.name, "vllm", "one_token" if method is SFT else "head")
    folder, route, encode = asked_of_vllm(experiment, row, name)
    server = service.VllmServer(
        folder,
        method.runner,
        model_length(experiment, row),
        log,
        dtype=precision(experiment.decoder.dtype, folder),
        gpu_memory=experiment.serve.gpu_memory_utilization,
    )
    return server, route, [encode(text) for text in texts]


def by_small_server(
    source: str, overrides: str, name: str, texts: Sequence[str], log: Path
) -> tuple[ServerProcess, Route, list]:
    """The same of the server that a method without an LLM has.

    Parameters
    ----------
    source, overrides : what names the experiment
    """
    port = free_port()
    command = [sys.executable, "-m", "serve.start", "--experiment", source, "--set", overrides]
    command += ["--model", name, "--port", str(port)]
    return ServerProcess(command, port, log, name), service.classify_route(), list(texts)


def held(pid: int) -> tuple[float, int, int]:
    """What a process's children hold: MiB of resident memory (shared pages count in each), open
    files, threads."""
    megabytes = files = threads = 0
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error, OSError):
            megabytes += process.memory_info().rss / 2**20
            files, threads = files + process.num_fds(), threads + process.num_threads()
    return megabytes, files, threads


async def soak(
    url: str,
    route: Route,
    requests: Sequence[list[int]],
    seconds: float,
    memory: Callable[[], tuple[float, int, int]],
    near: float,
    seed: int = 0,
) -> Tally:
    """Load and abuse a service for so long.

    Parameters
    ----------
    requests : token ids; each is asked once alone first, and that answer is the right one from then
        on
    memory : gives MiB, open files, threads of the service
    near : a probability may differ by so much from the first answer's
    """
    tally, chance = Tally(), np.random.default_rng(seed)
    async with http_client() as client:

        async def answer(i: int) -> np.ndarray:
            reply = await client.post(url + route.path, json=route.body(requests[i]))
            reply.raise_for_status()
            return np.array(route.read(reply.json())[1])

        begin = time.perf_counter()
        right = [await answer(i) for i in range(len(requests))]
        rate = SHARE * len(requests) / (time.perf_counter() - begin)
        begin = time.perf_counter()

        def passed() -> float:
            return time.perf_counter() - begin

        async def one(i: int) -> None:
            start = passed()
            try:
                found = RIGHT if np.abs(await answer(i) - right[i]).max() < near else WRONG
            except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:
                found = FAILED
                tally.said.setdefault(f"good request: {type(error).__name__}", str(error)[:300])
                await asyncio.sleep(1)
            tally.answered.append((passed(), passed() - start, found))

        async def closed() -> None:
            while passed() < seconds:
                await one(int(chance.integers(len(requests))))

        async def by_chance(group: asyncio.TaskGroup) -> None:
            while passed() < seconds:
                await asyncio.sleep(chance.exponential(1 / rate))
                group.create_task(one(int(chance.integers(len(requests)))))

        async def bad(kind: str) -> None:
            while passed() < seconds:
                got = await misbehave(kind, url, route, requests[0], chance)
                tally.replies[f"{kind}: {got.partition(' ')[0]}"] += 1
                tally.said.setdefault(f"{kind}: {got.partition(' ')[0]}", got[:300])
                await asyncio.sleep(PAUSES[kind])

        async def watch(bar: tqdm) -> None:
            while passed() < seconds:
                tally.memory.append((passed(), *memory()))
                await asyncio.sleep(min(EVERY_S, seconds / 20))
                bar.update(min(round(passed()), round(seconds)) - bar.n)

        with progress(total=round(seconds), desc="soak", unit=" s") as bar:
            async with asyncio.TaskGroup() as group:
                for task in [closed() for _ in range(CLIENTS)] + [bad(kind) for kind in PAUSES]:
                    group.create_task(task)
                group.create_task(by_chance(group))
                group.create_task(watch(bar))
    return tally


async def misbehave(
    kind: str, url: str, route: Route, ids: list[int], chance: np.random.Generator
) -> str:
    """Be a bad client once; gives what the service replied: a status and its text, `closed`,
    `nothing`, or `left`."""
    body = json.dumps(route.body(ids)).encode()
    if kind == "no JSON":
        body = bytes(chance.integers(256, size=300, dtype=np.uint8))
    elif kind == "wrong types":
        odd = ODD[chance.integers(len(ODD))]
        body = json.dumps(
            {**route.body(ids), **dict.fromkeys(("max_tokens", "input", "prompt"), odd)}
        ).encode()
    elif kind == "10 MB":
        text = "word " * (BIG // 5)
        body = json.dumps(route.body([7] * (BIG // 3) if chance.random() < 0.5 else text)).encode()
    head = (
        f"POST {route.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: "
        f"application/json\r\n"
    )
    sent = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    if kind == "hangs":
        sent = sent[: len(head) + 10]
    elif kind == "garbage":
        # A server may skip empty lines before a request and wait on: the garbage begins with a
        # letter.
        sent = b"g" + bytes(chance.integers(256, size=500, dtype=np.uint8)) + b"\r\n\r\n"
    at = urlsplit(url)
    try:
        async with asyncio.timeout(HANGING_S if kind == "hangs" else PATIENCE_S):
            reader, writer = await asyncio.open_connection(at.hostname, at.port)
            try:
                writer.write(sent)
                if kind == "leaves":
                    await asyncio.sleep(chance.uniform(0, 0.2))
                    return "left"
                await writer.drain()
                reply = await reader.read()
            finally:
                writer.close()
    except TimeoutError:
        return "nothing"
    except OSError:
        return "closed"
    status, _, text = reply.decode(errors="replace").partition("\r\n\r\n")
    return f"{status.split(' ')[1]} {text}" if status.startswith("HTTP/") else "closed"


def figures(tally: Tally) -> dict:
    """Answers, how many were wrong or failed, latencies and memory of the first and the last
    quarter, and what bad clients got.

    Raises
    ------
    LetterheadError : nothing was answered in one of the two
    """
    at, latency, found = (np.array(column) for column in zip(*tally.answered, strict=True))
    when, megabytes, files, threads = (
        np.array(column) for column in zip(*tally.memory, strict=True)
    )
    end = when.max()
    first, last = (lambda moment: moment < end / 4), (lambda moment: moment > end * 3 / 4)
    if not (first(at).any() and last(at).any()):
        raise LetterheadError(
            f"the service answered nothing in a quarter of the time; {tally.said}"
        )
    return {
        "requests": len(at),
        "wrong": int((found == WRONG).sum()),
        "failed": int((found == FAILED).sum()),
        "p50_ms": [float(np.median(1000 * latency[part(at)])) for part in (first, last)],
        "p99_ms": [float(np.percentile(1000 * latency[part(at)], 99)) for part in (first, last)],
        "memory_mib": [float(np.median(megabytes[part(when)])) for part in (first, last)],
        "open_files": [int(np.median(files[part(when)])) for part in (first, last)],
        "threads": [int(np.median(threads[part(when)])) for part in (first, last)],
        "bad_clients": dict(sorted(tally.replies.items())),
        "said": tally.said,
    }


def faults_of(record: dict) -> list[str]:
    """What a soak must not show, in words; none where all is well."""
    before, after = record["memory_mib"]
    got = {client: client.partition(": ")[::2] for client in record["bad_clients"]}
    crashed = [client for client, (_, reply) in got.items() if reply.startswith("5")]
    silent = [
        client
        for client, (kind, reply) in got.items()
        if kind in TOLD and reply in ("closed", "nothing")
    ]
    faults = {
        f"{record['wrong']} answers are wrong": record["wrong"],
        f"{record['failed']} good requests failed": record["failed"],
        f"memory grew from {before:.0f} to {after:.0f} MiB": after > GROWN * before,
        f"bad clients were told that the server failed ({', '.join(crashed)})": crashed,
        f"bad clients were told nothing ({', '.join(silent)})": silent,
        f"{len(record['left_running'])} processes stayed behind": record["left_running"],
    }
    return [fault for fault, found in faults.items() if found]


def sentence(record: dict) -> str:
    """The soak in a few lines."""
    counts = ", ".join(f"{client} {n}" for client, n in record["bad_clients"].items())
    memory, p99, files = (
        "{:.0f} and {:.0f}".format(*record[name]) for name in ("memory_mib", "p99_ms", "open_files")
    )
    return (
        f"{record['name']}, {record['seconds']} s: {record['requests']:,} requests, "
        f"{record['wrong']} answered wrongly, "
        f"{record['failed']} failed; in the first and the last quarter {memory} MiB, "
        f"p99 {p99} ms, {files} open files\n"
        f"bad clients: {counts}\nprocesses left: {len(record['left_running'])}"
    )


def draw_picture(path: Path, caption: str, tally: Tally) -> None:
    """Memory and latency against time."""
    figure, (above, below) = plt.subplots(2, figsize=(7, 5), layout="constrained", sharex=True)
    when, megabytes, *_ = zip(*tally.memory, strict=True)
    above.plot(np.array(when) / 60, megabytes)
    above.set(
        ylabel="memory of the service (MiB)",
        ylim=(0, None),
        title="A service under load and bad clients",
    )
    at, latency, found = (np.array(column) for column in zip(*tally.answered, strict=True))
    for kind, marker in ((RIGHT, "."), (WRONG, "x"), (FAILED, "+")):
        here = found == kind
        below.plot(
            at[here] / 60,
            1000 * latency[here],
            marker,
            markersize=2 if kind == RIGHT else 6,
            label=f"{kind} ({here.sum()})",
        )
    below.set(xlabel="minutes", ylabel="latency (ms)", yscale="log")
    below.legend()
    save(figure, path, caption)


if __name__ == "__main__":
    run(
        main,
        __doc__.splitlines()[0],
        options={"model": "a method, or METHOD@STEP"},
        with_arguments=True,
    )
