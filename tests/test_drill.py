"""Every stage, end to end, and disturbed in every way that we can think of and run again: its files
are those of an undisturbed run.

The tests kill each stage once; `make drill` twenty times, adds the other faults, prints the counts,
and keeps them in runs/drill.json. A stage runs in a process that is forked where the libraries are
imported already, so that a kill and a second run take seconds.
"""

import collections
import contextlib
import errno
import functools
import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError
from tqdm import tqdm

from letterhead import pipeline
from letterhead.config.experiment import load_experiment
from letterhead.files import read_json, read_jsonl, sha256_file, write_json
from letterhead.models.checkpoints import step_of
from letterhead.runs.devices import device_name, machine
from letterhead.runs.results import read_result
from letterhead.runs.stage import telling
from tests.conftest import ROOT, experiment_maker
from tests.test_data import write_csv
from tests.test_prompt import LABELS, nasty_rows

# Stages that only `make drill` kills → whose code they run
SEEN_ELSEWHERE = {
    "tfidf-all": "tfidf",
    "bert-all": "bert",
    "sft-options": "linear-head",
    "rank": "eval-ckpts",
}
MAKERS = {
    name: [stage.module, *filter(None, [stage.argument])]
    for name, stage in pipeline.STAGES.items()
    if stage.when not in (pipeline.never, pipeline.has_teacher)
}
STAGES = dict(MAKERS)
LABELLED = ["serve.predict", "--in", "rows.csv", "--out", "labelled.csv", "--model", "sft"]
STAGES |= {"rank": ["eval.rank"], "export": ["serve.export", "--model", "sft"], "predict": LABELLED}
# Of times and places, which differ from run to run
FLEETING = ("second", "time", "start", "memory", "resumed_from", "runtime", "flos")
# Made of those, or holding them; that they are there is enough
ONLY_THERE = {".log", ".txt", ".png", ".pt", ".pth", ".bin", ".html"}
PATIENCE_S = 300
LARGE = 2 << 30
MISSING = "missing"
KILL, FUTURE = (
    "kill -9 at a random moment",
    "SIGINT and SIGHUP ignored, killed half-way, all times in the future",
)
NOT_LOOKED_AT = (
    "tfevents",
    "trainer_log.jsonl",
    "training_args.yaml",
    "REPORT.md",
    "all_results.json",
    "train_results.json",
)
PRELOADED = [
    "torch",
    "transformers",
    "datasets",
    "llamafactory.data",
    "letterhead.models.scoring",
    "letterhead.models.heads",
    "sklearn",
]


def begin(place: str, output, told: list[str], limit: int | None, ignored: tuple[int, ...]) -> None:
    """A stage, in a process group of its own; what it says goes down a pipe, which no limit and no
    full disk can stop."""
    os.setsid()
    os.chdir(place)
    os.environ["PYTHONPATH"] = str(ROOT)
    for standard in (1, 2):
        os.dup2(output.fileno(), standard)
    for number in (*ignored, *([signal.SIGXFSZ] if limit else [])):
        signal.signal(number, signal.SIG_IGN)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    module, *more = told
    sys.argv = [module, *more, "--experiment", "mine"]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class Started:
    """A stage that was started: its process, and what it has said."""

    def __init__(self, process, output):
        self.process, self._output, self._said = process, output, b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while piece := os.read(self._output.fileno(), 65536):
            self._said += piece

    def wait(self) -> tuple[int, str]:
        """Its exit code, and what it said."""
        self.process.join(PATIENCE_S)
        assert self.process.exitcode is not None, f"hangs: {self._said[-3000:]}"
        self._reader.join(5)
        return self.process.exitcode, self._said.decode(errors="replace")

    def kill(self) -> bool:
        """Kill -9 it and all that it started; False where it had ended by itself."""
        running = self.process.is_alive()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        return running


@pytest.fixture(scope="module")
def forked():
    """Starts a stage: forked(place, stage, …)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def start(
        place: Path, stage: str, limit: int | None = None, ignored: tuple[int, ...] = ()
    ) -> Started:
        output, given = context.Pipe(duplex=False)
        process = context.Process(
            target=begin, args=(str(place), given, STAGES[stage], limit, ignored)
        )
        process.start()
        given.close()
        return Started(process, output)

    return start


def without_times(value):
    """JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {
            key: without_times(of)
            for key, of in value.items()
            if not any(part in key for part in FLEETING)
        }
    return [without_times(of) for of in value] if isinstance(value, list) else value


def made(place: Path) -> dict:
    """What lies in a place, by path, without what tells times."""
    found = {}
    for path in sorted(
        path
        for of in ("data", "runs", "labelled.csv")
        for path in [place / of, *(place / of).rglob("*")]
    ):
        name = str(path.relative_to(place))
        if (
            not path.is_file()
            or path.name == ".lock"
            or any(part in name for part in (*NOT_LOOKED_AT, "broken-", ".old/"))
        ):
            continue
        if path.suffix in ONLY_THERE:
            found[name] = path.stat().st_size > 0
        elif path.name == "stage.json":
            record = read_json(path)
            outputs = [of for of in record["outputs"] if Path(of).suffix not in ONLY_THERE]
            found[name] = without_times(record | {"outputs": sorted(outputs)})
        elif path.suffix == ".jsonl":
            found[name] = [
                without_times(json.loads(line))
                for line in path.read_text().rstrip("\n").split("\n")
                if line
            ]
        else:
            found[name] = (
                without_times(json.loads(path.read_text()))
                if path.suffix == ".json"
                else sha256_file(path)
            )
    return found


def prepared(fetched, tiny_models) -> None:
    """Rows and an experiment, in the working folder."""
    write_csv("rows.csv", nasty_rows(140))
    often = {"learning_rate": 1e-3, "max_length": 128}
    # Evaluated every 7 steps and logged every 2: neither divides the other, nor the epoch of 6.
    head = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "eval_steps": 0.38}
    plain = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "eval_steps": 0.25,
    }
    experiment_maker(fetched, tiny_models)(
        "rows.csv",
        LABELS,
        sft={
            "per_device_train_batch_size": 8,
            "logging_steps": 1,
            "save_steps": 4,
            "learning_rate": 1e-3,
        },
        data={"rows": {"validation": 20, "test": 20}},
        decoder_keys={
            "train_rows": 48,
            "head": head | often,
            "sft_options": head | {"learning_rate": 1e-3},
        },
        encoder_keys={
            "model": str(tiny_models["bert"]),
            "head": plain | often | {"group_by_length": False},
        },
        eval={"thinking": {"rows": 4, "tokens": 4, "batch": 2}},
    )


def size(place: Path) -> int:
    """The bytes of all files under a folder."""
    return sum(
        path.stat().st_size for path in place.rglob("*") if path.is_file() and not path.is_symlink()
    )


@contextlib.contextmanager
def small_disk(place: Path, room: int):
    """Put a place on a file system with so many bytes of room; gives what makes more, or None where
    none can be mounted."""

    def mount(*options: str) -> bool:
        return not subprocess.run(
            ["mount", "-t", "tmpfs", *options, place], capture_output=True
        ).returncode

    def resize(size: int) -> None:
        assert mount("-o", f"remount,size={size}")

    away = place.with_name("away")
    place.rename(away)
    place.mkdir()
    if mounted := mount("-o", f"size={LARGE}", "tmpfs"):
        shutil.copytree(away, place, symlinks=True, dirs_exist_ok=True)
        used = os.statvfs(place)
        resize((used.f_blocks - used.f_bfree) * used.f_frsize + room)
    shutil.rmtree(away)
    try:
        yield functools.partial(resize, LARGE) if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", place], check=True)


class Drill:
    """Counts what was injected and what survived, and keeps the places."""

    def __init__(self, folder: Path, forked):
        self.folder, self._forked = folder, forked
        self.injected, self.survived = collections.Counter(), collections.Counter()
        self.before: dict[str, Path] = {}
        self.after: dict[str, dict] = {}
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}

    def run(self, place: Path, stage: str, **how) -> tuple[int, str]:
        return self.start(place, stage, **how).wait()

    def run_short_of_room(self, place: Path, stage: str, **how) -> None:
        """Run a stage that may end for want of room, and then says so in its last line."""
        code, said = self.run(place, stage, **how)
        told = (
            code == 1
            and said.strip().splitlines()[-1].startswith("error: ")
            and "Traceback" not in said
        )
        assert code == 0 or told, (stage, said[-3000:])

    def start(self, place: Path, stage: str, **how) -> Started:
        return self._forked(place, stage, **how)

    def undisturbed(self, work: Path) -> None:
        """Run all stages, and keep what was there before each."""
        for stage in STAGES:
            self.before[stage] = self.folder / f"before-{stage}"
            shutil.copytree(work, self.before[stage], symlinks=True)
            start = time.monotonic()
            code, said = self.run(work, stage)
            assert code == 0, said[-3000:]
            self.seconds[stage] = time.monotonic() - start
            self.after[stage] = made(work)
            self.bytes[stage] = size(work) - size(self.before[stage])
        self.before["end"] = self.folder / "end"
        shutil.copytree(work, self.before["end"], symlinks=True)

    def place(self, stage: str, behind: bool = False) -> Path:
        """A fresh copy of what was there before a stage began, or behind it; `end` is behind the
        last."""
        order, work = [*STAGES, "end"], self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.before[order[order.index(stage) + behind]], work, symlinks=True)
        return work

    def cut(self, work: Path, stage: str, chance: random.Random) -> None:
        """Cut in half one of the files that a stage made: one that it lists, or the weights of its
        last checkpoint."""
        outputs = [work / of for of in read_json(work / f"runs/mine/{stage}/stage.json")["outputs"]]
        if checkpoints := sorted(
            (work / f"runs/mine/{stage}/checkpoints").glob("checkpoint-*"), key=step_of
        ):
            # One before the last, which nothing goes on from, is set aside and told, not trained
            # again.
            outputs = [of for of in outputs if step_of(of.parent) in (-1, step_of(checkpoints[-1]))]
            outputs += [of for of in checkpoints[-1].iterdir() if of.suffix == ".safetensors"]
        cut = chance.choice(outputs)
        os.truncate(cut, cut.stat().st_size // 2)

    def check(self, work: Path, stage: str, fault: str) -> None:
        """Run the stage again and hold what it made against the undisturbed run."""
        code, said = self.run(work, stage)
        assert code == 0, (stage, fault, said[-3000:])
        found, expected = made(work), self.after[stage]
        differing = {
            name
            for name in found.keys() | expected.keys()
            if found.get(name, MISSING) != expected.get(name, MISSING)
        }
        assert not differing, (
            stage,
            fault,
            {name: (found.get(name), expected.get(name)) for name in sorted(differing)[:4]},
        )
        self.survived[fault] += 1


@pytest.fixture(scope="module")
def drill(request, fetched, tiny_models, forked, tmp_path_factory):
    work = tmp_path_factory.mktemp("drill") / "work"
    work.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        prepared(fetched, tiny_models)
    found = Drill(work.parent, forked)
    found.undisturbed(work)
    yield found
    lines = [
        f"{fault}: {n} injected, {found.survived[fault]} survived"
        for fault, n in found.injected.items()
    ]
    lost = sum(found.injected.values()) - sum(found.survived.values())
    print("\n".join(["", *lines, f"lost: {lost}"]))
    if request.config.getoption("all_faults"):
        counts = {"injected": found.injected, "survived": found.survived, "lost": lost}
        write_json(
            ROOT / "runs/drill.json", counts | {"device": device_name(), "machine": machine()}
        )


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "disk"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        Exception("No space left on device (os error 28)"),  # tokenizers'
    ],
)
def test_a_full_disk_is_told_and_other_faults_are_not_hidden(error, capsys):
    def fail(number: int) -> None:
        raise OSError(number, os.strerror(number))

    with telling():
        for number in (errno.EFBIG, errno.EIO):
            threading.Thread(target=fail, args=[number]).start()
    time.sleep(0.5)
    told = capsys.readouterr().err
    assert "File too large" not in told and "Input/output error" in told
    with (
        pytest.raises(
            SystemExit, match="error: disk: No space left on device; make room and run again"
        ),
        telling(),
    ):
        raise error
    for error in (
        PermissionError(errno.EACCES, "Permission denied", "out.csv"),
        IsADirectoryError(errno.EISDIR, "", "out.csv"),
    ):
        with (
            pytest.raises(SystemExit, match="error: out.csv: .*; mend that and run again"),
            telling(),
        ):
            raise error
    for torchs in (
        "PytorchStreamWriter failed writing file data/0: file write failed",
        "unexpected pos 3916608 vs 3916496",
    ):
        with (
            pytest.raises(SystemExit, match="error: disk: a checkpoint could not be written whole"),
            telling(),
        ):
            raise RuntimeError(f"[enforce fail at inline_container.cc:664] . {torchs}")
    bar = tqdm(total=2)
    with pytest.raises(SystemExit), telling():
        raise error
    assert bar.disable and capsys.readouterr().err.endswith(
        "\n"
    )  # the message has a line of its own
    with pytest.raises(RuntimeError, match="a fault of ours"), telling():
        raise RuntimeError("a fault of ours")
    with pytest.raises(SafetensorError, match="header too large"), telling():
        raise SafetensorError("header too large")


def test_stages_end_to_end(drill, monkeypatch):
    monkeypatch.chdir(work := drill.place("end"))
    experiment = load_experiment("mine")

    # The result files are the design's.
    result = read_json("runs/mine/results/sft@6.json")
    keys = (
        "experiment method step seed split n accuracy precision_macro recall_macro "
        "f1_macro per_class f1_macro_ci95 ece "
    )
    keys += (
        "train_loss eval_loss seconds rows_per_second tokens device dtype model "
        "inputs_sha256 versions"
    )
    assert set(keys.split()) <= set(result) and (result["step"], result["split"], result["n"]) == (
        6,
        "test",
        20,
    )
    predictions = list(read_jsonl("runs/mine/results/sft@6.predictions.jsonl"))
    assert [p["id"] for p in predictions] == [
        row["id"] for row in read_jsonl("data/mine/test.jsonl")
    ]
    for p in predictions:
        assert set(p) == {"id", "label", "prediction", "probabilities", "perplexity"}
        assert abs(sum(p["probabilities"].values()) - 1) < 1e-9
        assert p["prediction"] == min(p["perplexity"], key=p["perplexity"].get)
    assert result["accuracy"] == sum(p["label"] == p["prediction"] for p in predictions) / 20
    table = Path("runs/mine/results/sft_checkpoints.md")
    assert [f"| {step} |" in table.read_text() for step in (0, 4, 6)] == [True] * 3
    optimizers = sorted(
        str(p.parent.name) for p in Path("runs/mine/sft/checkpoints").glob("*/optimizer.pt")
    )
    assert optimizers == ["checkpoint-6"]
    assert "How sure?" in Path("runs/mine/report/report.html").read_text()
    # The best checkpoint on validation and the last are kept, and their results are among those of
    # every evaluation.
    by_step = {
        step: read_result(experiment, f"linear_head@{step}", "validation") for step in (7, 14, 18)
    }
    kept = {
        int(path.name.split("-")[1])
        for path in Path("runs/mine/linear-head/checkpoints").glob("checkpoint-*")
    }
    assert kept == {min(by_step, key=lambda step: by_step[step].log_loss), 18}
    state = read_json("runs/mine/linear-head/checkpoints/checkpoint-18/trainer_state.json")
    logged = {line["step"]: line["loss"] for line in state["log_history"] if "loss" in line}
    mean = (logged[8] + 2 * logged[10] + 2 * logged[12] + 2 * logged[14]) / 7  # of steps 8 to 14
    assert abs(read_result(experiment, "linear_head@14", "test").train_loss - mean) < 1e-6

    # What a model learnt to read is kept with it.
    assert all(
        read_json(f"runs/mine/{stage}/stage.json")["reading"] == experiment.reading
        for stage in ("sft", "bert")
    )

    # Nothing is done again.
    def times() -> dict:
        files = [
            path for of in ("data", "runs") for path in Path(of).rglob("*") if path.name != ".lock"
        ]
        return {path: path.stat().st_mtime_ns for path in files}

    written = times()
    assert [stage for stage in MAKERS if stage in STAGES and drill.run(work, stage)[0]] == []
    assert times() == written
    Path("runs/mine/eval-ckpts/stage.json").unlink()
    assert drill.run(work, "eval-ckpts")[0] == 0  # the table again, but no score
    scores = [path for path in written if path.name.startswith("sft@")]
    assert scores and all(path.stat().st_mtime_ns == written[path] for path in scores)

    # A result that is gone is made again, from its checkpoint.
    Path("runs/mine/results/linear_head@18.json").unlink()
    assert drill.run(work, "linear-head")[0] == 0 and made(work) == drill.after["predict"]

    # So is one whose predictions were cut off.
    of_bert = Path("runs/mine/results").glob("bert@*.predictions.jsonl")
    half = max(of_bert, key=lambda path: int(re.search(r"@(\d+)", path.name)[1]))
    os.truncate(half, half.stat().st_size // 2)
    assert drill.run(work, "bert")[0] == 0 and made(work) == drill.after["predict"]

    # A checkpoint cut in half is set aside, and the table says so.
    half = Path("runs/mine/sft/checkpoints/checkpoint-4/model.safetensors")
    os.truncate(half, half.stat().st_size // 2)
    assert drill.run(work, "sft")[0] == drill.run(work, "eval-ckpts")[0] == 0
    assert Path("runs/mine/sft/checkpoints/broken-checkpoint-4").exists()
    assert "| 4 | not scored: no whole checkpoint" in table.read_text()

    # Other settings train anew and keep the old checkpoints.
    weights = Path("runs/mine/sft/checkpoints/model.safetensors")
    before = sha256_file(weights)
    config = Path("sft.yaml").read_text()
    Path("sft.yaml").write_text(config.replace("learning_rate: 0.001", "learning_rate: 0.002"))
    assert drill.run(work, "sft")[0] == 0
    assert (
        Path("runs/mine/sft/checkpoints.old/checkpoint-6").exists()
        and sha256_file(weights) != before
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_as_if_undisturbed(drill, pytestconfig, stage):
    if stage in SEEN_ELSEWHERE and not pytestconfig.getoption("all_faults"):
        pytest.skip(f"the code is {SEEN_ELSEWHERE[stage]}'s; make drill")
    chance, killed, longest = random.Random(stage), 0, 0.9 * drill.seconds[stage]
    while killed < pytestconfig.getoption("kills"):
        work = drill.place(stage)
        started = drill.start(work, stage)
        time.sleep(chance.uniform(0, longest))
        if started.kill():
            killed += 1
            drill.injected[KILL] += 1
            drill.check(work, stage, KILL)
        else:
            assert started.process.exitcode == 0, f"{stage} fails by itself"
            longest *= 0.8  # it was slower when its time was taken
            assert longest > 0.01, f"{stage} ends before it can be killed"


@pytest.mark.parametrize("stage", STAGES)
def test_a_disturbed_stage_ends_as_if_undisturbed(drill, pytestconfig, stage):
    if not pytestconfig.getoption("all_faults"):
        pytest.skip("takes long; make drill")
    chance = random.Random(stage)

    def inject(fault: str, **where) -> Path:
        drill.injected[fault] += 1
        return drill.place(stage, **where)

    for _ in range(max(1, pytestconfig.getoption("kills") // 5)):
        work = inject("file-size limit")
        drill.run_short_of_room(work, stage, limit=int(10 ** chance.uniform(2, 7)))
        drill.check(work, stage, "file-size limit")
        work = inject("full file system")
        with small_disk(work, int(chance.uniform(0, drill.bytes[stage]))) as make_room:
            if make_room:
                drill.run_short_of_room(work, stage)
                make_room()
                drill.check(work, stage, "full file system")
            else:
                drill.injected["full file system"] -= 1
    work = inject(FUTURE)
    started = drill.start(work, stage, ignored=(signal.SIGINT, signal.SIGHUP))
    time.sleep(drill.seconds[stage] / 2)
    started.kill()
    for path in work.rglob("*"):
        os.utime(path, (4e9, 4e9), follow_symlinks=False)
    drill.check(work, stage, FUTURE)
    if stage in MAKERS:
        work = inject("an output cut in half", behind=True)
        drill.cut(work, stage, chance)
        drill.check(work, stage, "an output cut in half")
    work = inject("two at once")
    for code, said in [started.wait() for started in [drill.start(work, stage) for _ in range(2)]]:
        assert code == 0 or (code == 1 and "another process" in said and "Traceback" not in said), (
            stage,
            said[-3000:],
        )
    drill.check(work, stage, "two at once")
