"""Child processes that never outlive their parent.

python -m letterhead.processes PARENT COMMAND …

runs a command with all its children in a group of its own, and kills the group when the command ends, when it is told to
stop, or when the process PARENT dies, kill -9 included (Linux tells it). vLLM starts processes of its own, so ending the
one that we started is not enough.
"""

import ctypes
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

from letterhead.records import LetterheadError


def die_with_parent(how: int = signal.SIGKILL) -> None:
    """Linux: have the kernel send this process a signal when its parent dies; elsewhere nothing is done."""
    PR_SET_PDEATHSIG = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, how)


def guarded(command: list[str]) -> list[str]:
    """The command line that runs a command under `guard`, as a child of this process."""
    return [sys.executable, "-m", "letterhead.processes", str(os.getpid()), *command]


def guard(parent: int, command: list[str]) -> int:
    """Run a command in a process group of its own; when this, or the parent, ends for whatever reason, so does the group."""
    told = []
    for how in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(how, lambda *_: told.append(True))
    die_with_parent(signal.SIGTERM)
    child = subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent)
    while child.poll() is None and not told and os.getppid() == parent:
        time.sleep(0.1)
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
            f"{work.__name__}: its process was killed, most likely for want of memory; free some and run again"
        ) from None


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(guard(int(sys.argv[1]), sys.argv[2:]))
