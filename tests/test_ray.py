"""Labelling by Ray: the single process's answers, whoever is killed meanwhile."""

import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest

from prep import data
from serve import predict
from tests.conftest import ROOT
from tests.test_data import write_csv
from tests.test_prompt import LABELS, nasty_rows

PYTHON = ROOT / ".venv-ray/bin/python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no Ray: make setup-ray")
FILES = 3
ROWS = 9000  # a file: a part, and a few rows of the next


@pytest.fixture
def experiment(make_experiment, tiny_models):
    write_csv("rows.csv", nasty_rows(120))
    made = make_experiment("rows.csv", LABELS, data={"rows": {"validation": 10, "test": 20}})
    data.main(made)
    return made


def begin(source: str, target: str, model: str = "tfidf") -> subprocess.Popen:
    command = [PYTHON, "-m", "serve.predict_by_ray", "--experiment", "mine", "--model", model]
    command += ["--in", source, "--out", target, "--workers", "2"]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=variables, **pipes)


def end(process: subprocess.Popen) -> tuple[int, str]:
    output, errors = process.communicate(timeout=300)
    return process.returncode, output + errors


def parts(folder: str = "labels") -> list[Path]:
    return sorted(Path(folder).glob("part-*"))


def wait_for(happened, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def labellers(process: subprocess.Popen) -> list[psutil.Process]:
    """The workers' processes, as Ray names them."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):
            found += [child] if "(Labeller)" in " ".join(child.cmdline()) else []
    return found


@pytest.fixture
def singles(experiment) -> list[pyarrow.Table]:
    """What a single process writes for each file of the folder `in`."""
    Path("in").mkdir()
    Path("in/_notes.csv").write_text("not a file of rows\n")
    for number in range(FILES):
        rows = [(f"{number} {text}", label) for text, label in nasty_rows(ROWS)]
        write_csv(f"in/{number}.csv", rows)
        predict.main(experiment, f"in/{number}.csv", f"{number}.parquet", "tfidf")
    return [pyarrow.parquet.read_table(f"{number}.parquet") for number in range(FILES)]


def merged() -> pyarrow.Table:
    tables = map(pyarrow.parquet.read_table, parts())
    return pyarrow.concat_tables(tables).replace_schema_metadata()


def test_a_worker_that_is_killed_loses_no_part(singles):
    process = begin("in", "labels")
    wait_for(lambda: parts() and labellers(process), process)
    before = labellers(process)
    before[0].kill()
    wait_for(lambda: set(labellers(process)) - set(before), process)
    status, told = end(process)
    assert status == 0 and f"labels: {FILES * ROWS:,} rows labelled by tfidf" in told, told
    assert merged().equals(pyarrow.concat_tables(singles))
    # As others read the folder: without what begins with an underscore
    assert pyarrow.parquet.read_table("labels").num_rows == FILES * ROWS


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_parts_that_are_missing(singles):
    process = begin("in", "labels")
    wait_for(parts, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = parts()
    assert 0 < len(before) < 2 * FILES
    kept = [part.stat().st_mtime_ns for part in before]
    status, told = end(begin("in", "labels"))
    assert status == 0 and f"parts done before: {len(before)}" in told, told
    assert [part.stat().st_mtime_ns for part in before] == kept
    assert merged().equals(pyarrow.concat_tables(singles))


def test_a_row_that_cannot_be_read_is_named_and_a_folder_of_others_is_left_alone(experiment):
    write_csv("in.csv", [*nasty_rows(30), ("", LABELS[0])])
    status, told = end(begin(f"file://{Path('in.csv').absolute()}", "labels"))
    assert status and re.search(r"^error: file://.*in.csv, row 31 .* \(or .*\)\n\Z", told, re.M), (
        told
    )
    Path("labels/part-00000-000000.parquet").write_bytes(b"another's")
    write_csv("in.csv", nasty_rows(31))
    status, told = end(begin("in.csv", "labels"))
    assert status and "labels: holds the parts of other rows" in told, told
    assert Path("labels/part-00000-000000.parquet").read_bytes() == b"another's"


def test_a_decoder_answers_as_in_a_single_process_whatever_the_files_are_called(experiment):
    Path("in/more of it").mkdir(parents=True)
    names = ["1%20 #2.csv", "more of it/3.csv"]
    for name in names:
        write_csv(f"in/{name}", [(f"{name} {text}", label) for text, label in nasty_rows(40)])
    Path("in/notes.pdf").write_text("no table")
    status, told = end(begin(f"file://{Path('in').absolute()}", "labels", "sft@0"))
    assert status == 0 and "1 files of other kinds are left out, as notes.pdf" in told, told
    for name, part in zip(names, parts(), strict=True):
        predict.main(experiment, f"in/{name}", "single.parquet", "sft@0")
        single, ours = (
            pyarrow.parquet.read_table("single.parquet"),
            pyarrow.parquet.read_table(part),
        )
        assert ours.column_names == single.column_names
        for column in single.column_names:
            found, wanted = (table[column].to_pylist() for table in (ours, single))
            if column.startswith("p("):  # another number of threads adds in another order
                assert np.abs(np.subtract(found, wanted)).max() < 1e-5
            else:
                assert found == wanted
