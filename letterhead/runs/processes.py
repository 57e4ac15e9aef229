"""Child processes that never outlive their parent.

python -m letterhead.runs.processes PARENT COMMAND …

runs a command in a session of its own, and kills it with all its descendants when the command ends,
when it is told to stop, or when the process PARENT dies, kill -9 included (Linux tells it). vLLM
and torchrun start processes of their own, torchrun's in sessions of their own, so ending the one
that we started is not enough.
"""

import ctypes
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

import psutil

from letterhead.files import LetterheadError
from letterhead.runs.devices import worker_environment


def die_with_parent(how: int = signal.SIGKILL) -> None:
    """Linux: have the kernel send this process a signal when its parent dies; elsewhere nothing is
    done."""
    pr_set_pdeathsig = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, how)


def torchrun(n: int, module: str, arguments: list[str]) -> list[str]:
    """The command line that runs a module in n processes that train together on this machine.

    The module calls `begin_worker` first.
    """
    rendezvous = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(n)]
    return [sys.executable, "-m", "torch.distributed.run", *rendezvous, "-m", module, *arguments]


def begin_worker() -> None:
    """What a process that torchrun starts does first: dies with torchrun; and, where several train
    on a CPU, can resume (the Trainer loads the optimizer to the device `cpu:0`, a place that
    torch's loader does not know by itself)."""
    die_with_parent()
    import torch

    torch.serialization.register_package(
        0,
        lambda storage: None,
        lambda storage, location: storage if location.startswith("cpu:") else None,
    )


def guarded(command: list[str]) -> list[str]:
    """The command line that runs a command under `guard`, as a child of this process."""
    return [sys.executable, "-m", "letterhead.runs.processes", str(os.getpid()), *command]


def guard(parent: int, command: list[str]) -> int:
    """Run a command; when this, or the parent, ends for whatever reason, so does the command with
    all its descendants.

    Inheritable descriptors (a stage's lock) are passed on.
    """
    signals = []
    for how in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(how, lambda *_: signals.append(True))
    die_with_parent(signal.SIGTERM)
    child = subprocess.Popen(
        command, start_new_session=True, preexec_fn=die_with_parent, close_fds=False
    )
    descendants: set[psutil.Process] = set()
    while child.poll() is None and not signals and os.getppid() == parent:
        with suppress(psutil.Error):
            descendants.update(psutil.Process(child.pid).children(recursive=True))
        time.sleep(0.1)
    for process in descendants:
        with suppress(psutil.Error):
            process.kill()
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


def call_in_a_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process, so that its load time and peak memory are its own.

    Raises
    ------
    LetterheadError : the process was killed
    """
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawn, initializer=die_with_parent) as pool:
            return pool.submit(work, *arguments).result()
    except BrokenProcessPool:
        raise LetterheadError(
            f"{work.__name__}: its process was killed, most likely for want of memory; free "
            f"some and run again"
        ) from None


class Workers:
    """Something that is loaded in each of n processes, each with a GPU of its own, when it is first
    worked on in parts.

    With n = 1 it is loaded in this process. A context manager: the processes end with the block.

    Parameters
    ----------
    n : how many
    load, arguments : `load(*arguments)` gives what is worked on; both go through pickle
    """

    def __init__(self, n: int, load: Callable[..., Any], *arguments: Any):
        self.n, self._load = n, (load, arguments)
        threads = max(1, (os.cpu_count() or 1) // n)
        self._pools = [
            ProcessPoolExecutor(
                1,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(rank, threads, os.getpid()),
            )
            for rank in (range(n) if n > 1 else ())
        ]
        self._held: list = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        self.unload()

    def unload(self) -> None:
        """Let go of what was loaded, and end the processes; they can't be used again."""
        self._held.clear()
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    def load(self) -> None:
        """Load in all processes now, not at the first call, so that what is wrong is known before
        anything is written."""
        self.map(_nothing, [()] * self.n)

    def map(self, work: Callable[..., Any], parts: Sequence[tuple]) -> list:
        """`work(loaded, *part)` for up to n parts, one in each process.

        Raises
        ------
        LetterheadError : a process was killed
        """
        if not self._pools:
            return [_work(self._held, self._load, work, *part) for part in parts]
        futures = [
            pool.submit(_work, None, self._load, work, *part)
            for pool, part in zip(self._pools, parts, strict=False)
        ]
        try:
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise LetterheadError(
                f"{work.__name__}: a process was killed, most likely for want of memory; free "
                f"some and run again"
            ) from None


_HELD: list = []


def _nothing(_loaded: Any) -> None:
    pass


def _begin(rank: int, threads: int, parent: int) -> None:
    die_with_parent()
    if os.getppid() != parent:  # it died before the kernel was told
        os._exit(1)
    os.environ.update(worker_environment(rank))
    import torch

    torch.set_num_threads(threads)


def _work(held: list | None, load: tuple, work: Callable[..., Any], *part: Any) -> Any:
    held = _HELD if held is None else held
    if not held:
        function, arguments = load
        held.append(function(*arguments))
    return work(held[0], *part)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), sys.argv[2:]))
