"""What stands in for other people's servers: a model and data hub, a teacher's endpoint, a
classifier in service. Each is a handler that `running` serves on 127.0.0.1."""

import contextlib
import itertools
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What the teacher thinks
THOUGHT = "It says so <|im_end|> plainly."


@contextlib.contextmanager
def running(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve a handler; gives its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


class Quiet(BaseHTTPRequestHandler):
    """A handler that prints nothing."""

    def log_message(self, *_):
        pass


class Hub(Quiet):
    """Serves one repository, a data set, the way the hub does, in as far as datasets and
    huggingface_hub ask."""

    COMMIT = "c0ffee" + 34 * "0"
    repository = "datasets/me/news"
    files: dict[str, bytes] = {}  # filled by the fixture
    dies = False  # in the middle of a file

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def do_POST(self):  # paths-info
        length = int(self.headers.get("Content-Length", 0))
        asked = self.rfile.read(length).decode()
        found = [self.entry(name) for name in self.files if name in asked]
        self.send(json.dumps(found).encode(), True)

    def entry(self, name: str) -> dict:
        return {
            "type": "file",
            "path": name,
            "size": len(self.files[name]),
            "oid": f"{len(name):040x}",
        }

    def answer(self, body: bool):
        path = self.path.split("?")[0]
        name = path.split(f"/resolve/{self.COMMIT}/")[-1] if "/resolve/" in path else None
        if path in ("/", ""):
            self.send(b"hub", body)
        elif name in self.files:
            self.send(
                self.files[name],
                body,
                {"X-Repo-Commit": self.COMMIT, "ETag": f'"{len(name):040x}"'},
            )
        elif "/tree/" in path:
            self.send(json.dumps([self.entry(n) for n in self.files]).encode(), body)
        elif path.startswith(f"/api/{self.repository}"):
            self.send(json.dumps(self.describe()).encode(), body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def describe(self) -> dict:
        """What the hub says of the repository."""
        sizes = [{"rfilename": name, "size": len(content)} for name, content in self.files.items()]
        none = {"private": False, "tags": [], "gated": False, "disabled": False}
        id_ = self.repository.partition("/")[2]
        return {"id": id_, "sha": self.COMMIT, "siblings": sizes, "downloads": 0, "likes": 0} | none

    def send(self, content: bytes, body: bool, headers: dict | None = None):
        self.send_response(200)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(
                content[: len(content) // 2] if self.dies and "/resolve/" in self.path else content
            )


class ModelHub(Hub):
    """Serves one model the way the hub does, in as far as huggingface_hub asks."""

    repository = "models/me/bert"
    files: dict[str, bytes] = {}


def completion(content: str, finish: str = "stop", **message: str) -> dict:
    choice = {"message": {"content": content} | message, "finish_reason": finish}
    return {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}


class Endpoint(Quiet):
    """Fails each question in another way before it answers it; `wrong` rows are answered wrongly at
    first or for good."""

    failures: tuple = ("429", "500", "garbage", "half", "silence", "dripping", "empty")
    answered: Counter
    failed: Counter
    refuse_after: int | None = None
    burning: tuple[int, ...] = ()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        number = int(re.search(r"text (\d+)", text)[1])
        cls, key = type(self), (number, body["seed"])
        if number in cls.burning:
            self.send(500, b"this one burns")
            return
        if cls.refuse_after is not None and sum(cls.answered.values()) >= cls.refuse_after:
            self.send(500, b"the machine burns")
            return
        how = cls.failures[(number + cls.failed[key]) % len(cls.failures)] if cls.failures else None
        if how and cls.failed[key] < 2:
            cls.failed[key] += 1
            if how == "silence":
                time.sleep(1.2)
                return
            if how == "dripping":  # each piece in time, and no end
                self.send(200, b"", length=4000)
                with contextlib.suppress(OSError):
                    for _ in range(12):
                        self.wfile.write(b" ")
                        time.sleep(0.1)
                return
            if how == "half":
                self.send(200, json.dumps(completion("a"))[:40].encode(), length=4000)
                self.close_connection = True
                return
            status, reply = {
                "429": (429, b"slower"),
                "500": (500, b"oops"),
                "garbage": (200, b"<html>"),
            }.get(how, (200, b'{"choices": []}'))
            self.send(status, reply, headers={"Retry-After": "0"} if status == 429 else {})
            return
        cls.answered[number] += 1
        self.send(200, json.dumps(self.answer(number, body)).encode())

    def answer(self, number: int, body: dict) -> dict:
        right = "ABC"[number % 3]
        if number % 5 == 1 and (self.answered[number] < 2 or number % 10 == 1):
            right = "ABC"[(number + 1) % 3]
        return completion(f"<think>{THOUGHT}</think>\n{right}")

    def send(
        self, status: int, body: bytes, length: int | None = None, headers: dict | None = None
    ):
        self.send_response(status)
        for name, value in ({"Content-Length": str(length or len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class LetterEndpoint(Endpoint):
    """Replies with a letter and, where it is asked to, with the likeliest tokens; every tenth is
    wrong, and every seventh of those that are asked a second time another one."""

    asked: list[dict] = []

    def answer(self, number: int, body: dict) -> dict:
        self.asked.append(body)
        shift = (number % 10 == 0) + (self.answered[number] > 1 and number % 7 == 0)
        letter = "ABC"[(number + shift) % 3]
        reply = completion(f"{letter}. That one")
        if body.get("logprobs"):
            tokens = [
                {"token": token, "logprob": value}
                for token, value in ((letter, -0.2), (f" {letter}", -2.5), ("The", -3.0))
            ]
            first = {"token": letter, "logprob": -0.2, "top_logprobs": tokens}
            reply["choices"][0]["logprobs"] = {"content": [first]}
        return reply


class Stub(Quiet):
    """A classifier that answers by the first id, wrongly to every so manieth request."""

    wrong_every, numbers = 0, itertools.count(1)
    default_request_version = "HTTP/1.1"  # else what isn't HTTP is answered without a status line

    def do_POST(self):
        try:
            ids = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
            probabilities = [0.1, 0.1, 0.1]
            probabilities[ids[0] % 3] = 0.8
        except (ValueError, TypeError, LookupError):
            self.send_error(400, "not a list of ids")
            return
        if next(self.numbers) % (self.wrong_every or 1e9) == 0:
            probabilities = probabilities[1:] + probabilities[:1]
        content = json.dumps({"data": [{"probs": probabilities}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
