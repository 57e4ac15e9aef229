"""Encoders in ONNX Runtime, in float32 and with weights of 8 bits: one file that needs neither
torch nor transformers.

What is written is an exported classifier, whose last layer is divided by its temperature already.
"""

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax

from letterhead.config.models import Head
from letterhead.files import LetterheadError, read_json, write_json
from letterhead.models import embeddings, heads
from letterhead.models.prompt import TextEncoder, break_up

FLOAT32, INT8 = "float32", "int8"
FILES = {FLOAT32: "model.onnx", INT8: "model_int8.onnx"}
LARGEST_BYTES = 2**31 - 1  # of one protobuf file
BATCH = 32
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
INPUTS = ("input_ids", "attention_mask")


class _Logits(torch.nn.Module):
    """A classifier as a function from ids and mask, shape (rows, tokens), to logits, shape (rows,
    classes)."""

    def __init__(self, folder: Path, labels: Sequence[str]):
        super().__init__()
        self.is_sentence_model = embeddings.is_saved(folder)
        if self.is_sentence_model:
            self.model = embeddings.load_encoder(folder)
            self.prefix = self.model.prompts.get(self.model.default_prompt_name, "")
            self.tokenizer, self.max_length = self.model.tokenizer, self.model.max_seq_length
        else:
            self.model, self.prefix = heads.load_head(folder, labels), ""
            self.tokenizer, self.max_length = heads.load_tokenizer(folder), None
        self.float().cpu().eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.is_sentence_model:
            return self.model(inputs)["sentence_embedding"]
        return self.model(**inputs).logits


def write(source: Path, folder: Path, labels: Sequence[str], head: Head) -> None:
    """Write an exported encoder with a layer of logits as ONNX, in float32 and int8, with its
    tokenizer and config.json.

    Parameters
    ----------
    labels : the classes in the order of the logits
    head : how the encoder reads a text

    Raises
    ------
    LetterheadError : a model that is too large for one file, that torch cannot write, or that reads
        more of a long text than its beginning
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = _Logits(source, labels)
    if not model.is_sentence_model and head.long_texts != "cut":
        raise LetterheadError(
            f"encoder.head.long_texts: {head.long_texts}; in ONNX Runtime the beginning of a text "
            f"is read; leave FORMAT=onnx out"
        )
    if not model.tokenizer.is_fast:
        raise LetterheadError(f"{source}: has no tokenizer.json, which the folder needs")
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    if size > LARGEST_BYTES:
        raise LetterheadError(
            f"{source}: {size / 1e9:.1f} GB of weights are too many for one ONNX file; serve it "
            f"without FORMAT=onnx"
        )
    tokens = torch.zeros((2, 8), dtype=torch.long), torch.ones((2, 8), dtype=torch.long)
    dynamic = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens")}
    try:
        with _quiet():
            torch.onnx.export(
                model,
                tokens,
                str(folder / FILES[FLOAT32]),
                input_names=list(INPUTS),
                output_names=["logits"],
                dynamic_shapes=dict.fromkeys(INPUTS, dynamic),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            whole, rounded = (folder / FILES[precision] for precision in (FLOAT32, INT8))
            quantize_dynamic(whole, rounded, weight_type=QuantType.QInt8)
    except Exception as error:  # of torch, onnxscript or onnxruntime, in a dozen kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LetterheadError(
            f"{source}: torch cannot write it as ONNX ({reason}); serve it without FORMAT=onnx"
        ) from None
    reader = TextEncoder(model.tokenizer, model.max_length or head.max_length)
    tokenizer, pad = model.tokenizer.backend_tokenizer, model.tokenizer.pad_token
    tokenizer.enable_truncation(reader.max_length)
    tokenizer.enable_padding(pad_id=model.tokenizer.convert_tokens_to_ids(pad), pad_token=pad)
    tokenizer.save(str(folder / TOKENIZER))
    config = {"id2label": dict(enumerate(labels)), "file": FILES[FLOAT32], "prefix": model.prefix}
    write_json(folder / CONFIG, config | {"control": reader.control.pattern})


@contextmanager
def _quiet() -> Iterator[None]:
    """A block in which the exporter's names of axes and the advice to pre-process go unsaid."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.disable(logging.NOTSET)


class OnnxClassifier:
    """What `write` wrote, as a function from texts to probabilities, shape (rows, classes).

    Parameters
    ----------
    precision : FLOAT32 or INT8; None takes what config.json names
    """

    def __init__(self, folder: Path, precision: str | None = None):
        import onnxruntime
        from tokenizers import Tokenizer

        config = read_json(folder / CONFIG)
        path = folder / (FILES[precision] if precision else config["file"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(str(path), options)
            self.tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as error:  # of each library its own class
            raise LetterheadError(
                f"{path}: cannot be loaded ({error}); export the model again"
            ) from None
        self._prefix, self._control = config["prefix"], re.compile(config["control"])

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """Shape (rows, classes)."""
        clean = [self._prefix + break_up(self._control, text) for text in texts]
        order = sorted(range(len(clean)), key=lambda row: -len(clean[row]))
        found: list[Any] = [None] * len(clean)
        for at in range(0, len(order), BATCH):
            rows = order[at : at + BATCH]
            read = self.tokenizer.encode_batch([clean[row] for row in rows])
            inputs = [one.ids for one in read], [one.attention_mask for one in read]
            inputs = dict(zip(INPUTS, map(np.array, inputs), strict=True))
            for row, of_row in zip(rows, self._session.run(None, inputs)[0], strict=True):
                found[row] = of_row
        return np.array(found)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return softmax(self.logits(texts).astype(float), axis=1)


def is_saved(folder: Path) -> bool:
    """Whether a folder holds what `write` wrote."""
    return {"file", "prefix", "control"} <= set(read_json(folder / CONFIG) or ())


load_saved = OnnxClassifier
