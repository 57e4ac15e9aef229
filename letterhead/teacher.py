"""A teacher at an OpenAI-compatible endpoint: asked once for every try, whatever the endpoint does in between.

A reply that does not come whole (time-out, 429, 5xx, a broken connection, no JSON) is asked for again, later and later; one
that came is on disk before the next is awaited.
"""

import asyncio
import os
import random
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from letterhead.experiment import Distill
from letterhead.records import LetterheadError

TIMEOUT_S = 300
ATTEMPTS = 8
WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
LONGEST_RETRY_AFTER_S = 300.0
BUSY = (408, 409, 425, 429)
# Refused is this question (too long, or not to the endpoint's taste), and others may do.
REFUSED = (400, 413, 422)
# What is asked for before the option (distill.teach.HOW); in its absence the last sentence, which "B. Sports" does not end.
MARK = re.compile(r"\**(?:answer|答案)\**\s*[:：]\**", re.IGNORECASE)
SENTENCE_GAP = re.compile(r"(?<=[.!?])(?<!\b\w[.!?])\s+|(?<=[。！？])(?!$)|\s*\n\s*")


@dataclass(frozen=True)
class Reply:
    """What a teacher wrote: its thought, the rest, whether it came to its end, and the tokens that were paid for; or why it
    refused."""

    thought: str
    answer: str
    ended: bool
    prompt_tokens: int
    reply_tokens: int
    refused: str = ""


class Teacher:
    """An endpoint, its limits kept.

    Parameters
    ----------
    settings : where it is, and how fast it may be asked
    """

    def __init__(self, settings: Distill):
        self._settings = settings
        self._url = settings.endpoint.rstrip("/") + "/chat/completions"
        self._next, self._random = 0.0, random.Random(0)

    async def ask_all(self, questions: Sequence[tuple[Any, str, int]]) -> AsyncIterator[tuple[Any, Reply]]:
        """Ask questions (a key, the text, a seed), `concurrency` at once; yields key and reply as they come.

        Raises
        ------
        LetterheadError : the endpoint refuses, or gives no whole reply ATTEMPTS times in a row
        """
        waiting, flying, failed = iter(questions), {}, None
        secret = os.environ.get(self._settings.key)
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        # A proxy leads out of this machine; a teacher on it is not there.
        here = urlsplit(self._url).hostname in ("127.0.0.1", "::1", "localhost")
        async with httpx.AsyncClient(timeout=TIMEOUT_S, headers=headers, trust_env=not here) as client:
            try:
                while True:
                    while not failed and len(flying) < self._settings.concurrency and (asked := next(waiting, None)):
                        flying[asyncio.create_task(self._ask(client, *asked[1:]))] = asked[0]
                    if not flying:
                        break
                    for task in (await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED))[0]:
                        key = flying.pop(task)
                        if task.exception():
                            failed = task.exception()  # told when what is on its way has come: it is paid for
                        else:
                            yield key, task.result()
            finally:
                for task in flying:
                    task.cancel()
                await asyncio.gather(*flying, return_exceptions=True)
        if failed:
            raise failed

    async def _ask(self, client: httpx.AsyncClient, text: str, seed: int) -> Reply:
        settings = self._settings
        body = {"model": settings.model, "messages": [{"role": "user", "content": text}], "seed": seed}
        body |= {"max_tokens": settings.tokens, "temperature": settings.temperature}
        for attempt in range(ATTEMPTS):
            await self._keep_rate()
            wait, reason = min(WAIT_S * 2**attempt, LONGEST_WAIT_S) * self._random.uniform(0.5, 1), ""
            try:
                reply = await client.post(self._url, json=body)
                if reply.status_code == 200:
                    return read_reply(reply.json())
                reason = f"status {reply.status_code}: {reply.text[:200]}"
                if reply.status_code in REFUSED:
                    return Reply("", "", False, 0, 0, reason)
                if reply.status_code < 500 and reply.status_code not in BUSY:
                    raise LetterheadError(f"{self._url}: {reason}")
                told = reply.headers.get("Retry-After", "")
                wait = max(wait, min(float(told), LONGEST_RETRY_AFTER_S)) if told.isdecimal() else wait
            except httpx.HTTPError as error:
                reason = f"{type(error).__name__} {error}"
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:  # no JSON, or not a completion's
                reason = f"not a completion ({type(error).__name__}: {error})"
            if attempt + 1 < ATTEMPTS:
                await asyncio.sleep(wait)
        raise LetterheadError(
            f"{self._url}: no whole reply in {ATTEMPTS} attempts, the last: {reason}; what came is kept, run again to go on"
        )

    async def _keep_rate(self) -> None:
        """Wait for this request's place, so that no minute sees more than `requests_per_minute`."""
        if limit := self._settings.requests_per_minute:
            now = time.monotonic()
            self._next = max(now, self._next) + 60 / limit
            if (wait := self._next - 60 / limit - now) > 0:
                await asyncio.sleep(wait)


def read_reply(reply: dict) -> Reply:
    """A completion's thought and answer: a field of their own where the endpoint has one (`reasoning_content`, or vLLM's
    `reasoning`), else what stands in <think> and </think>, else what stands before the answer."""
    choice, usage = reply["choices"][0], reply.get("usage") or {}
    message = choice["message"]
    text, thought = message["content"] or "", message.get("reasoning_content") or message.get("reasoning")
    if thought is None:
        before, closed, rest = text.rpartition("</think>")
        if closed:
            thought, text = before.partition("<think>")[2] if "<think>" in before else before, rest
    before, answer = split_answer(text)
    return Reply(
        (before if thought is None else thought).strip(),
        answer,
        choice["finish_reason"] == "stop",
        *(n if isinstance(n := usage.get(of), int) else 0 for of in ("prompt_tokens", "completion_tokens")),
    )


def split_answer(text: str) -> tuple[str, str]:
    """What a text says before its answer, and that answer: the rest of the line behind its last "Answer:", or, where that is
    missing, its last sentence."""
    text = text.strip()
    *_, mark = [None, *MARK.finditer(text)]
    *_, gap = [None, *SENTENCE_GAP.finditer(text)]
    begin, end = (mark or gap).span() if mark or gap else (0, 0)
    answer = text[end:].strip()
    return text[:begin], answer.split("\n")[0]
