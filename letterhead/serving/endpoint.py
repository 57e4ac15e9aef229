"""An LLM at an OpenAI-compatible endpoint: asked once for every question, whatever the endpoint
does in between.

A reply that does not come whole (time-out, 429, 5xx, a broken connection, no JSON) is asked for
again, later and later; one that came is on disk before the next is awaited. A question that alone
gets none, while others do, is given up.
"""

import asyncio
import os
import random
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    RetryError,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
)

from letterhead.config.models import Hosted
from letterhead.files import LetterheadError

TIMEOUT_S = 300
ATTEMPTS = 8
WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
LONGEST_RETRY_AFTER_S = 300.0
BUSY = (408, 409, 425, 429)
# Refused is this question (too long, or not to the endpoint's taste), and others may do.
REFUSED = (400, 413, 422)
# What is asked for before the option (distill.teach.HOW); in its absence the last sentence, which
# "B. Sports" does not end.
MARK = re.compile(r"\**(?:answer|答案)\**\s*[:：]\**", re.IGNORECASE)
SENTENCE_GAP = re.compile(r"(?<=[.!?])(?<!\b\w[.!?])\s+|(?<=[。！？])(?!$)|\s*\n\s*")


class NoReply(LetterheadError):
    """A question got no whole reply."""


class TryAgain(Exception):
    """An attempt got no whole reply; the endpoint may say in how many seconds to try again."""

    def __init__(self, reason: str, seconds: float = 0.0):
        super().__init__(reason)
        self.seconds = seconds


@dataclass(frozen=True)
class Reply:
    """What an LLM wrote, as it came: the text, the field for its reasoning where the endpoint has
    one, whether it came to its end, and the tokens that were paid for (None: not told); or why
    there is no answer. `first` holds the likeliest first tokens with their log-probabilities, where
    they were asked for."""

    content: str
    reasoning: str | None
    ended: bool
    prompt_tokens: int | None
    reply_tokens: int | None
    refused: str = ""
    first: dict[str, float] | None = None

    def parts(self) -> tuple[str, str]:
        """Thought and answer: the thought is in its own field, else in <think> and </think>, else
        before the answer."""
        text, thought = self.content, self.reasoning
        if thought is None:
            before, closed, rest = text.rpartition("</think>")
            if closed:
                thought, text = (
                    before.partition("<think>")[2] if "<think>" in before else before,
                    rest,
                )
        before, answer = split_answer(text)
        return (before if thought is None else thought).strip(), answer


class HostedLLM:
    """An LLM at an endpoint, its limits kept.

    Parameters
    ----------
    url : of the service, up to /v1
    settings : which model, and how fast it may be asked
    asked : what each request says besides model, messages and seed
    """

    def __init__(self, url: str, settings: Hosted, **asked: Any):
        self._settings, self._asked = settings, asked
        self._url = url.rstrip("/") + "/chat/completions"
        self._next = 0.0

    async def ask_all(
        self, questions: Sequence[tuple[Any, list[dict[str, str]], int]]
    ) -> AsyncIterator[tuple[Any, Reply]]:
        """Ask questions (a key, the messages, a seed), `concurrency` at once; yields key and reply
        as they come.

        A question that got no whole reply in ATTEMPTS attempts is held back until another is
        answered, which tells that it is the question's fault.

        Raises
        ------
        LetterheadError : the endpoint refuses, or answers no question any more
        """
        waiting, flying, failed = iter(questions), {}, None
        unanswered: dict[Any, NoReply] = {}
        any_answered = False
        secret = os.environ.get(self._settings.key)
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        # A proxy leads out of this machine; a service on it is not there.
        here = urlsplit(self._url).hostname in ("127.0.0.1", "::1", "localhost")
        async with httpx.AsyncClient(
            timeout=TIMEOUT_S, headers=headers, trust_env=not here
        ) as client:
            try:
                while True:
                    while (
                        not failed
                        and len(flying) < self._settings.concurrency
                        and (asked := next(waiting, None))
                    ):
                        flying[asyncio.create_task(self._ask(client, *asked[1:]))] = asked[0]
                    if not flying:
                        break
                    for task in (await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED))[
                        0
                    ]:
                        key, error = flying.pop(task), task.exception()
                        if isinstance(error, NoReply):
                            unanswered[key] = error
                            if len(unanswered) >= max(2, self._settings.concurrency):
                                failed = error
                        elif error:
                            failed = error  # told when what is on its way has come: it is paid for
                        else:
                            any_answered = True
                            for given_up in list(unanswered):
                                yield given_up, refusal(str(unanswered.pop(given_up)))
                            yield key, task.result()
            finally:
                for task in flying:
                    task.cancel()
                await asyncio.gather(*flying, return_exceptions=True)
        if failed or (unanswered and not any_answered):
            raise failed or next(iter(unanswered.values()))
        for given_up, error in unanswered.items():
            yield given_up, refusal(str(error))

    async def _ask(
        self, client: httpx.AsyncClient, messages: list[dict[str, str]], seed: int
    ) -> Reply:
        body = {"model": self._settings.model, "messages": messages, "seed": seed, **self._asked}
        again = AsyncRetrying(
            retry=retry_if_exception_type(TryAgain),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_as_asked,
        )
        try:
            return await again(self._ask_once, client, body)
        except RetryError as error:
            raise NoReply(
                f"{self._url}: no whole reply in {ATTEMPTS} attempts, the last: "
                f"{error.last_attempt.exception()}; what came is kept, run again to go on"
            ) from None

    async def _ask_once(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Reply:
        await self._keep_rate()
        try:
            # httpx's own limit is for each piece that drips in.
            async with asyncio.timeout(TIMEOUT_S):
                reply = await client.post(self._url, json=body)
            if reply.status_code == 200:
                return read_reply(reply.json())
        except (httpx.HTTPError, TimeoutError) as error:
            raise TryAgain(f"{type(error).__name__} {error}") from None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            reason = f"not a completion ({type(error).__name__}: {error})"
            raise TryAgain(reason) from None
        reason = f"status {reply.status_code}: {reply.text[:200]}"
        if reply.status_code in REFUSED:
            return refusal(reason)
        if reply.status_code < 500 and reply.status_code not in BUSY:
            raise LetterheadError(f"{self._url}: {reason}")
        raise TryAgain(reason, seconds_told(reply.headers.get("Retry-After", "")))

    async def _keep_rate(self) -> None:
        """Wait for this request's place, so that no minute sees more than `requests_per_minute`."""
        if limit := self._settings.requests_per_minute:
            now = time.monotonic()
            self._next = max(now, self._next) + 60 / limit
            if (wait := self._next - 60 / limit - now) > 0:
                await asyncio.sleep(wait)


def wait_as_asked(state: RetryCallState) -> float:
    """Seconds to the next attempt: twice as long as before, less a random share of up to a half, or
    longer where the endpoint asks for it."""
    asked = min(state.outcome.exception().seconds, LONGEST_RETRY_AFTER_S)
    doubled = wait_exponential(WAIT_S, LONGEST_WAIT_S)(state)
    return max(asked, doubled * random.uniform(0.5, 1))


def refusal(reason: str) -> Reply:
    """What stands for a reply where there is none."""
    return Reply("", None, False, 0, 0, reason)


def seconds_told(retry_after: str) -> float:
    """The seconds of a Retry-After header (RFC 9110, 10.2.3: a number, or a date); 0 where it tells
    none."""
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def read_reply(reply: dict) -> Reply:
    """A completion. The thought has a field of its own at some endpoints (`reasoning_content`, or
    vLLM's `reasoning`).

    Raises
    ------
    KeyError, IndexError, TypeError, AttributeError : it is no completion
    """
    choice, usage = reply["choices"][0], reply.get("usage") or {}
    message = choice["message"]
    content = message.get("content") or ""
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if not isinstance(content, str) or not isinstance(reasoning, str | None):
        raise TypeError(f"{type(content).__name__} for a text")
    paid = (
        n if isinstance(n := usage.get(key), int) else None
        for key in ("prompt_tokens", "completion_tokens")
    )
    tokens = (choice.get("logprobs") or {}).get("content") or []
    first = (
        {one["token"]: float(one["logprob"]) for one in tokens[0]["top_logprobs"]}
        if tokens
        else None
    )
    return Reply(content, reasoning, choice["finish_reason"] == "stop", *paid, first=first)


def user_turn(text: str) -> list[dict[str, str]]:
    """The messages of a question without turns before it."""
    return [{"role": "user", "content": text}]


def split_answer(text: str) -> tuple[str, str]:
    """What a text says before its answer, and that answer: the rest of the line behind its last
    "Answer:", or, where that is missing, its last sentence."""
    text = text.strip()
    *_, mark = [None, *MARK.finditer(text)]
    *_, gap = [None, *SENTENCE_GAP.finditer(text)]
    begin, end = (mark or gap).span() if mark or gap else (0, 0)
    answer = text[end:].strip()
    return text[:begin], answer.split("\n")[0]
