"""Models that packages ship in parts, or as GGUF: joined, opened, tied, and with the tokenizer that
they were made with."""

import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from letterhead.config.models import Encoder, Parts
from letterhead.files import LetterheadError, sha256_file
from letterhead.rows.fetch import fetch_model, fetch_package, scratch, tie

ROOT = Path(__file__).parent.parent


def packed(name: str, path: str, content: bytes) -> str:
    """Put a package with one file into the cache; returns its source."""
    folder = Path(".cache/packages") / f"{name}==1.0"
    folder.mkdir(parents=True)
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as package:
        package.writestr(path, content)
    return f"pypi:{name}==1.0/{path}#sha256={sha256_file(wheel)}"


def zipped(files: dict[str, bytes]) -> tuple[list[str], str]:
    """Put a zip, cut in three, into the cache as packages; returns the sources of its parts, and
    what they make."""
    with zipfile.ZipFile("whole.zip", "w") as package:
        for name, content in files.items():
            package.writestr(name, content)
    whole = Path("whole.zip").read_bytes()
    shutil.rmtree(".cache", ignore_errors=True)
    parts = [
        packed(f"part{i}", f"part{i}/data.bin", cut)
        for i, cut in enumerate((whole[:99], whole[99:300], whole[300:]))
    ]
    return parts, f"thing.zip/thing#sha256={sha256_file(Path('whole.zip'))}"


def test_a_users_own_folder_and_what_lies_outside_are_not_overwritten(workplace):
    parts, whole = zipped({"thing/config.json": b"{}"})
    mine = Path("model/thing/model.safetensors")
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"years of work")
    with pytest.raises(
        LetterheadError,
        match="model/thing: holds what was not fetched, and thing.zip/thing would take its place",
    ):
        fetch_model(Parts(parts=parts, whole=whole), mine.parent)
    assert mine.read_bytes() == b"years of work"
    Path("mine.csv").write_text("text,label\n")
    for path in ("../../../mine.csv", "/etc/passwd", "a/../../../../mine.csv"):
        with pytest.raises(
            LetterheadError, match="write it as pypi:PACKAGE==VERSION/PATH#sha256=HEX"
        ):
            fetch_package(packed(f"p{len(path)}", path, b"evil"), {})
    assert Path("mine.csv").read_text() == "text,label\n"


def test_what_a_killed_run_left_in_the_cache_goes_and_a_running_ones_stays(workplace):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for number in (dead.pid, os.getppid()):
        Path(f".cache/scratch-{number}").mkdir(parents=True)
    with scratch() as mine:
        assert mine.is_dir()
    assert [of.name for of in Path(".cache").iterdir()] == [f"scratch-{os.getppid()}"]


def test_a_model_in_parts_is_joined_and_its_zip_opened(workplace):
    weights = save({"weight": torch.arange(6.0)})
    files = {
        "thing/config.json": b"{}",
        "thing/model.safetensors": weights,
        "other/a.txt": b"not asked for",
    }
    parts, whole = zipped(files)
    model = Parts(parts=parts, whole=whole)
    fetch_model(model, folder := Encoder(model=model).folder)
    assert folder == Path("model/thing")
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "letterhead_source.json",
    }
    assert (folder / "model.safetensors").read_bytes() == weights
    shutil.rmtree(".cache/packages")
    fetch_model(model, folder)  # is there already
    parts, whole = zipped(files)
    for wrong, message in (
        ({"parts": parts[:2]}, "the 2 parts join to sha256"),
        ({"parts": [parts[1], parts[0], parts[2]]}, "the 3 parts join to sha256"),
        (
            {"parts": [*parts[:2], parts[2].replace("data.bin", "date.bin")]},
            "part2.*that package holds no such file",
        ),
        ({"whole": whole.replace("/thing", "/none")}, "holds no none"),
    ):
        with pytest.raises(LetterheadError, match=message):
            fetch_model(Parts(**{"parts": parts, "whole": whole} | wrong), Path("model/other"))
    parts, whole = zipped(files | {"thing/../../evil.txt": b"evil"})
    with pytest.raises(LetterheadError, match=r"refuses to unpack thing/\.\./\.\./evil.txt"):
        fetch_model(Parts(parts=parts, whole=whole), Path("model/other"))
    assert not Path("model/other").exists() and not list(workplace.rglob("evil.txt"))


def write_qwen(path: Path, tokenizer) -> None:
    """Write a GGUF with Qwen's tokenizer and tiny random weights, the projection nearly the
    embedding."""
    rng, width, heads, wide = np.random.default_rng(0), 32, 2, 64
    named = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["content"]: token["special"] for token in named["added_tokens"]}
    kind = {
        None: gguf.TokenType.NORMAL,
        True: gguf.TokenType.CONTROL,
        False: gguf.TokenType.USER_DEFINED,
    }
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([kind[special.get(token)] for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in named["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    embedding = rng.normal(size=(len(vocabulary), width))
    nearly = embedding + 0.01 * rng.normal(size=embedding.shape)
    tensors = {
        "token_embd.weight": embedding,
        "output.weight": nearly,
        "output_norm.weight": np.ones(width),
    }
    for name in ("attn_q", "attn_k", "attn_v"):
        tensors |= {
            f"blk.0.{name}.weight": rng.normal(size=(width, width)),
            f"blk.0.{name}.bias": np.zeros(width),
        }
    tensors |= {"blk.0.attn_output.weight": rng.normal(size=(width, width))}
    tensors |= {
        f"blk.0.ffn_{name}.weight": rng.normal(size=(wide, width)) for name in ("gate", "up")
    }
    tensors |= {"blk.0.ffn_down.weight": rng.normal(size=(width, wide))}
    tensors |= {f"blk.0.{name}_norm.weight": np.ones(width) for name in ("attn", "ffn")}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_a_gguf_is_tied_and_keeps_its_own_control_tokens(workplace, qwen3_tokenizer):
    write_qwen(path := Path("whole.gguf"), qwen3_tokenizer)
    part = packed("part", "part/data.bin", path.read_bytes())
    model = Parts(parts=[part], whole=f"whole.gguf#sha256={sha256_file(path)}", tied=True)
    fetch_model(model, Path("model/qwen"))
    made = AutoModelForCausalLM.from_pretrained("model/qwen")
    assert made.config.tie_word_embeddings and made.lm_head.weight is made.model.embed_tokens.weight
    projection = next(
        tensor.data for tensor in gguf.GGUFReader(path).tensors if tensor.name == "output.weight"
    )
    assert np.array_equal(made.lm_head.weight.detach().numpy(), projection)
    same_tokenizer(AutoTokenizer.from_pretrained("model/qwen"), qwen3_tokenizer)


def test_a_gguf_that_lies_about_its_sizes_is_refused(workplace):
    """Counts of tensors and keys, the length of a string, the shape of a tensor; and one that is
    cut off."""
    writer = gguf.GGUFWriter(path := Path("whole.gguf"), "qwen2")
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    whole = path.read_bytes()
    shape = whole.index(b"token_embd.weight") + len(b"token_embd.weight") + 4
    for at, number in ((8, 1 << 40), (16, 1 << 40), (24, 1 << 50), (shape, 1 << 60), (None, 0)):
        content = bytearray(whole[: len(whole) // 2] if at is None else whole)
        if at is not None:
            content[at : at + 8] = number.to_bytes(8, "little")
        part = packed(f"lie{at}", "lie/data.bin", bytes(content))
        model = Parts(parts=[part], whole=f"lie.gguf#sha256={hashlib.sha256(content).hexdigest()}")
        with pytest.raises(LetterheadError, match="lie.gguf: cannot be read as a GGUF model"):
            fetch_model(model, Path("model/lie"))
    assert not Path("model/lie").exists()


def test_what_is_not_alike_is_not_tied():
    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 99,
    }
    with pytest.raises(LetterheadError, match=r"a.gguf: not tied \(projection, embedding: cosine"):
        tie(Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=False)), "a.gguf")


def same_tokenizer(made, rebuilt) -> None:
    """Both encode alike what the vocabularies have in common, control tokens included."""
    numbers, theirs = made.get_vocab(), rebuilt.get_vocab()
    assert all(numbers[token] == number for token, number in theirs.items() if token in numbers)
    kept = {
        token.content: token.special
        for token in rebuilt.added_tokens_decoder.values()
        if token.content in numbers
    }
    assert len(kept) >= 22
    assert kept == {token.content: token.special for token in made.added_tokens_decoder.values()}
    assert (made.eos_token, made.pad_token) == (rebuilt.eos_token, rebuilt.pad_token)
    for text in (
        "Hello <s> </s> world",
        f"a {' '.join(kept)} b",
        "<|im_start|>user\nHi<|im_end|>\n",
        "é 你好 ① 1234",
        "\n\n a\t\tb ",
        "I'LL don't x²",
        "<unk> [PAD151669]",
    ):
        assert made(text)["input_ids"] == rebuilt(text)["input_ids"]


def test_the_tokenizer_of_the_real_qwen_is_qwens(qwen3_tokenizer):
    folder = ROOT / "model/Qwen2.5-Coder-0.5B-Instruct"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"{folder.name} is not here (480 MB); make data EXP=ag_news_base fetches it")
    same_tokenizer(AutoTokenizer.from_pretrained(folder), qwen3_tokenizer)
