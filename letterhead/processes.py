"""Child processes that never outlive their parent, and a vLLM server as such a child.

python -m letterhead.processes COMMAND …

runs a command with all its children in a group of its own, and kills the group when the command ends, when it is told to
stop, or when its parent dies, kill -9 included (Linux tells it). vLLM starts processes of its own, so ending the one that
we started is not enough.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from letterhead.records import LetterheadError

ENVIRONMENT = Path(".venv-serve")
LOAD_PATIENCE_S = 900
TAIL_LINES = 6


def die_with_parent(how: int = signal.SIGKILL) -> None:
    """Linux: have the kernel send this process a signal when its parent dies; elsewhere nothing is done."""
    PR_SET_PDEATHSIG = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, how)


def guard(command: list[str]) -> int:
    """Run a command in a process group of its own; when this ends, for whatever reason, the group is killed."""
    parent = os.getppid()
    die_with_parent(signal.SIGTERM)
    child = subprocess.Popen(command, start_new_session=True)

    def stop(*_) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        with suppress(KeyboardInterrupt):
            while child.poll() is None and os.getppid() == parent:
                time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class VllmServer:
    """A vLLM server on 127.0.0.1, from start to the end of the block.

    Parameters
    ----------
    model : folder of the model
    runner : `generate`, or `pooling` for a sequence classifier
    max_model_len : the longest request, prompt and answer, in tokens
    log : file that takes what vLLM prints
    port : None for a free one
    dtype : float32 where answers must equal HF's; vLLM's own `auto` casts float32 weights down

    Raises
    ------
    LetterheadError : no serving environment, a port that is taken, or a server that ends before it answers; quotes the log
    """

    def __init__(
        self, model: Path, runner: str, max_model_len: int, log: Path, port: int | None = None, dtype: str = "float32"
    ):
        self.model, self.log, self.port = model, log, port or free_port()
        python = ENVIRONMENT / "bin" / "python"
        if not python.exists():
            raise LetterheadError(f"{python}: no serving environment; run: make setup-serve")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                raise LetterheadError(f"port {self.port} of 127.0.0.1 is taken; end what listens there, or name another")
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "letterhead", "--dtype", dtype]
        options += ["--runner", runner, "--max-model-len", str(max_model_len), "--no-enable-prefix-caching"]
        offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if not Path("/dev/nvidia0").exists():
            options.append("--enforce-eager")  # compiling takes minutes on a CPU
            offline |= {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")}
        # Not `vllm serve`: in the build for the CPU that command looks for its own version under the wrong name, and ends.
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *options]
        command = [sys.executable, "-m", "letterhead.processes", *command]
        log.parent.mkdir(parents=True, exist_ok=True)
        self._start = time.perf_counter()
        self._process = subprocess.Popen(command, stdout=open(log, "w"), stderr=subprocess.STDOUT, env=os.environ | offline)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "VllmServer":
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
            said = [line for line in lines if "Error" in line] or lines
            quoted = "\n  ".join(line[-300:] for line in said[-TAIL_LINES:])
            raise LetterheadError(
                f"vLLM ended (exit code {self._process.returncode}) on {self.model}; {self.log} says:\n  {quoted}"
            )

    def _wait_until_it_answers(self) -> None:
        import httpx

        while time.perf_counter() - self._start < LOAD_PATIENCE_S:
            self.require_alive()
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    self.load_seconds = time.perf_counter() - self._start
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise LetterheadError(f"vLLM did not answer within {LOAD_PATIENCE_S} s on {self.model}; its log is {self.log}")


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1:]))
