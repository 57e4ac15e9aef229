"""A server in a process of its own, on 127.0.0.1: started, awaited, asked and ended."""

import asyncio
import re
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

from letterhead.files import LetterheadError
from letterhead.runs.processes import guarded

LOAD_PATIENCE_S = 900
TIMEOUT_S = 600
IDLE_S = (
    1  # the server drops a connection that idles for 5 s, perhaps just as the next request takes it
)
TAIL_LINES = 6


@dataclass(frozen=True)
class Route:
    """One way of asking.

    path : of the HTTP route
    body : what is asked about, token ids or a text → the request
    read : the reply → (class number or NO_ANSWER, probabilities of the classes or None); of
        `text_route` the text
    """

    path: str
    body: Callable[[Any], dict]
    read: Callable[[dict], Any]


class ServerProcess:
    """A server, from start to the end of the block.

    Parameters
    ----------
    command : starts it
    port : of 127.0.0.1
    log : file that takes what it prints
    what : it serves, in words
    environment : its variables; None are this process's

    Raises
    ------
    LetterheadError : a port that is taken, or a server that ends before it answers; quotes the log
    """

    engine = "the server"

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        log: Path,
        what: str,
        environment: Mapping[str, str] | None = None,
    ):
        self.port, self.log, self.what = port, log, what
        require_free(port)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._start = time.perf_counter()
        output = {"stdout": open(log, "w"), "stderr": subprocess.STDOUT}
        self._process = subprocess.Popen(guarded(list(command)), **output, env=environment)

    @property
    def pid(self) -> int:
        """The process that ends the server's when it ends."""
        return self._process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and all its processes."""
        self._process.terminate()
        self._process.wait()

    def require_alive(self) -> None:
        """Make sure that the server still runs.

        Raises
        ------
        LetterheadError : it has ended; quotes the end of its log
        """
        if self._process.poll() is not None:
            lines = self.log.read_text(errors="replace").splitlines()
            self._explain("\n".join(lines))
            # An error's message may begin on the line behind its name.
            at = [i for i, line in enumerate(lines) if "Error" in line and "WARNING" not in line]
            quoted = [
                lines[j] for j in sorted({j for i in at for j in (i, i + 1) if j < len(lines)})
            ] or lines
            quoted = "\n  ".join(line[-300:] for line in quoted[-TAIL_LINES:])
            raise LetterheadError(
                f"{self.engine} ended (exit code {self._process.returncode}) on {self.what}; "
                f"{self.log} says:\n  {quoted}"
            )

    def _wait_until_it_answers(self) -> None:
        while time.perf_counter() - self._start < LOAD_PATIENCE_S:
            self.require_alive()
            try:
                if httpx.get(f"{self.url}/health", timeout=2, trust_env=False).status_code == 200:
                    self.load_seconds = time.perf_counter() - self._start
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise LetterheadError(
            f"{self.engine} did not answer within {LOAD_PATIENCE_S} s on {self.what}; its log is "
            f"{self.log}"
        )

    def _explain(self, text: str) -> None:
        """Raise a better error than the log's, from its text."""

    async def ask(self, client: httpx.AsyncClient, route: Route, asked: Any) -> Any:
        """One request; gives what the route reads from the reply.

        Raises
        ------
        LetterheadError : the server has ended (quotes its log), refuses the request or sends what
            can't be read (quotes it)
        """
        try:
            reply = await client.post(self.url + route.path, json=route.body(asked))
        except httpx.HTTPError as error:
            await asyncio.sleep(1)  # a server that was killed needs a moment to be found dead
            self.require_alive()
            raise LetterheadError(
                f"{self.url}{route.path}: {type(error).__name__} {error}; its log is {self.log}"
            ) from None
        if reply.status_code != 200:
            raise LetterheadError(
                f"{self.url}{route.path}: status {reply.status_code}: {reply.text[:300]}"
            )
        try:
            return route.read(reply.json())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise LetterheadError(
                f"{self.url}{route.path}: not a reply of {self.engine}'s ({type(error).__name__}): "
                f"{reply.text[:300]}"
            ) from None

    def peak_memory(self) -> dict[str, int]:
        """The most memory that each of the server's processes has held, summed, in MiB: pages they
        share count twice, so it is an upper bound."""
        peak = 0
        for process in psutil.Process(self.pid).children(recursive=True):
            with suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak += sum(int(kibibytes) for kibibytes in re.findall(r"VmHWM:\s*(\d+)", status))
        return {"peak_memory_mb": peak // 1024}


def require_free(port: int) -> None:
    """Make sure that one may listen on a port of 127.0.0.1.

    Raises
    ------
    LetterheadError : somebody else does, or the system refuses it
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise LetterheadError(
                f"port {port} of 127.0.0.1 is taken ({error.strerror}); end what listens there, or "
                f"name another with PORT="
            ) from None


def http_client() -> httpx.AsyncClient:
    """An HTTP client with a connection for each request in flight."""
    # No proxy: it would be asked for 127.0.0.1 too.
    limits = httpx.Limits(max_connections=None, keepalive_expiry=IDLE_S)
    return httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits, trust_env=False)
