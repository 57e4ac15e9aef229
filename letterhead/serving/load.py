"""Load on a service, and what it answers: closed loops (so many clients, each waits for its answer)
and open loops (requests arrive whether or not the last one is answered, as in MLPerf's server
scenario)."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from letterhead.runs.terminal import progress

# One request → the class that it is answered with.
Send = Callable[[Any], Awaitable[int]]


@dataclass
class Measured:
    """What a loop measured, one entry a request, in the order of the requests.

    latencies : seconds from the moment a request is due to its answer, so that waiting counts
    answers : class numbers
    seconds : from the first request to the last answer
    """

    latencies: np.ndarray
    answers: np.ndarray
    seconds: float

    def figures(self) -> dict[str, float]:
        """Requests per second, and percentiles of the latency in ms."""
        p50, p95, p99 = np.percentile(self.latencies * 1000, (50, 95, 99), method="lower").tolist()
        rps = len(self.latencies) / self.seconds
        return {
            "rps": rps,
            "p50_ms": p50,
            "p95_ms": p95,
            "p99_ms": p99,
            "requests": len(self.latencies),
        }


def closed_loop_of_batches(
    answer: Callable[[list], list[int]], requests: Sequence, concurrency: int, title: str
) -> Measured:
    """A closed loop on one worker that answers all that wait at once, up to `concurrency` requests.

    The clients get their answers together and ask again together, so the worker always finds them
    all: batches of `concurrency`, one after the other.
    """
    latencies, answers, begin = [], [], time.perf_counter()
    with progress(total=len(requests), desc=title, unit=" requests", mininterval=0.5) as bar:
        for at in range(0, len(requests), concurrency):
            batch, start = requests[at : at + concurrency], time.perf_counter()
            answers += answer(batch)
            latencies += [time.perf_counter() - start] * len(batch)
            bar.update(len(batch))
    return Measured(np.array(latencies), np.array(answers), time.perf_counter() - begin)


async def closed_loop(send: Send, requests: Sequence, concurrency: int, title: str) -> Measured:
    """So many clients, each of which sends its next request when its last is answered."""
    answers: list = [None] * len(requests)
    waiting = iter(range(len(requests)))
    begin = time.perf_counter()

    async def client(bar: tqdm) -> None:
        for i in waiting:
            start = time.perf_counter()
            answer = await send(requests[i])
            answers[i] = (time.perf_counter() - start, answer)
            bar.update()

    with progress(total=len(requests), desc=title, unit=" requests", mininterval=0.5) as bar:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(client(bar))
    return _measured(answers, time.perf_counter() - begin)


async def open_loop(
    send: Send, requests: Sequence, rate: float, objective_s: float, seed: int, title: str
) -> tuple[Measured, bool]:
    """Requests that arrive as a Poisson process, `rate` a second: is the 99th percentile within the
    objective?

    Once more than one request in a hundred has missed it nothing can mend that, and the loop is
    broken off.

    Returns
    -------
    tuple : what was measured (until the loop was broken off), and whether the objective was held
    """
    due = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, len(requests)))
    answers: list = [None] * len(requests)
    missed, held, begin = 0, True, time.perf_counter()

    async def one(i: int, bar: tqdm) -> None:
        nonlocal missed
        answer = await send(requests[i])
        answers[i] = (time.perf_counter() - begin - due[i], answer)
        bar.update()
        missed += answers[i][0] > objective_s
        if missed > len(requests) // 100:
            raise _Missed

    with progress(total=len(requests), desc=title, unit=" requests", mininterval=0.5) as bar:
        try:
            async with asyncio.TaskGroup() as group:
                for i in range(len(requests)):
                    await asyncio.sleep(max(0.0, due[i] - (time.perf_counter() - begin)))
                    group.create_task(one(i, bar))
        except* _Missed:
            held = False
    return _measured([entry for entry in answers if entry], time.perf_counter() - begin), held


class _Missed(Exception):
    """Too many requests have missed the objective."""


def _measured(answers: list[tuple], seconds: float) -> Measured:
    latencies, answers = zip(*answers, strict=True)
    return Measured(np.array(latencies), np.array(answers), seconds)
