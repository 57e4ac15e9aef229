"""Checkpoints that the Trainer wrote: which are whole, which can be resumed from, what may be
deleted.

The Trainer resumes from the highest-numbered folder, whole or not. It writes trainer_state.json
last, so a checkpoint is whole when that file parses, every safetensors file is as long as its own
header says, and its weights are numbers.
"""

import json
import math
import os
import shutil
import time
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from letterhead.files import LetterheadError, model_identity, read_json, write_json

FLOAT = 4  # bytes of a float32, in which all weights are trained and saved
GIB = 1 << 30
ADAPTER = "adapter_config.json"  # peft's, beside an adapter's weights
MERGED_FROM = "merged_from.json"  # in a folder that was made of an adapter and its base
BASE = "base.json"  # which base an adapter was trained on
# In the names of what peft adds to a model while an adapter is trained
BESIDE_A_MODEL = ("lora_", "original_module")
# How the architectures of language models end
# What the last layer of a sequence classifier is called, and of a SentenceTransformer that ends in
# one
LAST_LAYERS = ("score", "classifier", "classifier.out_proj", "logits_proj", "linear")
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def safetensors_error(path: Path) -> str | None:
    """Why a safetensors file is not whole, or None. The header is an 8-byte length, then JSON with
    byte offsets."""
    try:
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > path.stat().st_size:
                return "its header is cut off"
            header = json.loads(file.read(header_bytes))
        ends = [
            int(tensor["data_offsets"][1])
            for name, tensor in header.items()
            if name != "__metadata__"
        ]
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        return f"its header does not parse ({type(error).__name__}: {error})"
    expected = 8 + header_bytes + max(ends, default=0)
    size = path.stat().st_size
    return None if size == expected else f"it has {size} bytes, its header says {expected}"


def require_model(folder: Path) -> None:
    """Make sure that a folder holds a whole model.

    Raises
    ------
    LetterheadError : no folder, no config, no safetensors, or one that is cut off
    """
    base = base_of(folder)
    if base != folder:
        require_model(base)
    elif not (folder / "config.json").is_file():
        raise LetterheadError(
            f"{folder}: no checkpoint there (no config.json); train it, or name another"
        )
    weights = sorted(folder.rglob("*.safetensors"))
    if not weights:
        raise LetterheadError(
            f"{folder}: no safetensors file; other weight formats can run code and are refused"
        )
    for file in weights:
        if reason := safetensors_error(file):
            raise LetterheadError(f"{file}: cut off: {reason}; delete the folder and make it again")


def base_of(folder: Path) -> Path:
    """The folder of the model that a folder's adapter is added to; a folder without an adapter is
    its own."""
    settings = read_json(folder / ADAPTER)
    return Path(settings["base_model_name_or_path"]) if settings else folder


def note_bases(folders: Iterable[Path]) -> None:
    """Write beside each adapter which base it was trained on."""
    for folder in folders:
        if (base := base_of(folder)) != folder:
            write_json(folder / BASE, model_identity(base))


def require_base(folder: Path) -> None:
    """Make sure that an adapter's base is the one that it was trained on.

    Raises
    ------
    LetterheadError : it is another
    """
    base, trained_on = base_of(folder), read_json(folder / BASE)
    if trained_on is not None and trained_on != model_identity(base):
        raise LetterheadError(
            f"{folder}: this adapter was trained on another model than {base} holds now; fetch "
            f"that one again, or train anew"
        )


def require_language_model(folder: Path) -> None:
    """Make sure that a decoder's folder holds a language model: a classifier lacks the projection
    to the vocabulary, and would be given a random one without a word.

    Raises
    ------
    LetterheadError : it holds something else
    """
    architectures = (read_json(folder / "config.json") or {}).get("architectures") or []
    if architectures and not any(name.endswith(LANGUAGE_MODELS) for name in architectures):
        raise LetterheadError(
            f"{folder}: {', '.join(architectures)}, not a language model, so it cannot "
            f"answer with an option; name the model "
            "that it was made from (decoder.model)"
        )


def parameters_per_token(model) -> int:
    """How many parameters a token is multiplied with: all but the embeddings (and a projection tied
    to them). An adapter counts as merged with its base."""
    from torch.nn import Embedding

    embeddings = {
        id(p) for m in model.modules() if isinstance(m, Embedding) for p in m.parameters()
    }
    if getattr(model.config, "tie_word_embeddings", False) and (
        projection := model.get_output_embeddings()
    ):
        embeddings |= {id(p) for p in projection.parameters()}  # in bfloat16 a float32 copy
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if id(parameter) not in embeddings and not any(part in name for part in BESIDE_A_MODEL)
    )


def model_facts(model) -> dict:
    """What a result says of the model that it was computed with: parameters a token is multiplied
    with, and the dtype."""
    return {
        "parameters": parameters_per_token(model),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def stored_parameters(folder: Path) -> int:
    """How many numbers a model's safetensors files hold, by their headers: its parameters, tied
    ones once."""
    tensors = (tensor for file in folder.glob("*.safetensors") for tensor in _header(file).items())
    return sum(math.prod(tensor["shape"]) for name, tensor in tensors if name != "__metadata__")


def _header(path: Path) -> dict:
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def step_of(folder: Path) -> int:
    """The step at which a checkpoint was saved; -1 for a name that is not a checkpoint's."""
    prefix, _, step = folder.name.partition("-")
    return int(step) if prefix == "checkpoint" and step.isdecimal() else -1


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint was written to its end, by a training that had not diverged."""
    state = read_json(folder / "trainer_state.json")
    index = read_json(folder / "model.safetensors.index.json")
    weights = sorted(folder.glob("*.safetensors"))
    shards = set(index["weight_map"].values()) if index else set()
    states = [
        *folder.glob("*.pt"),
        *folder.glob("*.pth"),
    ]  # of optimizer, schedule and chance: zip files
    return (
        isinstance(state, dict)
        and state.get("global_step") == step_of(folder)
        and bool(weights)
        and shards <= {file.name for file in weights}
        and not any(safetensors_error(file) for file in weights)
        and all(map(has_finite_weights, weights))
        and all(map(zipfile.is_zipfile, states))
    )


def has_finite_weights(path: Path) -> bool:
    """Whether the weights of a safetensors file are numbers; read once as long as the file stays
    the same."""
    try:
        status = path.stat()
    except OSError:
        return False
    return _has_finite_weights(path, status.st_size, status.st_mtime_ns)


@cache
def _has_finite_weights(path: Path, size: int, changed: int) -> bool:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = (file.get_tensor(name) for name in file.keys())  # noqa: SIM118
            return all(
                bool(torch.isfinite(bound))
                for tensor in tensors
                if tensor.numel() and tensor.is_floating_point()
                for bound in tensor.aminmax()
            )
    except (SafetensorError, OSError):
        return False


def require_finite_weights(folder: Path) -> None:
    """Make sure that a model's weights are numbers.

    Raises
    ------
    LetterheadError : some are not
    """
    for file in sorted(folder.rglob("*.safetensors")):
        if not has_finite_weights(file):
            raise LetterheadError(
                f"{file}: its weights are not numbers; the training diverged, train anew at a "
                f"lower rate"
            )


def temper(folder: Path, at: float | None) -> None:
    """Divide a classifier's last layer by a temperature, so that the softmax of its logits is
    calibrated; nothing for None.

    Raises
    ------
    LetterheadError : a model whose last layer has another name
    """
    if at is None:
        return
    from safetensors.torch import load_file, save_file

    layers = {f"{layer}.{part}" for layer in LAST_LAYERS for part in ("weight", "bias")}
    modules = read_json(folder / "modules.json")  # of sentence-transformers
    for file in sorted((folder / modules[-1]["path"] if modules else folder).glob("*.safetensors")):
        tensors = load_file(file)
        if last := layers & set(tensors):
            tensors |= {
                name: (tensors[name].double() / at).to(tensors[name].dtype) for name in last
            }
            save_file(tensors, file, metadata={"format": "pt"})
            return
    raise LetterheadError(
        f"{folder}: no layer {' or '.join(LAST_LAYERS)}, which a temperature would divide; this "
        f"model can't be exported"
    )


def whole_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints under a folder, by step."""
    found = [path for path in folder.glob("checkpoint-*") if step_of(path) >= 0 and is_whole(path)]
    return sorted(found, key=step_of)


def set_aside_broken(folder: Path) -> list[Path]:
    """Rename every checkpoint that is not whole to broken-checkpoint-N; returns the new paths. The
    others get times in the order of their steps, all past, since by these the Trainer knows which
    is the oldest."""
    aside = []
    for path in sorted(folder.glob("checkpoint-*"), key=step_of):
        if step_of(path) >= 0 and not is_whole(path):
            target = path.with_name(f"broken-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            aside.append(path.rename(target))
    kept, now = whole_checkpoints(folder), time.time()
    for age, path in enumerate(reversed(kept), 1):
        os.utime(path, (now - age, now - age))
    return aside


def resumable(folder: Path) -> Path | None:
    """The newest whole checkpoint that still has its optimizer's state, or None."""
    with_state = [
        p
        for p in whole_checkpoints(folder)
        if (p / "optimizer.pt").exists() or list(p.glob("global_step*"))
    ]
    return with_state[-1] if with_state else None


def prune_optimizer_states(folder: Path) -> None:
    """Delete the optimizer's state (twice the model's size) of all checkpoints before the one to
    resume from; their times stay, since by these the Trainer knows which is the oldest."""
    newest = resumable(folder)
    for path in whole_checkpoints(folder) if newest else []:
        if step_of(path) >= step_of(newest):
            continue
        with suppress(FileNotFoundError):  # the Trainer may delete it meanwhile
            times = path.stat()
            (path / "optimizer.pt").unlink(missing_ok=True)
            for state in path.glob("global_step*"):  # DeepSpeed's
                shutil.rmtree(state, ignore_errors=True)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def keep_best_and_last(folder: Path) -> None:
    """Delete all whole checkpoints but the last and the one that the Trainer found best, and old
    optimizer states."""
    whole = whole_checkpoints(folder)
    best = read_json(whole[-1] / "trainer_state.json").get("best_global_step")
    for path in whole[:-1]:
        if step_of(path) != best:
            shutil.rmtree(path)
    prune_optimizer_states(folder)


def log_history(folder: Path) -> list[dict]:
    """What the Trainer logged up to the newest whole checkpoint: dictionaries with `step`, `loss`,
    …"""
    checkpoints = whole_checkpoints(folder)
    return read_json(checkpoints[-1] / "trainer_state.json")["log_history"] if checkpoints else []


def sft_disk(parameters: int, saves: int) -> int:
    """Bytes on disk at the peak of SFT: every checkpoint's float32 weights, the closing model, and
    two optimizer states, since the old one is deleted when the new one is whole."""
    return parameters * FLOAT * (saves + 1) + 2 * parameters * 2 * FLOAT


def head_disk(parameters: int) -> int:
    """Bytes on disk at the peak of a head's training: the best, the last and the one that is being
    written, the last two with the optimizer's state."""
    return parameters * FLOAT * 3 + 2 * parameters * 2 * FLOAT


def bytes_written(folder: Path) -> int:
    """Bytes of the checkpoints in a folder."""
    there = (
        file
        for path in folder.glob("checkpoint-*")
        if step_of(path) >= 0
        for file in path.rglob("*")
    )
    return sum(file.stat().st_size for file in there if file.is_file())


def require_disk(folder: Path, needed: int, what: str) -> None:
    """Make sure that there is room for what a training will write, what it has written already
    counted.

    Raises
    ------
    LetterheadError : there is less; says how much is free and how much is needed
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free + bytes_written(folder)
    if free < needed:
        raise LetterheadError(
            f"{folder}: {what} needs {needed / GIB:.1f} GiB of disk at its peak, and "
            f"{free / GIB:.1f} GiB are free; "
            "free some and run again"
        )
