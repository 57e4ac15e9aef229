"""Label files of any number of rows with Ray Data: a worker a GPU, or a core; a Parquet part for
some thousand rows.

    python -m serve.predict_by_ray --experiment quick --in s3://bucket/rows --out labels --model sft

A task reads a file, as `serve.predict` does, and cuts it into parts. Workers label and write them.
A part is written beside its place and moved, so one that is there is whole. A run that was killed
makes the parts that are missing. A worker that dies is started again and gets its part anew.
"""

import json
import os
import re
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.fs
import pyarrow.parquet
import ray
import ray.data

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, sha256_json
from letterhead.models.classifier import CHUNK, asks_a_service, named_method
from letterhead.rows import tables
from letterhead.runs.devices import unusable_gpu
from letterhead.runs.stage import OFFLINE, run
from letterhead.runs.terminal import TERMINAL, progress, say
from serve.predict import (
    COUNTED,
    Labelling,
    alone,
    as_share,
    choose,
    fetch_named,
    labelled,
    load,
    parquet_schema,
    read_table,
    require_different,
    with_numbers,
)

PART_ROWS = 8 * CHUNK
# In OUT. Readers of a folder of Parquet leave out what begins with an underscore.
INPUTS = "_inputs.sha256"
COUNTS = b"letterhead"  # a part's own counts, in its metadata
RAYS_WORDS = "\nFailed to apply UDF transform"  # what it adds to an error
STORE_BYTES = 1 << 29  # what Ray may hold of parts between reading and labelling
DEATHS = 3  # of one worker, after which the run ends
READERS = 16  # of the counts of parts that are there


def main(
    experiment: Experiment,
    source: str,
    target: str,
    model: str,
    error: str = "",
    workers: str = "",
) -> None:
    allowed = as_share(error) if error else None
    fetch_named(experiment, model)
    os.environ.update(OFFLINE)
    name = named_method(experiment, model)
    if asks_a_service(experiment, name):
        raise LetterheadError(
            f"{name}: asks a hosted LLM, which counts questions, not workers; leave ENGINE= out"
        )
    chosen = choose(experiment, name, allowed)
    files = Files(source)
    parts = Parts(target)
    parts.require_outside(files)
    with ExitStack() as stack:
        if not is_uri(target):
            stack.enter_context(alone(Path(target)))
        log = experiment.run_folder / "predict_by_ray.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        TERMINAL.turn_aside(log)  # Ray says much
        n, cores, gpus = stack.enter_context(cluster(workers))
        device = "a GPU" if gpus else "cpu"
        inputs = {"files": files.identity, "rows": PART_ROWS, **chosen.inputs(experiment)}
        done = parts.begin(sha256_json({**inputs, "device": device}))
        say(
            f"{source}: files: {len(files.paths):,}; workers: {n}, each with "
            f"{'a GPU' if gpus else f'{cores:g} of the cores'}; parts done before: {len(done):,}"
        )
        total = parts.counts(done)
        cut = ray.data.from_items(
            [{"number": number} for number in range(len(files.paths))],
            override_num_blocks=len(files.paths),
        ).map_batches(
            Cutter(experiment, files, set(done), os.getcwd()),
            batch_size=1,
            num_cpus=0,
            compute=ray.data.TaskPoolStrategy(size=min(n, len(files.paths))),
        )
        counts = cut.map_batches(
            Labeller,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=n),
            num_cpus=0 if gpus else cores,
            num_gpus=gpus,
            max_restarts=DEATHS,
            max_task_retries=DEATHS,
            fn_constructor_args=[experiment, chosen, parts, cores, os.getcwd()],
        )
        bar = stack.enter_context(
            progress(desc=f"predicting with {name}", unit=" rows", initial=total["rows"])
        )
        labelled_now = 0
        try:
            for of_part in counts.iter_rows():
                found = json.loads(of_part["counts"])
                total.update(found)
                bar.update(found["rows"])
                labelled_now += 1
        except Exception as failure:
            raise told(failure) from None
        if len(parts.names()) != len(done) + labelled_now:
            raise LetterheadError(
                f"{target}: {labelled_now:,} parts were labelled, and "
                f"{len(parts.names()) - len(done):,} came; every worker must reach this folder by "
                f"the same path"
            )
    TERMINAL.turn_back()
    chosen.tell(target, total)


def is_uri(name: str) -> bool:
    """Whether a name says how it is reached, as s3://bucket/rows does."""
    return bool(re.match(r"[a-z][a-z0-9+.-]*://", name))


def place(name: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of a path or a URI, and the path in it.

    Raises
    ------
    LetterheadError : no such file system
    """
    if not is_uri(name):
        return pyarrow.fs.LocalFileSystem(), str(Path(name).absolute())
    with reaching(name):
        return pyarrow.fs.FileSystem.from_uri(name)


@contextmanager
def reaching(name: str) -> Iterator[None]:
    """A block in which a file system is asked.

    Raises
    ------
    LetterheadError : it says no
    """
    try:
        yield
    except (pyarrow.ArrowException, OSError, ImportError) as error:
        raise LetterheadError(
            f"{name}: can't be reached ({error}); name a path, or a URI like s3://bucket/folder"
        ) from None


class Files:
    """The files to label: the one that is named, or those of a folder whose kind is known, in the
    order of their names.

    Parameters
    ----------
    source : a path or a URI

    Attributes
    ----------
    paths : in the file system
    names : as messages tell them
    identity : what changes where a file does

    Raises
    ------
    LetterheadError : there is none
    """

    def __init__(self, source: str):
        self.filesystem, self.path = place(source)
        with reaching(source):
            [info] = self.filesystem.get_file_info([self.path])
            if info.type == pyarrow.fs.FileType.NotFound:
                raise LetterheadError(f"{source}: no such file or folder; say IN=folder")
            inside = [info]
            if not info.is_file:
                everything = pyarrow.fs.FileSelector(self.path, recursive=True)
                entries = self.filesystem.get_file_info(everything)
                inside = [entry for entry in entries if entry.is_file]
        found, left = [], []
        for one in sorted(inside, key=lambda info: info.path):
            name = one.path.removeprefix(self.path).strip("/")
            hidden = any(part.startswith(("_", ".")) for part in name.split("/"))
            is_read = info.is_file or (tables.kind(Path(name)) and not hidden)
            (found if is_read else left).append((one, name))
        if not found:
            raise LetterheadError(f"{source}: holds no file of a kind that is read")
        if left:
            print(f"{source}: {len(left):,} files of other kinds are left out, as {left[0][1]}")
        self.paths = [one.path for one, _ in found]
        self.names = [f"{source.rstrip('/')}/{name}" if name else source for _, name in found]
        self.identity = [[one.path, one.size, one.mtime_ns] for one, _ in found]

    @contextmanager
    def on_disk(self, number: int) -> Iterator[Path]:
        """The path of a file; one from elsewhere is fetched for the time of the block.

        Raises
        ------
        LetterheadError : it can't be fetched; or the block's, with the name that the user gave
        """
        path, name = self.paths[number], self.names[number]
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(path)
            if self.filesystem.type_name != "local":
                copy = Path(folder) / copy.name
                with (
                    reaching(name),
                    self.filesystem.open_input_stream(path, compression=None) as there,
                    open(copy, "wb") as file,
                ):
                    shutil.copyfileobj(there, file)
            try:
                yield copy
            except LetterheadError as error:
                raise LetterheadError(str(error).replace(str(copy), name)) from None


class Parts:
    """The folder of the parts.

    Parameters
    ----------
    target : a path or a URI
    """

    def __init__(self, target: str):
        self.name = target
        self.filesystem, self.folder = place(target)

    def require_outside(self, files: Files) -> None:
        """
        Raises
        ------
        LetterheadError : the folder lies among the files to label
        """
        is_inside = f"{self.folder}/".startswith(f"{files.path.rstrip('/')}/")
        if is_inside and self.filesystem.equals(files.filesystem):
            raise LetterheadError(f"{self.name}: OUT lies in IN; name another folder")

    def begin(self, inputs_sha256: str) -> list[str]:
        """Make the folder, and give the names of the parts that are there already.

        Raises
        ------
        LetterheadError : it holds something else
        """
        with reaching(self.name):
            self.filesystem.create_dir(self.folder, recursive=True)
            there = self.filesystem.get_file_info(pyarrow.fs.FileSelector(self.folder))
            names = [info.base_name for info in there]
            then = None
            if INPUTS in names:
                with self.filesystem.open_input_stream(f"{self.folder}/{INPUTS}") as file:
                    then = file.read().decode()
            visible = [name for name in names if not name.startswith(".")]
            if visible and then != inputs_sha256:
                raise LetterheadError(
                    f"{self.name}: holds the parts of other rows, of files that changed since, or "
                    f"of another model or experiment; remove it, or name another OUT"
                )
            for name in set(names).difference(visible):  # of a worker that was killed
                self.filesystem.delete_file(f"{self.folder}/{name}")
            if then is None:
                with self._beside(INPUTS) as path, self.filesystem.open_output_stream(path) as file:
                    file.write(inputs_sha256.encode())
            return self.names()

    def names(self) -> list[str]:
        """Of the parts that are whole."""
        there = self.filesystem.get_file_info(pyarrow.fs.FileSelector(self.folder))
        return [info.base_name for info in there if info.base_name.startswith("part-")]

    def counts(self, names: list[str]) -> Counter:
        """What was counted in these parts together."""

        def counted(name: str) -> dict[str, int]:
            path = f"{self.folder}/{name}"
            metadata = pyarrow.parquet.read_schema(path, filesystem=self.filesystem).metadata
            return json.loads(metadata[COUNTS])

        total = Counter(dict.fromkeys(COUNTED, 0))
        with reaching(self.name), ThreadPoolExecutor(READERS) as pool:
            for found in pool.map(counted, names):
                total.update(found)
        return total

    def write(self, name: str, table: pyarrow.Table) -> None:
        """Write a part."""
        with self._beside(name) as path:
            pyarrow.parquet.write_table(table, path, filesystem=self.filesystem)

    @contextmanager
    def _beside(self, name: str) -> Iterator[str]:
        """A path to write to, of its own for each who writes; after the block it is moved to its
        name."""
        path = f"{self.folder}/.{name}.{uuid.uuid4().hex}"
        yield path
        self.filesystem.move(path, f"{self.folder}/{name}")


@contextmanager
def cluster(workers: str) -> Iterator[tuple[int, float, int]]:
    """Ray, on this machine alone unless RAY_ADDRESS names a cluster: how many workers, and each
    one's cores and GPUs.

    Parameters
    ----------
    workers : how many; empty: one a GPU, or one a core where there is none

    Raises
    ------
    LetterheadError : no such number, more than there are GPUs, or no cluster there
    """
    if workers and (not workers.isdecimal() or not int(workers)):
        raise LetterheadError(f"NPROC={workers}: not a number of workers; write NPROC=2")
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as scratch:
        asked = {"log_to_driver": False, "logging_level": "error"}
        if not (address := os.environ.get("RAY_ADDRESS")):
            asked |= {
                "address": "local",
                "include_dashboard": False,
                "object_store_memory": STORE_BYTES,
                "_node_ip_address": "127.0.0.1",
                "_temp_dir": scratch,
            }
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            ray.init(**asked, runtime_env={"env_vars": OFFLINE})
        except (ConnectionError, RuntimeError) as error:
            raise LetterheadError(
                f"Ray does not begin at RAY_ADDRESS={address or ''}: {error}"
            ) from None
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.target_max_block_size = 1  # each part is a block of its own, for any worker
        context.execution_no_progress_timeout_s = -1  # a part may take a slow model an hour
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            gpus = int(sum(node.get("GPU", 0) for node in nodes))
            cores = [int(node.get("CPU", 0)) for node in nodes]
            n = int(workers or gpus or sum(cores))
            if gpus and n > gpus:
                raise LetterheadError(f"NPROC={n}, but Ray sees {gpus} GPUs; lower NPROC")
            if not n or not max(cores):
                raise LetterheadError("Ray sees no core; start it with some: ray start --num-cpus")
            yield n, cores_of_one(n, cores), min(gpus, 1)
        finally:
            ray.shutdown()


def cores_of_one(n: int, cores: list[int]) -> float:
    """The most cores that each of n workers can have on machines with so many: a whole number, or
    a share of one.

    Examples
    --------
    >>> cores_of_one(2, [2]), cores_of_one(3, [16, 16, 16, 16]), cores_of_one(3, [2])
    (1, 16, 0.6666)
    """
    for each in range(max(cores), 0, -1):
        if sum(of_machine // each for of_machine in cores) >= n:
            return each
    return int(1e4 * sum(cores) / n) / 1e4


class Cutter:
    """Cuts a file into parts.

    Parameters
    ----------
    done : the names of parts that are left out
    folder : the one that relative paths start from
    """

    def __init__(self, experiment: Experiment, files: Files, done: set[str], folder: str):
        self._experiment, self._files, self._done, self._folder = experiment, files, done, folder

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        """Each part: its name, and columns and rows as JSON."""
        os.chdir(self._folder)
        [number] = batch["number"]
        with self._files.on_disk(number) as path:
            header, rows = read_table(path, self._experiment)
            for at in count():
                if not (part_rows := list(islice(rows, PART_ROWS))):
                    break
                part = f"part-{number:05}-{at:06}.parquet"
                if part not in self._done:
                    content = [self._files.names[number], header, part_rows]
                    yield {"part": [part], "rows": [json.dumps(content)]}


class Labeller:
    """A worker: the method, loaded once, which labels and writes parts.

    Parameters
    ----------
    cores : for its computing, where there is no GPU
    folder : the one that relative paths start from
    """

    def __init__(
        self, experiment: Experiment, chosen: Labelling, parts: Parts, cores: float, folder: str
    ):
        import torch

        os.chdir(folder)
        torch.set_num_threads(max(1, int(cores)))
        self._experiment, self._parts, self._failure = experiment, parts, None
        try:
            # What this machine computes in, which may be another than the one that asks
            here = choose(experiment, chosen.name, None)
            self._chosen = replace(here, promised=chosen.promised)
            self._classify = load(ExitStack(), experiment, self._chosen, 1)
        except LetterheadError as error:  # of one that is raised here Ray keeps no type
            self._failure = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """A part's counts, once it is written."""
        if self._failure:
            raise self._failure
        [part], [content] = batch["part"], batch["rows"]
        source, header, rows = json.loads(content)
        columns = self._chosen.columns(self._experiment, header)
        require_different(source, columns, ".parquet")
        counts, written = Counter(dict.fromkeys(COUNTED, 0)), []
        for start in range(0, len(rows), CHUNK):
            found = labelled(self._classify, rows[start : start + CHUNK])
            counts.update(self._chosen.counted(*found))
            for line in self._chosen.lines(self._experiment, *found[:2]):
                plain = [field.encode(errors="replace").decode() for field in line]
                written.append(with_numbers(plain, columns, len(header)))
        schema = parquet_schema(columns, len(header)).with_metadata({COUNTS: json.dumps(counts)})
        self._parts.write(part, pyarrow.Table.from_pylist(written, schema))
        return {"counts": [json.dumps(counts)]}


def told(failure: BaseException | None) -> BaseException:
    """What a task or a worker raised, out of what Ray wraps around it."""
    first = failure
    while failure:
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, LetterheadError):
            TERMINAL.turn_back()  # Ray's log says no more
            return LetterheadError(str(cause).partition(RAYS_WORDS)[0])
        if isinstance(cause, OSError):
            return cause
        if isinstance(failure, ray.exceptions.RayActorError | ray.exceptions.WorkerCrashedError):
            return LetterheadError(
                f"a worker died {DEATHS + 1} times, most likely for want of memory: each holds a "
                f"model; lower NPROC and run again"
            )
        failure = failure.__cause__ or failure.__context__
    return first


def require_usable_gpu() -> None:
    """
    Raises
    ------
    LetterheadError : there is a GPU that torch can't use
    """
    if refused := unusable_gpu():
        raise LetterheadError(refused)


if __name__ == "__main__":
    run(
        main,
        __doc__.splitlines()[0],
        options={
            "in": "a file or a folder of files, here or at a URI that pyarrow knows, as s3://…",
            "out": "the folder of the parts, here or there",
            "model": "best, a method, or a model: hf:OWNER/ID@REVISION, or a path",
        },
        optional={
            "error": "the share of wrong answers that is allowed; none: answer every row",
            "workers": "how many; none: one a GPU, or one a core where there is none",
        },
        devices=require_usable_gpu,
    )
