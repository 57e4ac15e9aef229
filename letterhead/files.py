"""What goes to disk, and how: whole or not at all.

A file is written beside its place, flushed to the disk, then renamed, so that a reader (or a later
run after a kill) finds the old file or the new one and never half of one.
"""

import hashlib
import html
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import jsonlines
from filelock import lock_descriptor

# Where a fetched model's folder says what it is; its key for the hashes of the files beside the
# weights.
SOURCE, BESIDE = "letterhead_source.json", "beside"


class LetterheadError(Exception):
    """Something that the user can mend; the message says where it is and how."""


@contextmanager
def atomic_open(path: Path | str) -> Iterator[IO[str]]:
    """Open a UTF-8 text file that takes the place of `path` only when the block ends without an
    error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(
        f".{path.name}.tmp"
    )  # one name: what a killed run left is overwritten
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Give an empty folder that takes the place of `path` only when the block ends without an
    error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def exclusive(path: Path | str) -> Iterator[None]:
    """Wait until no other process is inside the block for the same lock file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        lock_descriptor(lock.fileno())
        yield


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as UTF-8 JSON with sorted keys."""
    with atomic_open(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=2, sort_keys=True)
        file.write("\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file; a missing one, or one that does not parse, is None (it is made again)."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def write_jsonl(path: Path | str, rows: Iterable[dict]) -> None:
    """Write one JSON object a line, keys sorted."""
    with atomic_open(path) as file, jsonlines.Writer(file, sort_keys=True) as writer:
        writer.write_all(rows)


def read_jsonl(path: Path | str) -> Iterator[dict]:
    """Yield the objects of a JSON Lines file, one at a time."""
    with jsonlines.open(path) as reader:
        yield from reader


def whole_lines(path: Path) -> list:
    """The values of a file that grows by a line of JSON at a time; what a kill left of a line is
    cut off."""
    if not path.exists():
        return []
    whole, _, rest = path.read_bytes().rpartition(b"\n")
    if rest:
        os.truncate(path, len(whole) + bool(whole))
    return [json.loads(line) for line in whole.splitlines()]


def escape_markdown(value: object) -> str:
    """A value that neither Markdown nor HTML inside it reads as markup, on one line."""
    return re.sub(
        r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False)
    )


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, in hex: equal values, equal hashes."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()


def model_identity(folder: Path) -> dict:
    """What tells one model from another: the source it was fetched from and its weights, else the
    hashes of its files."""
    files = (
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".safetensors", ".onnx", ".json", ".txt", ".model")
    )
    if record := read_json(folder / SOURCE):
        return {key: value for key, value in record.items() if key != BESIDE}
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}
