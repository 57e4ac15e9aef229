"""One stage of the pipeline: is it up to date, is it running elsewhere, and what is written of it.

A stage hashes the configuration keys that it reads and the hashes of its inputs. The record that it
leaves, `runs/<experiment>/<stage>/stage.json`, holds that hash and the sizes of the files it made;
while both still hold, the stage has nothing to do.
"""

import argparse
import errno
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from filelock import lock_descriptor
from tqdm import tqdm

from letterhead import pipeline
from letterhead.config.experiment import Experiment, load_experiment
from letterhead.files import LetterheadError, read_json, sha256_file, sha256_json, write_json
from letterhead.pipeline import STAGES, Stage
from letterhead.runs.devices import choose_devices, device_name, machine, peak_memory, versions
from letterhead.runs.terminal import TERMINAL, last_lines

# The transformers libraries ask the hub about a model even where its folder lies on disk. Only
# `make data` fetches.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

# A killed training needs some seconds to give its memory, and the lock, back.
LOCK_PATIENCE_S = 20
BAR = 20
RECORD, LOG = "stage.json", "log.txt"
# A full disk, a quota, and a limit on the size of files
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR)
# Under runs/NAME: the seconds of each stage, and those to do; `make status` leaves it.
ESTIMATE = "estimate.json"


def minutes(seconds: float) -> str:
    """Seconds as an estimate in words."""
    if seconds < 90:
        return "less than a minute" if seconds < 45 else "about a minute"
    return (
        f"about {seconds / 60:.0f} minutes"
        if seconds < 5400
        else f"about {seconds / 3600:.1f} hours"
    )


class StageRun:
    """One run of a stage: its lock, what it is made from, and the record that it leaves.

    Parameters
    ----------
    experiment : Experiment
    stage : an entry of STAGES; or the name of a folder, for what is no stage of the pipeline (a
        bench, a study)
    inputs : whatever decides the result of what is no stage; anything JSON can hold
    """

    def __init__(self, experiment: Experiment, stage: Stage | str, inputs: Any = None):
        self.is_listed = isinstance(stage, Stage)
        self.name = stage.name if self.is_listed else stage
        self.folder = experiment.run_folder / self.name
        self.inputs_sha256 = (
            pipeline.inputs_sha256(stage, experiment) if self.is_listed else sha256_json(inputs)
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(
            self.folder / ".lock", "w"
        )  # held until the stage is finished, or this process ends
        patience = time.time() + LOCK_PATIENCE_S
        while not lock_descriptor(self.lock_descriptor, blocking=False):
            if time.time() > patience:
                raise LetterheadError(
                    f"{self.folder}: another process is running this stage; wait for it, or end "
                    f"it, and run again"
                )
            time.sleep(0.2)
        self._start, self._estimated = time.time(), None

    @property
    def lock_descriptor(self) -> int:
        """The lock's descriptor, for a child's `pass_fds`: a training that outlives its parent
        still holds the lock."""
        return self._lock.fileno()

    @property
    def record(self) -> dict:
        """What the last finished run wrote, or an empty dictionary."""
        return read_record(self.folder)

    def has_other_inputs(self) -> bool:
        """Whether the last finished run was from other inputs."""
        return self.record.get("inputs_sha256", self.inputs_sha256) != self.inputs_sha256

    def is_current(self) -> bool:
        """Whether the last finished run had the same inputs and its files are still there, at their
        sizes."""
        return is_current(self.record, self.inputs_sha256)

    def start(self) -> None:
        """Begin the work: the record of the last run goes before its files are touched, and what is
        done is told."""
        (self.folder / RECORD).unlink(missing_ok=True)
        self._announce()
        if self.is_listed:
            TERMINAL.turn_aside(self.folder / LOG)

    def _announce(self) -> None:
        """Say how long this stage will take, and how far `make report` is, where `make status` has
        estimated it."""
        path = self.folder.parent / ESTIMATE
        plan = read_json(path) or {"seconds": {}}
        does = f"{self.name}: {STAGES[self.name].does}" if self.is_listed else self.name
        if self.name not in plan["seconds"]:
            if self.is_listed:
                print(does, flush=True)
            return
        asked = path.stat().st_mtime
        records = {name: self.folder.parent / name / RECORD for name in plan["to_do"]}
        to_do = [
            name
            for name, file in records.items()
            if not file.is_file() or file.stat().st_mtime < asked
        ]
        left, total = (
            sum(plan["seconds"].get(name, 0.0) for name in names)
            for names in (to_do, plan["to_do"])
        )
        share = 1 - left / total if total else 0.0
        bar = "█" * round(BAR * share) + "░" * (BAR - round(BAR * share))
        report = f"; report {bar} {share:.0%}, {minutes(left)} to go"
        is_part = not (self.is_listed and was_asked(STAGES[self.name].make_target))
        self._estimated = plan["seconds"][self.name]
        takes = minutes(self._estimated)
        print(f"{does}: {takes}{report if is_part else ''}", flush=True)

    def tell_current(self) -> None:
        """Say that there is nothing to do."""
        print(f"{self.name}: up to date{self._headline(self.record)}", flush=True)

    def _headline(self, record: dict) -> str:
        return f"; {record['headline']}" if record.get("headline") else ""

    def begin(self, folder: Path) -> None:
        """Make sure that what lies in `folder` comes from the same inputs; else keep it aside as
        FOLDER.old."""
        marker = self.folder / "inputs.json"
        if folder.exists() and read_json(marker) != self.inputs_sha256:
            old = folder.with_name(folder.name + ".old")
            print(
                f"{folder}: made from other data or settings; kept as {old}, this stage begins anew"
            )
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        write_json(marker, self.inputs_sha256)

    def finish(self, outputs: list[Path], headline: str = "", **figures: Any) -> dict:
        """Write the stage's record: the files it made with sizes and hashes, the time it took, and
        `figures`; say in a line that it is done, and what it found, `headline`."""
        record = {
            "start": datetime.fromtimestamp(self._start, UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self._start, 1),
            "estimated_seconds": self._estimated and round(self._estimated, 1),
            "inputs_sha256": self.inputs_sha256,
            "outputs": {
                str(p): {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in outputs
            },
            "device": device_name(),
            "machine": machine(),
            "versions": versions(),
            **peak_memory(),
            "headline": headline,
        } | figures
        write_json(self.folder / RECORD, record)
        self._lock.close()
        TERMINAL.turn_back()
        if self.is_listed:
            print(f"{self.name}: {record['seconds']:,.0f} s{self._headline(record)}", flush=True)
        return record


def read_record(folder: Path) -> dict[str, Any]:
    """What the last finished run of a stage wrote to its folder, or an empty dictionary."""
    return read_json(folder / RECORD) or {}


def is_current(record: dict[str, Any], inputs_sha256: str) -> bool:
    """Whether a record is of a run with these inputs, and its files are still there, at their
    sizes."""
    return record.get("inputs_sha256") == inputs_sha256 and all(
        Path(path).is_file() and Path(path).stat().st_size == output["bytes"]
        for path, output in record["outputs"].items()
    )


def is_running(experiment: Experiment, name: str) -> bool:
    """Whether another process is at work on a stage."""
    path = experiment.run_folder / name / ".lock"
    if not path.exists():
        return False
    with open(path) as lock:
        return not lock_descriptor(lock.fileno(), blocking=False)


def run(
    main: Callable[..., None],
    description: str,
    choices: Sequence[str] = (),
    options: dict[str, str] | None = None,
    optional: dict[str, str] | None = None,
    devices: Callable[[], None] = choose_devices,
    with_arguments: bool = False,
) -> None:
    """Run a stage script: read --experiment and --set, call `main`, turn what the user can mend
    into one message.

    With `choices` the first argument is one of them, and `main` gets it after the experiment; then
    it gets the values of `options` (name → what it is), each of which must be given, and those of
    `optional`. `devices` chooses the devices before anything starts them. `with_arguments` hands on
    what --experiment and --set said, to who starts other stages.
    """
    parser = argparse.ArgumentParser(description=description)
    if choices:
        parser.add_argument("choice", choices=choices)
    parser.add_argument(
        "--experiment", default="quick", help="a name in experiments/, or the path of a YAML file"
    )
    parser.add_argument("--set", default="", help='keys to override: "data.rows.test=100 seed=1"')
    for name, meaning in (options or {}).items():
        parser.add_argument(f"--{name}", required=True, help=meaning)
    for name, meaning in (optional or {}).items():
        parser.add_argument(f"--{name}", default="", help=meaning)
    arguments = parser.parse_args()
    values = [getattr(arguments, name) for name in options or ()]
    asked = zip((options or {}).items(), values, strict=True)
    if missing := [
        f"{name.upper()}=… ({meaning})" for (name, meaning), value in asked if not value
    ]:
        sys.exit(f"error: say {'; '.join(missing)}")
    if os.environ.get("HF_ENDPOINT"):  # a mirror, and few mirrors speak hf-xet's protocol
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    TERMINAL.is_quiet = not os.environ.get("VERBOSE") and "RANK" not in os.environ
    with telling():
        devices()
        experiment = load_experiment(arguments.experiment, arguments.set)
        pipeline.left_out(experiment)  # a name that can't be is refused before anything is made
        command_line = [arguments.experiment, arguments.set] if with_arguments else []
        values += [getattr(arguments, name) for name in optional or ()]
        main(experiment, *([arguments.choice] if choices else []), *command_line, *values)


def was_asked(target: str) -> bool:
    """Whether the user asked make for a target by name, or no make is at work; else another target
    needs it."""
    return target in os.environ.get("ASKED", target).split()


def is_absent(stage: Stage, experiment: Experiment, why: str = "not of this experiment") -> bool:
    """Whether the experiment has no such stage; who asked for it by name is told why."""
    if stage.is_in(experiment):
        return False
    if was_asked(stage.make_target):
        left_out = stage.name in pipeline.stages_left_out(experiment)
        print(f"{stage.name}: {'left out, as leave_out says' if left_out else why}")
    return True


def told_of_thread(ended: threading.ExceptHookArgs) -> None:
    """A thread's error as Python prints it, but for a full disk's: TensorBoard's writer hands that
    on to the block."""
    if getattr(ended.exc_value, "errno", None) not in NO_ROOM:
        threading.__excepthook__(ended)


@contextmanager
def telling() -> Iterator[None]:
    """End the process with one message where the block fails for a reason that the user can
    mend."""
    threading.excepthook = told_of_thread
    try:
        yield
    except LetterheadError as error:
        end(f"error: {error}")
    except KeyboardInterrupt:
        end("interrupted; run again to go on from here")
    except Exception as error:
        found = re.search(
            r"\(os error (\d+)\)", str(error)
        )  # those of safetensors and tokenizers are no OSErrors
        number = int(found[1]) if found else getattr(error, "errno", None)
        place = getattr(error, "filename", None)
        if number in NO_ROOM:
            why = (
                f"{place or 'disk'}: {os.strerror(number)}; make room and run again, nothing "
                f"is half-written"
            )
        elif re.search(
            "PytorchStreamWriter failed|unexpected pos", str(error)
        ):  # torch's is a RuntimeError
            why = (
                "disk: a checkpoint could not be written whole; make room and run again, it is "
                "not used"
            )
        elif place and number in CLOSED:
            why = f"{place}: {os.strerror(number)}; mend that and run again"
        else:
            TERMINAL.turn_back()
            raise
        end(f"error: {why}")


def end(message: str) -> NoReturn:
    """End the process with a line of its own, below what progress bars have left on theirs."""
    for bar in list(tqdm._instances):
        bar.close()
    if log := TERMINAL.log:
        TERMINAL.turn_back()
        message += f"\n{log} ends with:\n{last_lines(log)}" if log.stat().st_size else ""
    sys.exit(message)
