"""Give every row of a file a label and probabilities; rows stream, order is kept, a killed run goes
on.

    python -m serve.predict --experiment quick --in rows.csv --out labelled.csv --model best

Rows go through in chunks of a fixed size; while a GPU is at one, the next is read and tokenised. A
chunk that is done is in OUT.part, and OUT.part.json says how far that file holds; so a run that was
killed goes on behind it and ends with the bytes it would have written undisturbed.
"""

import csv
import io
import json
import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from filelock import lock_descriptor

from letterhead.config.experiment import Experiment
from letterhead.files import (
    LetterheadError,
    atomic_open,
    exclusive,
    model_identity,
    read_json,
    sha256_file,
    sha256_json,
    write_json,
)
from letterhead.models import embeddings, onnx, tfidf
from letterhead.models.checkpoints import base_of, require_model
from letterhead.models.classifier import (
    CHUNK,
    CascadeClassifier,
    Classifier,
    frozen_cascade,
    in_parts,
    is_cascade,
    is_source,
    load_classifier,
    load_raw,
    model_folder,
    named_method,
)
from letterhead.models.precision import precision
from letterhead.models.prompt import keep_words
from letterhead.pipeline import DATA, HOSTED_LLM, METHODS, find_method, outputs
from letterhead.rows import tables
from letterhead.rows.fetch import CACHE, fetch_model
from letterhead.rows.sources import (
    RawRow,
    checked_text,
    column_at,
    every_column,
    open_source,
    plain_file,
)
from letterhead.runs import contenders, results
from letterhead.runs.devices import device_name, process_count
from letterhead.runs.processes import Workers
from letterhead.runs.stage import OFFLINE, run
from letterhead.runs.terminal import progress
from letterhead.stats.abstention import SURE, Promise, promise
from letterhead.stats.cascade import Cascade
from letterhead.stats.metrics import tempered

DIGITS = 6
# Of 300 BBC News texts nine changed class between float32 and bfloat16, all with gaps below 0.03.
NEAR_TIE = 0.1
# What is counted of the rows: all, those without a text, near ties, those that a cascade passed on,
# and those without an answer
COUNTED = ("rows", "without", "near", "passed", "unanswered")


def main(experiment: Experiment, source: str, target: str, model: str, error: str = "") -> None:
    allowed = as_share(error) if error else None
    fetch_named(experiment, model)
    os.environ.update(OFFLINE)
    source, target = Path(source), Path(target)
    if target.resolve() == source.resolve():
        raise LetterheadError(f"{target}: OUT is IN; name another file")
    header, table = read_table(source, experiment)
    chosen = choose(experiment, named_method(experiment, model), allowed)
    name = chosen.name
    if target.is_dir():
        raise LetterheadError(f"{target}: is a folder; name a file")
    if target.suffix.lower() not in FORMS:
        raise LetterheadError(f"{target}: OUT is written as {', '.join(FORMS)}; name one of them")
    part, progress_file = (target.with_name(target.name + end) for end in (".part", ".part.json"))
    inputs = sha256_json(
        {"source": sha256_file(source), "processes": process_count(), **chosen.inputs(experiment)}
    )
    with ExitStack() as stack:
        stack.enter_context(alone(target))
        done = read_json(progress_file)
        if not (
            done
            and "unanswered" in done
            and done["inputs"] == inputs
            and part.is_file()
            and part.stat().st_size >= done["bytes"]
        ):
            done = {"inputs": inputs, "bytes": 0, **dict.fromkeys(COUNTED, 0)}
        if done["rows"]:
            print(f"{part}: goes on behind row {done['rows']:,}")
        classify = load(stack, experiment, chosen, process_count())
        file = stack.enter_context(open(part, "ab"))
        bar = stack.enter_context(
            progress(desc=f"predicting with {name}", unit=" rows", initial=done["rows"])
        )
        file.truncate(done["bytes"])
        columns = chosen.columns(experiment, header)
        if target.suffix.lower() != ".csv":
            require_different(source, columns, target.suffix)
        if not done["rows"]:
            file.write(as_csv([columns]))
        rows = islice(table, done["rows"], None)
        chunks = iter(lambda: list(islice(rows, CHUNK * process_count())), [])
        # On a CPU tokenising would take from the model's cores, and torch is slower in any thread
        # but the first.
        overlap = process_count() == 1 and device_name() != "cpu"
        for chunk, probabilities, passed in (
            ahead(classify, chunks)
            if overlap
            else (labelled(classify, part_of_rows) for part_of_rows in chunks)
        ):
            file.write(as_csv(chosen.lines(experiment, chunk, probabilities)))
            file.flush()
            os.fsync(file.fileno())
            for what, n in chosen.counted(chunk, probabilities, passed).items():
                done[what] += n
            done["bytes"] = file.tell()
            write_json(progress_file, done)
            bar.update(len(chunk))
        FORMS[target.suffix.lower()](part, target, len(header))
        part.unlink(missing_ok=True)
        progress_file.unlink(missing_ok=True)
    chosen.tell(str(target), done)


@dataclass(frozen=True)
class Labelling:
    """The method that labels rows.

    Parameters
    ----------
    name : in full
    frozen : a cascade's threshold and halves; None for any other method
    promised : from which confidence on it answers; None: always
    parts, folders, dtypes : of each half, or of the method: name, folder (None: it is fitted where
        it is used), and the type that it computes in (False or None where it has no say)
    """

    name: str
    frozen: Cascade | None
    promised: Promise | None
    parts: list[str]
    folders: list[Path | None]
    dtypes: list[str | bool | None]

    def inputs(self, experiment: Experiment) -> dict[str, Any]:
        """Whatever decides an answer, but for the text."""
        return {
            "method": self.name,
            "models": [
                model_identity(folder) if folder else fitted_from(experiment, part)
                for part, folder in zip(self.parts, self.folders, strict=True)
            ],
            "halves": self.frozen and asdict(self.frozen),
            "promise": self.promised and asdict(self.promised),
            "temperatures": [contenders.temperature_of(experiment, part) for part in self.parts],
            "experiment": experiment.model_dump(mode="json", exclude={"bench"}),
            "device": [device_name(), *self.dtypes],
        }

    def columns(self, experiment: Experiment, header: list[str]) -> list[str]:
        """The columns that are written: the file's own, and those of an answer."""
        abstains = ["abstain"] if self.promised else []
        return [
            *header,
            "prediction",
            *abstains,
            *(f"p({label})" for label in experiment.labels),
        ]

    def lines(
        self, experiment: Experiment, chunk: list, probabilities: np.ndarray
    ) -> list[list[str]]:
        """The rows of a chunk of (fields, text) with their answers; one without a text has empty
        ones."""
        found = iter(probabilities)
        nothing = [""] * len(self.columns(experiment, []))
        return [
            [*fields, *(of_row(experiment, next(found), self.promised) if text else nothing)]
            for fields, text in chunk
        ]

    def counted(self, chunk: list, probabilities: np.ndarray, passed: int) -> dict[str, int]:
        """How many rows of a chunk are of each kind in `COUNTED`."""
        return {
            "rows": len(chunk),
            "without": sum(not text for _, text in chunk),
            "near": near_ties(probabilities) if "bfloat16" in self.dtypes else 0,
            "passed": passed,
            "unanswered": int((~probabilities.any(axis=-1)).sum()),
        }

    def tell(self, target: str, done: dict[str, int]) -> None:
        """Say what was labelled, and what the reader should know of it."""
        if done["near"]:
            print(
                f"{done['near']:,} rows have two classes within {NEAR_TIE:g}: in bfloat16 rounding "
                "may decide there (decoder.dtype=float32 does not hang on it)"
            )
        if self.frozen and (answered := done["rows"] - done["without"]):
            print(
                f"{self.frozen.dear} was asked about {done['passed']:,} of {answered:,} texts "
                f"({done['passed'] / answered:.1%}), {self.frozen.cheap} answered the others"
            )
        if done["unanswered"]:
            print(f"{done['unanswered']:,} rows got no answer and are left empty")
        left = (
            f", {done['without']:,} of them without a text and left empty"
            if done["without"]
            else ""
        )
        print(f"{target}: {done['rows']:,} rows labelled by {self.name}{left}")


def choose(experiment: Experiment, name: str, error: float | None) -> Labelling:
    """A method by its full name, its models looked at, with a promise where `error` allows wrong
    answers.

    Raises
    ------
    LetterheadError : a model is missing or broken, or nothing can be promised
    """
    frozen = frozen_cascade(experiment, name) if is_cascade(name) else None
    promised = promise_of(experiment, name, error) if error else None
    parts = [frozen.cheap, frozen.dear] if frozen else [name]
    folders = [None if is_fitted(part) else model_folder(experiment, part) for part in parts]
    for folder in filter(None, folders):
        if not onnx.is_saved(folder):
            require_model(folder)
    dtypes = [
        folder
        and not any(module.is_saved(folder) for module in (embeddings, onnx, tfidf))
        and precision(experiment.decoder.dtype, base_of(folder))
        for folder in folders
    ]
    return Labelling(name, frozen, promised, parts, folders, dtypes)


def load(stack: ExitStack, experiment: Experiment, chosen: Labelling, processes: int) -> Classifier:
    """The method, loaded in so many processes, which end with the stack; rows of like length go
    together."""
    pools = [
        stack.enter_context(
            Workers(
                # A service counts the questions of a minute, whoever asks them.
                1 if find_method(part) is HOSTED_LLM else processes,
                load_raw if chosen.frozen else load_classifier,
                experiment,
                part,
            )
        )
        for part in chosen.parts
    ]
    for workers in pools:
        workers.load()
    classifiers = [in_parts(workers) for workers in pools]
    return CascadeClassifier(chosen.frozen, *classifiers) if chosen.frozen else classifiers[0]


def require_different(source: Path | str, columns: list[str], ending: str) -> None:
    """Formats other than CSV know a column by its name.

    Raises
    ------
    LetterheadError : two have the same
    """
    twice = [name for name, times in Counter(columns).items() if times > 1]
    if twice:
        raise LetterheadError(
            f"{source}: {ending} would have two columns {twice[0]!r}; rename one, or write "
            f"OUT=….csv"
        )


def fetch_named(experiment: Experiment, model: str) -> None:
    """Fetch a model that MODEL= names on a hub; nothing is done for another."""
    if model.startswith("hf:"):
        with exclusive(CACHE / ".lock"):
            fetch_model(model, model_folder(experiment, model))


def near_ties(probabilities: np.ndarray) -> int:
    """How many rows have their two highest probabilities, of shape (rows, classes), nearer than
    `NEAR_TIE`."""
    highest = np.sort(probabilities, axis=-1)[:, -2:]
    return int((highest[:, 1] - highest[:, 0] < NEAR_TIE).sum()) if len(probabilities) else 0


def is_fitted(name: str) -> bool:
    """Whether a method has no checkpoint on disk, and is fitted where it is used."""
    method = METHODS.get(name)
    if method is None or method.is_saved:
        return False
    return bool(method.fitter) or not method.model


def fitted_from(experiment: Experiment, name: str) -> dict[str, Any]:
    """What a method is fitted from: the rows, and the encoder that stays as it is."""
    method = METHODS[name]
    frozen = model_identity(method.section(experiment).folder) if method.model else None
    return {"rows": outputs(DATA, experiment), "encoder": frozen}


def of_row(
    experiment: Experiment, probabilities: np.ndarray, promised: Promise | None
) -> list[str]:
    """The label, with a promise whether to abstain from it, and each label's probability; of a
    hosted LLM that named none, nothing."""
    if not probabilities.any():
        return [""] * (1 + (promised is not None) + len(probabilities))
    abstains = [] if promised is None else [str(int(probabilities.max() < promised.threshold))]
    return [
        experiment.labels[int(probabilities.argmax())],
        *abstains,
        *(f"{value:.{DIGITS}f}" for value in probabilities),
    ]


def as_share(error: str) -> float:
    """ERROR as a number.

    Raises
    ------
    LetterheadError : it is no share between 0 and 1
    """
    try:
        share = float(error)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise LetterheadError(f"ERROR={error}: not a share of wrong answers; write ERROR=0.05")
    return share


def promise_of(experiment: Experiment, name: str, error: float) -> Promise:
    """From which confidence on a method may answer; told with what it does on test rows.

    Raises
    ------
    LetterheadError : its validation rows promise nothing of the kind, or it has none
    """
    if is_source(name):
        raise LetterheadError(
            f"{name}: a promise needs validation rows, and those of a folder are not known; name "
            f"the method that it was made from, or leave ERROR= out"
        )
    scored = results.parse_result(results.result_files(experiment, name, "validation")[0])
    if scored is None or scored.log_loss is None:
        raise LetterheadError(
            f"{name}: no validation row has probabilities, so nothing can be promised; leave "
            f"ERROR= out, or set data.rows.validation and run: make report EXP={experiment.name}"
        )
    at, sure = contenders.temperature_of(experiment, name), {}
    for split in results.SPLITS:
        lines = results.read_predictions(experiment, name, split)
        probabilities = contenders.read_probabilities(experiment, name, split)
        probabilities = tempered(probabilities, at) if at else probabilities
        right = probabilities.argmax(axis=1) == results.class_numbers(experiment, lines)
        sure[split] = (probabilities.max(axis=1), right)
    found = promise(*sure["validation"], error)
    rows = len(sure["validation"][0])
    if found is None:
        raise LetterheadError(
            f"{name}: {rows} validation rows can't promise that at most {error:.1%} of its answers "
            f"are wrong; allow more with ERROR=, or label more rows for data.rows.validation"
        )
    answered, wrong = found.measured(*sure["test"])
    print(
        f"{name}: abstains below {found.threshold:.3f}; so at most {error:.1%} of its answers are "
        f"wrong ({SURE:.0%} sure, by {rows} validation rows, of which it answers "
        f"{found.answered:.0%}). Of the test rows it answers {answered:.0%}, {wrong:.1%} of them "
        "wrongly"
    )
    return found


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """A block in which no other process writes what makes `target`.

    Raises
    ------
    LetterheadError : another is at it
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.lock")
    with open(path, "w") as lock:
        is_mine = lock_descriptor(lock.fileno(), blocking=False)
        # Its holder may have just ended and removed it.
        if (
            not is_mine
            or not path.exists()
            or not os.path.samestat(path.stat(), os.fstat(lock.fileno()))
        ):
            raise LetterheadError(
                f"{target}: another process is writing it; wait for it, or name another OUT"
            )
        try:
            yield
        finally:
            path.unlink()


def labelled(classify: Classifier, chunk: list) -> tuple[list, np.ndarray, int]:
    """A chunk of (fields, text), the probabilities of the texts that it has, and how many of them a
    cascade's dear half answered."""
    texts = [text for _, text in chunk if text]
    if not texts:
        return chunk, np.empty((0, 0)), 0
    if isinstance(classify, CascadeClassifier):
        probabilities, deferred = classify.answer(texts)
        return chunk, probabilities, int(deferred.sum())
    return chunk, classify(texts), 0


def ahead(classify: Classifier, chunks: Iterator[list]) -> Iterator[tuple[list, np.ndarray, int]]:
    """Each chunk labelled, in order, two at work at once. What is before a chunk that can't be read
    still comes."""
    waiting, broken = deque(), None
    with ThreadPoolExecutor(2) as pool:
        while True:
            try:
                if chunk := next(chunks, None):
                    waiting.append(pool.submit(labelled, classify, chunk))
            except LetterheadError as error:
                chunk, broken = None, error
            if not waiting:
                break
            if not chunk or len(waiting) == 2:
                yield waiting.popleft().result()
    if broken:
        raise broken


def as_csv(lines: list[list[str]]) -> bytes:
    """Lines as CSV in UTF-8, halves of surrogate pairs, which no file holds, as question marks."""
    text = io.StringIO(newline="")
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for line in lines:  # Python before 3.13 quotes no lone carriage return, which ends a line
        (quoted if any("\r" in field for field in line) else plain).writerow(line)
    return text.getvalue().encode(errors="replace")


def keep_csv(part: Path, target: Path, fields: int) -> None:
    """The rows as they are."""
    part.replace(target)


def read_answers(part: Path, fields: int) -> Iterator[dict[str, Any]]:
    """The rows of a CSV that a run leaves behind: the file's own fields as text, whether to abstain
    and probabilities as numbers; None where a row got no answer.

    Parameters
    ----------
    fields : how many columns the file had
    """
    with open(part, encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        names = next(reader)
        for row in reader:
            yield with_numbers(row, names, fields)


def with_numbers(row: list[str], names: list[str], fields: int) -> dict[str, Any]:
    """A row of a CSV (see `read_answers`) by the names of its columns."""
    own, answered = row[:fields], row[fields:]
    values = [
        (int if name == "abstain" else float)(value) if value else None
        for name, value in zip(names[fields + 1 :], answered[1:], strict=True)
    ]
    return dict(zip(names, [*own, answered[0] or None, *values], strict=True))


def write_jsonl(part: Path, target: Path, fields: int) -> None:
    """The rows as JSON Lines."""
    with atomic_open(target) as lines:
        for row in read_answers(part, fields):
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def parquet_schema(names: list[str], fields: int) -> pyarrow.Schema:
    """The columns' types: the file's own `fields` and the label as text, probabilities as
    numbers."""
    kinds = [pyarrow.string()] * (fields + 1) + [pyarrow.float64()] * (len(names) - fields - 1)
    return pyarrow.schema(
        (name, pyarrow.int64() if name == "abstain" and at == fields + 1 else kind)
        for at, (name, kind) in enumerate(zip(names, kinds, strict=True))
    )


def write_parquet(part: Path, target: Path, fields: int) -> None:
    """The rows as Parquet, a batch at a time."""
    with open(part, encoding="utf-8", newline="") as file:
        names = next(csv.reader(file))
    schema = parquet_schema(names, fields)
    rows, written = read_answers(part, fields), target.with_name(f"{target.name}.written")
    try:
        with pyarrow.parquet.ParquetWriter(written, schema) as writer:
            while batch := list(islice(rows, CHUNK)):
                writer.write_table(pyarrow.Table.from_pylist(batch, schema))
        written.replace(target)
    finally:
        written.unlink(missing_ok=True)


# Ending of OUT → what writes it from the CSV that a run leaves behind
FORMS = {".csv": keep_csv, ".jsonl": write_jsonl, ".parquet": write_parquet}


def read_table(
    path: Path, experiment: Experiment
) -> tuple[list[str], Iterator[tuple[list[str], str]]]:
    """The columns of a file, and each row's fields and text, as training reads it; the text is
    empty for a row that training leaves out: a blank one, and, where the experiment drops bad rows,
    one without a text or with a wrong number of fields.

    Raises
    ------
    LetterheadError : no such file, or not one column that the text needs; a row that cannot be
        read, or that has no text and may not be dropped, names file and row
    """
    if not path.is_file():
        raise LetterheadError(f"{path}: no such file; say IN=file.csv")
    data, keys = experiment.data, {"encoding": experiment.data.encoding}
    if tables.kind(path) == tables.kind(Path(data.source.partition("#")[0])):
        keys |= {"skip_lines": data.skip_lines, "header": data.header}
        if data.sheet and data.sheet in tables.sheet_names(path):
            keys["sheet"] = data.sheet
    if keys.get("skip_lines"):
        print(
            f"{path}: {data.skip_lines} lines below the header are left out, as in training "
            f"(data.skip_lines)"
        )
    every = every_column(plain_file(str(path), **keys))
    header = every.columns.parts
    if len(header) == len(data.columns.parts) == 1 and not tables.has_names(path, every):
        return header, read_rows(open_source(every).splits["train"], experiment, [0], 1)
    if missing := [name for name in data.columns.parts if name not in header]:
        raise LetterheadError(
            f"{path}: no column {missing[0]!r}; {experiment.name} reads "
            f"{', '.join(data.columns.parts)}, and this file has {', '.join(header)}; rename its "
            f"columns, or name the experiment that it belongs to: EXP=…"
        )
    at = [column_at(path, header, name) for name in data.columns.parts]
    return header, read_rows(open_source(every).splits["train"], experiment, at, len(header))


def read_rows(
    rows: Iterator[RawRow], experiment: Experiment, at: list[int], width: int
) -> Iterator[tuple[list[str], str]]:
    """Each row's fields, so many as `width`, and its text (see `read_table`), whose parts stand at
    `at`."""
    columns = experiment.data.columns
    for row in rows:
        values, text = row.text or [], ""
        try:
            if row.fault:
                raise ValueError(row.fault)
            if values:
                row.text = columns.join([values[i] for i in at])
                text = keep_words(checked_text(row), experiment.data.max_words).strip()
        except (LetterheadError, ValueError) as error:
            if experiment.data.bad_rows == "stop":
                problem = error if isinstance(error, LetterheadError) else f"{row.place}: {error}"
                raise LetterheadError(
                    f"{problem} (or leave its answer empty: data.bad_rows: drop)"
                ) from None
        yield [as_field(value) for value in islice(chain(values, repeat("")), width)], text


def as_field(value: Any) -> str:
    """A value as a field of a CSV file: what JSON knows as JSON writes it, a time or a decimal
    number as Python does."""
    if value is None:
        return ""
    known = isinstance(value, bool | int | float | list | dict)
    return json.dumps(value, ensure_ascii=False, default=str) if known else str(value)


if __name__ == "__main__":
    run(
        main,
        __doc__.splitlines()[0],
        options={
            "in": "a file of texts",
            "out": "where to write: .csv, .jsonl or .parquet",
            "model": "best, a method, or a model: hf:OWNER/ID@REVISION, or a path",
        },
        optional={"error": "the share of wrong answers that is allowed; none: answer every row"},
    )
