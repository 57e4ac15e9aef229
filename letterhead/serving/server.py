"""A small HTTP server for what classifies texts: fitted methods, encoders, and cascades of two.

What waits is classified together, up to a budget of tokens. `/classify` takes texts and answers as
vLLM's pooling service does, so that a client need not know which of the two it asks.
"""

import asyncio
import html
import json
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from letterhead.files import LetterheadError
from letterhead.models.classifier import CascadeClassifier, Classifier
from letterhead.models.prompt import keep_words

HOST, CLASSIFY = "127.0.0.1", "/classify"
MOST_TEXTS = 1024  # of a request
MOST_BYTES = 4_000_000  # of its body
MOST_DRAINED = 64_000_000  # of a longer one are read before the client is told
BODY_S = 30.0  # in which a body must be there
ENDING_S = 30  # in which what was accepted is answered when the server ends
MOST_WAITING = 4096  # texts; a request more is told to come again
RETRY_S = 1
BYTES_PER_TOKEN = 4  # roughly, in English; a Chinese character has three bytes
LATENCIES_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Question(BaseModel):
    """One text, or several."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS)] = Field(
        description=f"A text, or up to {MOST_TEXTS:,} of them."
    )
    model: str | None = Field(None, description="Not looked at; this server has one model.")


class Answer(BaseModel):
    """What a text is, in vLLM's words."""

    index: int = Field(description="Which of the texts.")
    label: str
    probs: list[float] = Field(description="Of the labels, in their order; calibrated.")
    num_classes: int
    abstain: bool | None = Field(
        None, description="Whether the answer is too unsure for the promise; null without one."
    )


class Answers(BaseModel):
    """The answers to a request, in the order of its texts."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Answer]


class Fault(BaseModel):
    """What is wrong with a request."""

    message: str
    field: str | None = Field(description="Where it is wrong; null where the server failed.")


class Failure(BaseModel):
    """The reply to a request that gets no answer."""

    error: Fault


@dataclass(frozen=True)
class Served:
    """What a server answers with.

    Attributes
    ----------
    name : of the method
    labels : in the order of the probabilities
    classify : a method, or a cascade, each of whose halves then has a queue of its own
    max_words : a text is cut there, as in training; None leaves it whole
    least_sure : below this highest probability an answer abstains; None where nothing is promised
    batch_tokens : about how many tokens are classified together
    """

    name: str
    labels: Sequence[str]
    classify: Classifier
    max_words: int | None = None
    least_sure: float | None = None
    batch_tokens: int = 8192


class Full(Exception):
    """Too much waits already."""


@dataclass
class _Waiting:
    """A request that waits.

    Attributes
    ----------
    future : takes its probabilities, shape (texts, classes)
    """

    texts: list[str]
    future: asyncio.Future

    @property
    def tokens(self) -> int:
        """About how many it has."""
        lengths = (len(text.encode(errors="replace")) for text in self.texts)
        return sum(1 + length // BYTES_PER_TOKEN for length in lengths)

    def answer(self, found: np.ndarray) -> None:
        """Hand over its probabilities, if somebody waits for them."""
        if not self.future.done():
            self.future.set_result(found)

    def fail(self, error: Exception) -> None:
        """Hand over an error."""
        if not self.future.done():
            self.future.set_exception(error)


class Batcher:
    """A queue before a classifier: while one batch is classified the next one gathers.

    Parameters
    ----------
    classify : texts → probabilities; called in one thread, always the same
    most_tokens : of a batch, roughly; a longer request is a batch of its own
    """

    def __init__(
        self, classify: Classifier, most_tokens: int, seen: Callable[[int], None] = lambda _: None
    ):
        self._classify, self._most_tokens, self._seen = classify, most_tokens, seen
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1)
        self.texts_waiting = 0

    async def ask(self, texts: list[str]) -> np.ndarray:
        """The probabilities of texts, shape (rows, classes).

        Raises
        ------
        Full : more than `MOST_WAITING` texts would wait
        LetterheadError : what the classifier raises
        """
        if self.texts_waiting + len(texts) > MOST_WAITING:
            raise Full
        one = _Waiting(texts, asyncio.get_running_loop().create_future())
        self._waiting.append(one)
        self.texts_waiting += len(texts)
        self._arrived.set()
        return await one.future

    async def run(self) -> None:
        """Classify what waits, until cancelled."""
        while True:
            await self._arrived.wait()
            batch, tokens = [], 0
            while self._waiting and (
                not batch or tokens + self._waiting[0].tokens <= self._most_tokens
            ):
                one = self._waiting.popleft()
                self.texts_waiting -= len(one.texts)
                if not one.future.done():  # nobody waits for it any more
                    batch.append(one)
                    tokens += one.tokens
            if not self._waiting:
                self._arrived.clear()
            if batch:
                await self._answer(batch)

    async def _answer(self, batch: list[_Waiting]) -> None:
        """Give each request of a batch its answer. Where a text of several requests fails, each is
        classified alone."""
        texts = [text for one in batch for text in one.texts]
        self._seen(len(texts))
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._thread, self._classify, texts)
            if len(found) != len(texts):
                raise ValueError(f"{len(found)} answers to {len(texts)} texts")
        except Exception as error:
            # A service that is gone is asked no more often for that.
            if len(batch) > 1 and not isinstance(error, LetterheadError):
                for one in batch:
                    await self._answer([one])
            else:
                for one in batch:
                    one.fail(error)
            return
        at = 0
        for one in batch:
            one.answer(found[at : at + len(one.texts)])
            at += len(one.texts)

    def close(self) -> None:
        """End; what waits is not classified any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class _Metrics:
    """What /metrics tells, in a registry of its own."""

    def __init__(self, served: Served, waiting: Callable[[], int]):
        self.registry = CollectorRegistry()
        here = {"registry": self.registry}
        self.requests = Counter(
            "letterhead_requests", "Requests to /classify by status.", ["status"], **here
        )
        self.texts = Counter("letterhead_texts", "Texts answered by label.", ["label"], **here)
        for label in served.labels:
            self.texts.labels(label)
        self.abstained = Counter("letterhead_abstained", "Texts whose answer abstains.", **here)
        self.deferred = Counter(
            "letterhead_deferred", "Texts that went to a cascade's dear half.", **here
        )
        self.seconds = Histogram(
            "letterhead_seconds", "From a request to its answer.", buckets=LATENCIES_S, **here
        )
        self.batches = Histogram(
            "letterhead_batch_texts", "Texts classified together.", buckets=BATCHES, **here
        )
        Gauge("letterhead_waiting_texts", "Texts that wait.", **here).set_function(waiting)

        self.begun = self.ended = 0

    def begin(self, path: str) -> None:
        """Count a request."""
        self.begun += path == CLASSIFY

    def count(self, path: str, status: int) -> None:
        """Count a reply."""
        if path == CLASSIFY:
            self.ended += 1
            self.requests.labels(str(status)).inc()


class _Limits:
    """Tells a client whose body is too long, or does not come, and counts replies by status."""

    def __init__(self, application: ASGIApp, metrics: _Metrics):
        self._application, self._metrics = application, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        self._metrics.begin(scope["path"])
        is_whole, read, last = False, 0, time.monotonic() + BODY_S

        async def limited() -> Message:
            nonlocal is_whole, read
            if is_whole:  # what comes now is that the client leaves
                return await receive()
            try:
                async with asyncio.timeout(last - time.monotonic()):
                    message = await receive()
                    read += len(message.get("body", b""))
                    while MOST_BYTES < read < MOST_DRAINED and message.get("more_body"):
                        message = await receive()  # else the client would not read the reply
                        read += len(message.get("body", b""))
            except TimeoutError:
                raise HTTPException(408, f"body: did not come within {BODY_S:g} s") from None
            if read > MOST_BYTES:
                raise HTTPException(413, f"body: has more than {MOST_BYTES:,} bytes; send less")
            is_whole = not message.get("more_body")
            return message

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count(scope["path"], message["status"])
            await send(message)

        await self._application(scope, limited, counted)


class _Service:
    """What answers: a queue before each part of a method, and what is counted of it."""

    def __init__(self, served: Served):
        self.served = served
        cascade = served.classify if isinstance(served.classify, CascadeClassifier) else None
        parts = (cascade.cheap, cascade.dear) if cascade else (served.classify,)
        self._frozen = cascade and cascade.frozen
        self.metrics = _Metrics(served, lambda: sum(one.texts_waiting for one in self.queues))
        observe = self.metrics.batches.observe
        self.queues = [Batcher(part, served.batch_tokens, observe) for part in parts]

    async def answer(self, question: Question) -> Answers:
        """The answers to a request.

        Raises
        ------
        HTTPException : an empty text, too much that waits, or no answer
        """
        began = time.perf_counter()
        asked = [question.input] if isinstance(question.input, str) else question.input
        texts = [keep_words(text, self.served.max_words).strip() for text in asked]
        if "" in texts:
            where = "input" if isinstance(question.input, str) else f"input[{texts.index('')}]"
            raise HTTPException(400, f"{where}: the text is empty")
        again = {"Retry-After": str(RETRY_S)}
        try:
            found = await self._probabilities(texts)
        except Full:
            message = f"input: {MOST_WAITING:,} texts wait already; ask again"
            raise HTTPException(429, message, again) from None
        except LetterheadError as error:
            raise HTTPException(503, f"input: no answer now: {error}", again) from None
        if not found.any(axis=1).all():
            raise HTTPException(502, "input: the method gave no answer to a text")
        self.metrics.seconds.observe(time.perf_counter() - began)
        return Answers(
            id=f"classify-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self.served.name,
            data=[self._of_text(index, of_text) for index, of_text in enumerate(found)],
        )

    async def _probabilities(self, texts: list[str]) -> np.ndarray:
        first = await self.queues[0].ask(texts)
        if self._frozen is None:
            return first
        deferred = self._frozen.is_deferred(first)
        passed = [text for text, is_passed in zip(texts, deferred, strict=True) if is_passed]
        self.metrics.deferred.inc(len(passed))
        second = await self.queues[1].ask(passed) if passed else first[:0]
        return self._frozen.combine(first, second, deferred)

    def _of_text(self, index: int, probabilities: np.ndarray) -> Answer:
        served, sure = self.served, float(probabilities.max())
        label = served.labels[int(probabilities.argmax())]
        abstains = None if served.least_sure is None else sure < served.least_sure
        self.metrics.texts.labels(label).inc()
        self.metrics.abstained.inc(bool(abstains))
        return Answer(
            index=index,
            label=label,
            probs=probabilities.tolist(),
            num_classes=len(served.labels),
            abstain=abstains,
        )


def create(served: Served) -> FastAPI:
    """The server as an ASGI application."""
    service = _Service(served)

    tasks: list[asyncio.Task] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        tasks.extend(asyncio.create_task(queue.run()) for queue in service.queues)
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for queue in service.queues:
            queue.close()

    application = FastAPI(
        title=f"Letterhead: {served.name}", lifespan=lifespan, docs_url=None, redoc_url=None
    )
    application.add_middleware(_Limits, metrics=service.metrics)
    application.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    application.state.metrics = service.metrics

    @application.post(CLASSIFY, responses={"4XX": {"model": Failure}, "5XX": {"model": Failure}})
    async def classify(question: Question) -> Answers:
        """The label and the probabilities of each text."""
        return await service.answer(question)

    @application.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server answers."""
        if any(task.done() for task in tasks):
            raise HTTPException(503, "health: a queue has ended; start the server anew")
        return {"status": "ok", "model": served.name}

    @application.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counts and latencies as Prometheus reads them."""
        metrics_text = generate_latest(service.metrics.registry)
        return Response(metrics_text, media_type=CONTENT_TYPE_LATEST)

    @application.get("/docs", include_in_schema=False)
    async def documentation() -> HTMLResponse:
        return HTMLResponse(as_page(application.openapi()))

    @application.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        service.metrics.count(request.url.path, 500)
        return as_error(500, f"the server failed: {type(error).__name__}", None)

    application.add_exception_handler(RequestValidationError, malformed)
    application.add_exception_handler(HTTPException, refused)
    return application


async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
    """The reply to a body that is no question. Of a list the errors as a list are told, not those
    as a text."""
    errors = error.errors()
    as_list = [one for one in errors if "str" not in one["loc"][2:3]]
    first = as_list[0] if isinstance(errors[0].get("input"), list) and as_list else errors[0]
    place = [part for part in first["loc"] if part != "body"]
    is_json = first["type"] != "json_invalid"
    field = place[0] if place and is_json else "body"
    index = next((f"[{part}]" for part in place[1:] if isinstance(part, int)), "")
    return as_error(400, f"{field}{index}: {first['msg']}", f"{field}{index}")


async def refused(_: Request, error: HTTPException) -> JSONResponse:
    """The reply to a question that gets no answer."""
    message = error.detail if ":" in error.detail else f"body: {error.detail}"
    if error.status_code in (404, 405):
        return as_error(error.status_code, error.detail, None, error.headers)
    return as_error(error.status_code, message, message.partition(":")[0], error.headers)


def as_error(
    status: int, message: str, field: str | None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error as JSON that names the field."""
    return JSONResponse({"error": {"message": message, "field": field}}, status, headers)


def as_page(schema: dict[str, Any]) -> str:
    """An OpenAPI schema as a page of plain HTML, which asks nobody for a script or a style."""
    rows = [
        f"<h2><code>{html.escape(method.upper())} {html.escape(path)}</code></h2>"
        f"<p>{html.escape(operation.get('description', ''))}</p>"
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    ]
    for name, of_name in schema["components"]["schemas"].items():
        fields = "".join(
            f"<tr><td><code>{html.escape(field)}</code></td>"
            f"<td>{html.escape(json.dumps(_type(kind)))}</td>"
            f"<td>{html.escape(kind.get('description', ''))}</td></tr>"
            for field, kind in of_name.get("properties", {}).items()
        )
        rows.append(f"<h3>{html.escape(name)}</h3><table>{fields}</table>")
    example = "curl -H 'Content-Type: application/json' -d '{\"input\": \"a text\"}' …/classify"
    return (
        "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<style>body{font:16px/1.5 sans-serif;max-width:50em;margin:2em auto;padding:0 1em}"
        "td{padding:.2em 1em .2em 0;vertical-align:top}</style>"
        f"<title>{html.escape(schema['info']['title'])}</title>"
        f"<h1>{html.escape(schema['info']['title'])}</h1><p><code>{html.escape(example)}</code></p>"
        f"{''.join(rows)}<p><a href=/openapi.json>openapi.json</a></p>"
    )


def _type(kind: dict[str, Any]) -> Any:
    if "anyOf" in kind:
        return [_type(one) for one in kind["anyOf"]]
    if "items" in kind:
        return [_type(kind["items"])]
    return kind.get("type", kind.get("$ref", "").rpartition("/")[2])
