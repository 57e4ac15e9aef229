"""What a person sees while a stage runs: a line when it begins, a bar, a line when it ends.

What our code prints and the libraries say goes to the stage's log.txt meanwhile, which an error
names and quotes. `make … VERBOSE=1` shows all of it. Without a terminal there are no bars.
"""

import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

LAST_LINES = 12
# The descriptor of the terminal, for the processes that a stage starts
INHERITED = "LETTERHEAD_TERMINAL"


class Terminal:
    """The terminal of this process. Only what `make` starts turns its output aside: `is_quiet` is
    set by it."""

    def __init__(self):
        self.is_quiet = False
        self.log: Path | None = None
        self._kept: list[int] = []
        self._errors = None

    def turn_aside(self, log: Path) -> None:
        """Send what is printed from here on, by this process and those that it starts, to a log."""
        if not self.is_quiet or self.log:
            return
        self.log = log
        _flush()
        self._kept = [os.dup(1), os.dup(2)]
        os.environ[INHERITED] = str(self._kept[1])
        os.set_inheritable(self._kept[1], True)
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)

    def turn_back(self) -> None:
        """Print to the terminal again."""
        if not self.log:
            return
        _flush()
        for kept, descriptor in zip(self._kept, (1, 2), strict=True):
            os.dup2(kept, descriptor)
            os.close(kept)
        os.environ.pop(INHERITED, None)
        self.log, self._kept, self._errors = None, [], None

    @property
    def descriptors(self) -> list[int]:
        """What a child must inherit to draw bars."""
        return self._kept[1:]

    def errors(self):
        """The file that bars are drawn to: the terminal, or, in a process that did not inherit it
        (a worker of several), standard error."""
        inherited = self._kept[1] if self._kept else int(os.environ.get(INHERITED, 2))
        if inherited == 2:
            return sys.stderr
        if self._errors is None or self._errors.closed:
            try:
                self._errors = os.fdopen(os.dup(inherited), "w", buffering=1)
            except OSError:
                return sys.stderr
        return self._errors


TERMINAL = Terminal()


def say(line: str) -> None:
    """Print a line that a person is to see at once: to the terminal, also while output is turned
    aside."""
    print(line, flush=True)
    if TERMINAL.log:
        os.write(TERMINAL.descriptors[0], (line + "\n").encode(errors="replace"))


def progress(*iterable: Any, **settings: Any) -> tqdm:
    """A bar of tqdm's on the terminal, if there is one."""
    file = TERMINAL.errors()
    disable = settings.pop("disable", False) or not (file.isatty() or "pytest" in sys.modules)
    return tqdm(*iterable, file=file, disable=disable, **settings)


def last_lines(log: Path) -> str:
    """The end of a log, indented; of a bar what it came to."""
    lines = [
        line.rpartition("\r")[2]
        for line in log.read_text(errors="replace").splitlines()
        if line.strip()
    ]
    return "\n".join(f"  | {line}" for line in lines[-LAST_LINES:])


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
