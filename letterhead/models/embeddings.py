"""Frozen embeddings with logistic regression: the encoder reads each text once and is not trained.

sentence-transformers reads the model's own pooling; for an encoder without one it takes the mean
over tokens. Each
embedding of a training, validation or test row is kept on disk, by the hashes of model and text, so
that another seed, size or C costs no forward pass.
"""

import hashlib
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from letterhead.config.experiment import Experiment
from letterhead.files import (
    LetterheadError,
    model_identity,
    read_json,
    sha256_file,
    sha256_json,
)
from letterhead.models import heads
from letterhead.models.checkpoints import parameters_per_token
from letterhead.models.fitted import (
    Fitted,
    Scores,
    class_probabilities,
    class_weight,
    fit_regression,
    last_layer,
    require_classes,
)
from letterhead.models.prompt import TextEncoder
from letterhead.runs.devices import device_name
from letterhead.runs.terminal import progress

KEPT = Path(".cache/embeddings")
# Counted up when a text gets another embedding: those that are kept are computed anew.
EMBEDDING = 1
# Of the values of C the one with the lowest log loss by cross-validation on the training rows; with
# a class of one row, which no fold can do without, the first.
C = (10, 1, 100, 1000)
BATCH = 32
# The file by which a SentenceTransformer is known
MODULES = "modules.json"
CHUNK = 1024  # texts that are embedded, and kept, at a time
ASKED_AT_ONCE = 500  # keys of a query
PROMPT = "text"  # the name of the prefix among a SentenceTransformer's prompts


@dataclass(frozen=True)
class Embedded:
    """Embeddings in float64, shape (texts, width); the tokens that the encoder read, with padding;
    the seconds that embeddings from disk took when they were computed."""

    vectors: np.ndarray
    tokens: int
    saved_seconds: float


def load_encoder(folder: Path, prefix: str | None = None):
    """A SentenceTransformer from disk, in float32 on the machine's device; safetensors only.

    Parameters
    ----------
    prefix : what stands before each text; None leaves the model's own

    Raises
    ------
    LetterheadError : sentence-transformers cannot load it
    """
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(
            str(folder),
            device="cpu" if device_name() == "cpu" else "cuda",
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True, "dtype": "float32"},
        )
        model[0].auto_model  # noqa: B018
    except (ImportError, OSError, ValueError, AttributeError) as error:
        raise LetterheadError(
            f"{folder}: sentence-transformers cannot load it ({error}); name another encoder.model"
        ) from None
    if prefix is not None:
        model.prompts = {PROMPT: prefix} if prefix else {}
        model.default_prompt_name = PROMPT if prefix else None
    return model


class Embedder:
    """A frozen encoder.

    Parameters
    ----------
    experiment : its encoder, the prefix of its texts, and how many tokens are read
    """

    def __init__(self, experiment: Experiment):
        encoder = experiment.encoder
        self.folder, self.prefix = encoder.folder, encoder.prefix
        self.max_length = encoder.head.max_length
        heads.require_length(self.folder, self.max_length, "encoder.head")
        self.model = load_encoder(self.folder, self.prefix)
        self.model.max_seq_length = self.max_length
        self.reader = TextEncoder(heads.load_tokenizer(self.folder), self.max_length)
        if self.model.tokenizer.pad_token is None:
            self.model.tokenizer.pad_token = self.reader.tokenizer.pad_token
        self.parameters = parameters_per_token(self.model[0].auto_model)
        identity = {
            "version": EMBEDDING,
            "library": version("sentence-transformers"),
            "model": model_identity(self.folder),
            "pooling": [sha256_file(file) for file in sorted(self.folder.rglob("*config*.json"))],
            "reading": [self.prefix, self.max_length],
            "device": device_name(),
        }
        self.file = KEPT / f"{sha256_json(identity)}.sqlite"
        self._turn = Lock()

    def embed(self, texts: Sequence[str], keep: bool = False) -> Embedded:
        """Embed texts, each as a vector of length one; `keep` reads and writes what is on disk."""
        keys = [hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest() for text in texts]
        known = self._read(keys) if keep else {}
        saved = sum(known[key][2] for key in keys if key in known)
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        order = sorted(new, key=lambda key: len(new[key]))
        with progress(total=len(order), desc="embedding texts", disable=not keep) as bar:
            for start in range(0, len(order), CHUNK):
                part = order[start : start + CHUNK]
                found = dict(zip(part, self._compute([new[key] for key in part]), strict=True))
                if keep:
                    self._write(found)
                known |= found
                bar.update(len(part))
        vectors, tokens, _ = zip(*(known[key] for key in keys), strict=True)
        return Embedded(np.array(vectors, dtype=float), sum(tokens), saved)

    def _compute(self, texts: list[str]) -> list[tuple[np.ndarray, int, float]]:
        start = time.perf_counter()
        clean = self.reader.neutralise(texts)
        with self._turn:
            vectors = self.model.encode(
                clean, batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False
            )
        lengths = [len(ids) for ids in self.reader.encode([self.prefix + text for text in clean])]
        seconds = (time.perf_counter() - start) / len(texts)
        padded = heads.padded_tokens(lengths, heads.by_rows(lengths, BATCH)) / max(1, sum(lengths))
        return [
            (vector.astype(np.float32), round(padded * length), seconds)
            for vector, length in zip(vectors, lengths, strict=True)
        ]

    def _open(self) -> sqlite3.Connection:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self.file, timeout=600)
        database.execute(
            "CREATE TABLE IF NOT EXISTS embeddings "
            "(text TEXT PRIMARY KEY, vector BLOB, tokens INTEGER, seconds REAL)"
        )
        return database

    def _read(self, keys: list[str]) -> dict[str, tuple[np.ndarray, int, float]]:
        wanted, found = sorted(set(keys)), {}
        try:
            with closing(self._open()) as database:
                for start in range(0, len(wanted), ASKED_AT_ONCE):
                    part = wanted[start : start + ASKED_AT_ONCE]
                    marks = ", ".join("?" * len(part))
                    query = f"SELECT * FROM embeddings WHERE text IN ({marks})"
                    for key, vector, *more in database.execute(query, part):
                        found[key] = (np.frombuffer(vector, np.float32), *more)
        except sqlite3.OperationalError as error:
            raise self._unusable(error) from None
        except sqlite3.DatabaseError:  # damaged; all of it can be made again
            self.file.unlink(missing_ok=True)
            return {}
        return found

    def _unusable(self, error: sqlite3.OperationalError) -> LetterheadError:
        return LetterheadError(
            f"{self.file}: {error}; mend that, or delete the file, and run again"
        )

    def _write(self, found: dict[str, tuple[np.ndarray, int, float]]) -> None:
        lines = [(key, vector.tobytes(), *more) for key, (vector, *more) in found.items()]
        try:
            with closing(self._open()) as database, database:
                database.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?, ?, ?)", lines)
        except sqlite3.OperationalError as error:
            raise self._unusable(error) from None


def fit(experiment: Experiment, rows: list[dict]) -> Fitted:
    """Fit logistic regression on the embeddings of rows.

    Raises
    ------
    LetterheadError : only one class is among them
    """
    require_classes(rows)
    embedder = Embedder(experiment)
    embedded = embedder.embed([row["text"] for row in rows], keep=True)
    truth, weight = [row["label"] for row in rows], class_weight(experiment)
    regression = fit_regression(embedded.vectors, truth, C, experiment.seed, weight)

    title = f"{embedder.folder}, frozen, logistic regression (C = {regression.C:g})"
    return as_fitted(experiment, embedder, regression, title, True, embedded.saved_seconds)


def as_fitted(
    experiment: Experiment,
    embedder: Embedder,
    regression: LogisticRegression,
    title: str,
    is_frozen: bool,
    saved_seconds: float = 0.0,
) -> Fitted:
    """An encoder and the regression on its embeddings, as a method.

    Parameters
    ----------
    title : what it is, in words
    is_frozen : the encoder is as it came, so that its embeddings may be kept
    saved_seconds : what of the fit came from disk took when it was computed
    """

    layer = last_layer(regression, experiment.labels)

    def score(texts: Sequence[str], keep: bool = False) -> Scores:
        start = time.perf_counter()
        read = embedder.embed(texts, keep and is_frozen)
        probabilities = class_probabilities(layer, read.vectors)
        seconds = time.perf_counter() - start + read.saved_seconds
        return Scores(probabilities, read.tokens, seconds)

    return Fitted(
        score,
        embedder.parameters,
        device_name(),
        "float32",
        title,
        saved_seconds,
        lambda folder: save(embedder.model, layer, experiment.labels, folder),
    )


def save(model, layer: tuple[np.ndarray, np.ndarray], labels: Sequence[str], folder: Path) -> None:
    """Write encoder and regression as one SentenceTransformer whose output is the classes' logits,
    shape (texts, classes); `id2label` in its config.json names them.

    Parameters
    ----------
    model : a SentenceTransformer
    layer : the regression on its normalised embeddings
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize

    weight, bias = layer
    dense = Dense(weight.shape[1], len(labels), activation_function=None)
    with torch.no_grad():
        dense.linear.weight.copy_(torch.from_numpy(weight))
        dense.linear.bias.copy_(torch.from_numpy(bias))
    config = model[0].auto_model.config
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    whole = SentenceTransformer(
        modules=[*model, *([] if isinstance(model[-1], Normalize) else [Normalize()]), dense],
        prompts=model.prompts,
        default_prompt_name=model.default_prompt_name,
    )
    whole.save_pretrained(str(folder), create_model_card=False)


def load_saved(folder: Path):
    """What `save` wrote, as a function from texts to probabilities, shape (rows, classes)."""
    model = load_encoder(folder)
    reader, turn = TextEncoder(model.tokenizer, model.max_seq_length), Lock()

    def classify(texts: Sequence[str]) -> np.ndarray:
        clean = reader.neutralise(texts)
        with turn:
            logits = model.encode(clean, batch_size=BATCH, show_progress_bar=False)
        return softmax(logits.astype(float), axis=1)

    return classify


def is_saved(folder: Path) -> bool:
    """Whether a folder holds what `save` wrote: a SentenceTransformer that ends in a layer of
    logits."""
    modules = read_json(folder / MODULES) or [{"type": ""}]
    return modules[-1]["type"].endswith(".Dense")
