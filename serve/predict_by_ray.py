"""Label files of any number of rows with Ray Data: a worker a GPU, or so many cores; a Parquet part
for some thousand rows.

    python -m serve.predict_by_ray --experiment quick --in s3://bucket/rows --out labels --model sft

A task reads a file, as `serve.predict` does, and cuts it into parts. Workers label and write them.
A part is written beside its place and moved, so one that is there is whole. A run that was killed
makes the parts that are missing, and Ray gives the part of a worker that died to another.
"""

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
from letterhead.models.classifier import CHUNK, asks_a_service, load_classifier, named_method
from letterhead.rows import tables
from letterhead.runs.stage import OFFLINE, run
from letterhead.runs.terminal import TERMINAL, progress, say
from serve.predict import (
    COUNTED,
    Chosen,
    alone,
    as_share,
    choose,
    fetch_named,
    labelled,
    parquet_schema,
    read_table,
    require_different,
    with_numbers,
)

PART_ROWS = 8 * CHUNK
# In OUT. Readers of a folder of Parquet leave out what begins with an underscore.
INPUTS = "_inputs.json"
COUNTS = b"letterhead"  # a part's own counts, in its metadata
RAYS_WORDS = "\nFailed to apply UDF transform"  # what it adds to an error
STORE_BYTES = 1 << 29  # what Ray may hold of parts between reading and labelling
Place = tuple[pyarrow.fs.FileSystem, str]


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
    files = input_files(source)
    inputs = {
        "files": [[file, info.size, info.mtime_ns] for file, info in files.items()],
        "part_rows": PART_ROWS,
        **chosen.inputs(experiment),
    }
    with ExitStack() as stack:
        if not is_uri(target):
            stack.enter_context(alone(Path(target)))
        done = begin(target, sha256_json(inputs))
        log = experiment.run_folder / "predict_by_ray.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        TERMINAL.turn_aside(log)  # Ray says much
        n, cores, gpus = stack.enter_context(cluster(workers))
        say(
            f"{source}: files: {len(files):,}; workers: {n}, each with "
            f"{'a GPU' if gpus else f'{cores:g} of the cores'}; parts done before: {len(done):,}"
        )
        parts = ray.data.from_items(
            [{"number": number, "file": file} for number, file in enumerate(files)],
            override_num_blocks=len(files),
        ).map_batches(cut, batch_size=1, num_cpus=0, fn_args=[experiment, done])
        counts = parts.map_batches(
            Labeller,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=n),
            num_cpus=0 if gpus else cores,
            num_gpus=gpus,
            fn_constructor_args=[experiment, chosen, target, cores],
        )
        bar = stack.enter_context(progress(desc=f"predicting with {name}", unit=" rows"))
        try:
            for labelled_part in counts.iter_rows():
                bar.update(int(labelled_part["rows"]))
        except Exception as failure:
            if isinstance(found := told(failure), LetterheadError):
                TERMINAL.turn_back()  # Ray's log says no more
            raise found from None
        total = Counter(dict.fromkeys(COUNTED, 0))
        filesystem, folder = place(target)
        for part in parts_of(filesystem, folder):
            schema = pyarrow.parquet.read_schema(f"{folder}/{part}", filesystem=filesystem)
            total.update(json.loads(schema.metadata[COUNTS]))
    TERMINAL.turn_back()
    chosen.tell(target, total)


def is_uri(name: str) -> bool:
    """Whether a name says how it is reached, as s3://bucket/rows does."""
    return bool(re.match(r"[a-z][a-z0-9+.-]*://", name))


def place(name: str) -> Place:
    """The file system of a path or a URI, and the path in it.

    Raises
    ------
    LetterheadError : no such file system
    """
    if not is_uri(name):
        return pyarrow.fs.LocalFileSystem(), str(Path(name).absolute())
    try:
        return pyarrow.fs.FileSystem.from_uri(name)
    except (pyarrow.ArrowException, OSError, ImportError) as error:
        raise LetterheadError(
            f"{name}: can't be reached ({error}); name a path, or s3://…"
        ) from None


def input_files(source: str) -> dict[str, pyarrow.fs.FileInfo]:
    """The files to label: the one that is named, or those of a folder whose kind is known, in the
    order of their names.

    Raises
    ------
    LetterheadError : there is none
    """
    filesystem, path = place(source)
    [info] = filesystem.get_file_info([path])
    if info.type == pyarrow.fs.FileType.NotFound:
        raise LetterheadError(f"{source}: no such file or folder; say IN=folder")
    if info.is_file:
        return {source: info}
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    inside = {info.path.removeprefix(path).strip("/"): info for info in found if info.is_file}
    files = {
        f"{source.rstrip('/')}/{name}": info
        for name, info in sorted(inside.items())
        if not any(part.startswith(("_", ".")) for part in name.split("/"))
        and tables.kind(Path(name))
    }
    if not files:
        raise LetterheadError(f"{source}: holds no file of a kind that is read")
    return files


def begin(target: str, inputs_sha256: str) -> list[str]:
    """Make the folder of the parts, and give the names of those that are there already.

    Raises
    ------
    LetterheadError : it holds something else
    """
    filesystem, folder = place(target)
    filesystem.create_dir(folder, recursive=True)
    there = filesystem.get_file_info(pyarrow.fs.FileSelector(folder))
    names = [info.base_name for info in there]
    if INPUTS in names:
        with filesystem.open_input_stream(f"{folder}/{INPUTS}") as file:
            then = file.read().decode()
    if names and (INPUTS not in names or then != inputs_sha256):
        raise LetterheadError(
            f"{target}: holds files that other rows, another model or another experiment made; "
            f"remove it, or name another OUT"
        )
    with filesystem.open_output_stream(f"{folder}/{INPUTS}") as file:
        file.write(inputs_sha256.encode())
    for name in names:
        if name.startswith("."):  # of a worker that was killed
            filesystem.delete_file(f"{folder}/{name}")
    return parts_of(filesystem, folder)


def parts_of(filesystem: pyarrow.fs.FileSystem, folder: str) -> list[str]:
    """The names of the parts that are whole, in order."""
    there = filesystem.get_file_info(pyarrow.fs.FileSelector(folder))
    return sorted(info.base_name for info in there if info.base_name.startswith("part-"))


@contextmanager
def cluster(workers: str) -> Iterator[tuple[int, float, int]]:
    """Ray, on this machine alone unless RAY_ADDRESS names a cluster: how many workers, and each
    one's cores and GPUs.

    Parameters
    ----------
    workers : how many; empty: one a GPU, or one a core where there is none

    Raises
    ------
    LetterheadError : no such number, or more than there are GPUs
    """
    if workers and (not workers.isdecimal() or not int(workers)):
        raise LetterheadError(f"NPROC={workers}: not a number of workers; write NPROC=2")
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as scratch:
        asked = {"log_to_driver": False, "logging_level": "error"}
        if not os.environ.get("RAY_ADDRESS"):
            asked |= {
                "address": "local",
                "include_dashboard": False,
                "object_store_memory": STORE_BYTES,
                "_node_ip_address": "127.0.0.1",
                "_temp_dir": scratch,
            }
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        ray.init(**asked)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.target_max_block_size = 1  # each part is a block of its own, for any worker
        try:
            held = ray.cluster_resources()
            gpus, cores = int(held.get("GPU", 0)), int(held.get("CPU", 1))
            n = int(workers or gpus or cores)
            if gpus and n > gpus:
                raise LetterheadError(f"NPROC={n}, but Ray sees {gpus} GPUs; lower NPROC")
            each = cores / n
            yield n, int(each) if each > 1 else each, min(gpus, 1)
        finally:
            ray.shutdown()


def cut(
    batch: dict[str, Any], experiment: Experiment, done: list[str]
) -> Iterator[dict[str, list[str]]]:
    """A file's parts, but for those that are done: name, and header and rows as JSON."""
    [number], [file] = batch["number"], batch["file"]
    done = set(done)
    with on_disk(str(file)) as path:
        header, rows = read_table(path, experiment)
        for at in count():
            if not (part_rows := list(islice(rows, PART_ROWS))):
                break
            part = f"part-{number:05}-{at:06}.parquet"
            if part not in done:
                yield {"part": [part], "rows": [json.dumps([str(file), header, part_rows])]}


@contextmanager
def on_disk(name: str) -> Iterator[Path]:
    """The path of a file; one from elsewhere is fetched for the time of the block.

    Raises
    ------
    LetterheadError : it can't be fetched; or, from the block, what names the copy, named as the
        file
    """
    if not is_uri(name):
        yield Path(name)
        return
    filesystem, path = place(name)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / Path(path).name
        try:
            with (
                filesystem.open_input_stream(path, compression=None) as there,
                open(copy, "wb") as file,
            ):
                shutil.copyfileobj(there, file)
            yield copy
        except OSError as error:
            raise LetterheadError(f"{name}: can't be fetched ({error}); run again") from None
        except LetterheadError as error:
            raise LetterheadError(str(error).replace(str(copy), name)) from None


class Labeller:
    """A worker: the method, loaded once, which labels and writes parts.

    Parameters
    ----------
    target : the folder of the parts
    cores : for its computing, where there is no GPU
    """

    def __init__(self, experiment: Experiment, chosen: Chosen, target: str, cores: float):
        import torch

        torch.set_num_threads(max(1, int(cores)))
        self._experiment, self._chosen = experiment, chosen
        self._filesystem, self._folder = place(target)
        self._classify = load_classifier(experiment, chosen.name)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
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
        table = pyarrow.Table.from_pylist(written, schema)
        beside = f"{self._folder}/.{part}"
        pyarrow.parquet.write_table(table, beside, filesystem=self._filesystem)
        self._filesystem.move(beside, f"{self._folder}/{part}")
        return {"rows": [counts["rows"]]}


def told(failure: BaseException | None) -> BaseException:
    """What a task or a worker raised, out of what Ray wraps around it."""
    first = failure
    while failure:
        if isinstance(cause := getattr(failure, "cause", failure), LetterheadError):
            return LetterheadError(str(cause).partition(RAYS_WORDS)[0])
        failure = failure.__cause__ or failure.__context__
    return first


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
        devices=lambda: None,
    )
