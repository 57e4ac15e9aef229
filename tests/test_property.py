"""What strangers write, by property: whatever the bytes, a row, or an error that names the mend; no
traceback, no half file.

200 cases each; `--hypothesis-profile=thorough --hypothesis-show-statistics` tries 5,000 and counts
them.
"""

import asyncio
import json
import shutil
import zipfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from letterhead.config.data import Data
from letterhead.config.evaluation import Prompt
from letterhead.config.experiment import load_experiment
from letterhead.files import LetterheadError, escape_markdown, read_json
from letterhead.models.answers import read_answer
from letterhead.models.checkpoints import has_finite_weights, is_whole, safetensors_error
from letterhead.models.prompt import Answer, PromptEncoder
from letterhead.rows import fetch
from letterhead.rows.labels import label_name
from letterhead.rows.sources import RawRow, column_names, open_source, plain_file
from letterhead.serving import vllm as service
from letterhead.serving.endpoint import Reply, read_reply
from letterhead.stats.metrics import NO_ANSWER
from serve import predict

ODD = st.sampled_from(
    [
        '"',
        ",",
        "\n",
        "\r\n",
        "\t",
        "\0",
        "\ufeff",
        "\u2028",
        "{",
        "}",
        "[",
        "null",
        "NaN",
        "1e999",
        "é",
        "🏆",
    ]
)
PIECES = st.lists(
    st.one_of(ODD, st.text(max_size=8), st.sampled_from(["text", "label", "World", "Sports"])),
    max_size=30,
)
WRITTEN = PIECES.map("".join).map(lambda text: text.encode("utf-8", "surrogatepass"))
BYTES = st.one_of(st.binary(max_size=200), WRITTEN)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """One folder for all cases of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("property"))
        yield


@contextmanager
def told():
    """What may end in an error that is meant for the user, and in no other."""
    try:
        yield
    except LetterheadError as error:
        assert str(error).strip()  # noqa: PT017


def damaged(whole: bytes):
    """A file, cut off or with some bytes changed."""

    def damage(cut: int, changes: list[tuple[int, int]]) -> bytes:
        content = bytearray(whole[: cut % (len(whole) + 1)] if cut % 3 else whole)
        for at, byte in changes:
            if content:
                content[at % len(content)] = byte
        return bytes(content)

    return st.builds(
        damage,
        st.integers(0, 1 << 20),
        st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=6),
    )


HEADERS = st.sampled_from(
    [
        b"",
        b"text,label\n",
        b"text\tlabel\n",
        b'{"text": "a", "label": "World"}\n',
        b"\xef\xbb\xbftext,label\r\n",
    ]
)


@given(
    HEADERS,
    BYTES,
    st.sampled_from([".csv", ".tsv", ".txt", ".jsonl", ".json", ".parquet", ".xlsx", ".csv.gz"]),
    st.sampled_from(["text", ["text", "label"], "{text}!"]),
)
def test_any_bytes_are_rows_or_an_error_that_is_told(head, tail, suffix, text):
    Path(f"rows{suffix}").write_bytes(head + tail)
    with told():
        for row in read(f"rows{suffix}", text):
            assert row.place.startswith(f"rows{suffix}") and (
                row.fault or row.label is not None or suffix in (".jsonl", ".json")
            )
    with told():
        column_names(plain_file(f"rows{suffix}"))


def read(source: str, text="text") -> list:
    data = Data(
        source=source,
        labels=["World", "Sports"],
        columns={"text": text},
        encoding=["utf-8", "latin-1"],
    )
    return [row for rows in open_source(data).splits.values() for row in rows]


def parquet() -> bytes:
    table = pyarrow.table(
        {"text": [f"text {i}" for i in range(40)], "label": ["World", "Sports"] * 20}
    )
    stream = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, stream)
    return stream.getvalue().to_pybytes()


@given(damaged(parquet()))
def test_a_damaged_parquet_file_is_told(content):
    Path("damaged.parquet").write_bytes(content)
    with told():
        read("damaged.parquet")
    with told():
        column_names(plain_file("damaged.parquet"))


@given(
    st.dictionaries(
        st.text(
            st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]),
            min_size=1,
            max_size=20,
        ),
        BYTES,
        max_size=4,
    )
)
def test_any_folder_is_rows_or_an_error_that_is_told(files):
    shutil.rmtree("texts", ignore_errors=True)
    for name, content in files.items():
        if name not in (".", "..") and len(name.encode()) < 200:
            Path("texts", name).mkdir(parents=True, exist_ok=True)
            Path("texts", name, "one").write_bytes(content)
    with told():
        read("texts")


EXPERIMENT = """
title: a test
data: {source: rows.csv, labels: [World, Sports], rows: {validation: 2}}
prompt: {options: letters}
decoder: {train_rows: 4, head: {learning_rate: 1.0e-4}}
"""
KEYS = st.sampled_from(
    [
        "title",
        "name",
        "seed",
        "seeds",
        "data",
        "data.labels",
        "data.rows.test",
        "data.columns.text",
        "data.bad_rows",
        "data..rows",
        "prompt.template",
        "prompt.options",
        "decoder.model",
        "decoder.head.eval_steps",
        "decoder.sft.overrides",
        "decoder.sft.config",
        "encoder.model",
        "eval.examples",
        "compare.margin",
        "distill",
        "serve",
        "bench.requests",
        "x",
    ]
    + [""]
)


@pytest.fixture(scope="module", autouse=True)
def configs(place):
    shutil.copytree(Path(__file__).parent.parent / "llamafactory_configs", "llamafactory_configs")
    Path("experiments").mkdir()


@given(
    st.one_of(
        BYTES, JSON.map(lambda value: json.dumps(value).encode()), damaged(EXPERIMENT.encode())
    )
)
@example(b"a: !!python/object/apply:os.system ['touch evil']")
@example(b"a: ${oc.env:HOME}")
@example(b"data: {source: a.csv, labels: &a [*a, x]}")
def test_any_experiment_is_read_or_refused(content):
    Path("experiments/odd.yaml").write_bytes(content)
    with told():
        load_experiment("odd")
    assert not Path("evil").exists()


@given(
    KEYS,
    st.one_of(
        JSON.map(json.dumps),
        st.text(max_size=20),
        st.sampled_from(["${x}", "${oc.env:HOME}", "!!python/name:os.system", "[", "'"]),
    ),
)
def test_any_override_is_read_or_refused(key, value):
    Path("experiments/whole.yaml").write_text(EXPERIMENT)
    with told():
        load_experiment("whole", f"{key}={value}")


@given(KEYS, JSON)
def test_any_value_of_a_key_is_taken_or_refused(key, value):
    values = yaml.safe_load(EXPERIMENT)
    section, *rest = key.split(".")
    values[section] = value if not rest else {rest[-1]: value}
    Path("experiments/odd.yaml").write_text(yaml.safe_dump(values, allow_unicode=True))
    with told():
        load_experiment("odd")


@given(
    st.sampled_from(["csv", "tsv", "jsonl"]),
    st.sampled_from(
        [b"", b"text,n\n", b"n\ttext\r\n", b'{"text": '],
    ),
    BYTES,
)
def test_any_file_to_be_labelled_is_rows_or_an_error_that_is_told(kind, head, tail):
    Path("experiments/whole.yaml").write_text(EXPERIMENT)
    experiment, path = load_experiment("whole"), Path(f"in.{kind}")
    path.write_bytes(head + tail)
    with told():
        header, rows = predict.read_table(path, experiment)
        for fields, text in rows:
            assert len(fields) == len(header) and (
                text.strip() or not any(fields)
            )  # a blank row keeps its place


NAMES = (
    st.lists(
        st.sampled_from(["..", ".", "", "a", "thing", "b.txt", "/", "~", "C:", "\\..\\x"]),
        min_size=1,
        max_size=5,
    )
    .map("/".join)
    .filter(bool)
)


@example(["thing", "thing/a"])
@example(["thing", "thing/a/b"])
@example(["thing/a", "thing"])
@given(st.lists(NAMES, min_size=1, max_size=4, unique=True))
def test_no_name_in_an_archive_leads_out_of_the_folder(names):
    shutil.rmtree("archive", ignore_errors=True)
    Path("archive/in/side").mkdir(parents=True)
    with zipfile.ZipFile("archive/whole.zip", "w") as package:
        for name in names:
            package.writestr(name, b"evil")
    with told():
        fetch._extract(Path("archive/whole.zip"), "thing", Path("archive/in/side/target"))
    written = {path for path in Path("archive").rglob("*") if path.is_file()}
    assert all(
        path.is_relative_to("archive/in/side/target")
        for path in written - {Path("archive/whole.zip")}
    )


@given(
    st.one_of(
        JSON,
        st.fixed_dictionaries(
            {
                "choices": st.lists(
                    st.fixed_dictionaries(
                        {
                            "message": JSON
                            | st.fixed_dictionaries({"content": JSON, "reasoning": JSON}),
                            "finish_reason": JSON,
                        }
                    ),
                    max_size=2,
                ),
                "usage": JSON
                | st.fixed_dictionaries({"prompt_tokens": JSON, "completion_tokens": JSON}),
            }
        ),
    )
)
def test_a_teachers_reply_is_whole_or_no_completion(reply):
    try:
        found = read_reply(reply)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return  # asked again
    assert isinstance(found, Reply) and all(isinstance(part, str) for part in found.parts())
    assert isinstance(found.prompt_tokens, int | None) and isinstance(
        found.reply_tokens, int | None
    )


class Replies:
    """A client that gets one reply, whatever is asked."""

    def __init__(self, content: bytes):
        self.content = content

    async def post(self, *_, **__) -> httpx.Response:
        return httpx.Response(200, content=self.content)


ROUTES = {
    "generate": (service.generate_route, {"choices": [{"token_ids": [5, 9]}]}),
    "one token": (
        service.one_token_route,
        {"choices": [{"logprobs": {"top_logprobs": [{"token_id:5": -1.0, "token_id:6": -2.0}]}}]},
    ),
    "classify": (lambda _: service.classify_route(), {"data": [{"probs": [0.2, 0.8]}]}),
}


@given(st.sampled_from(sorted(ROUTES)), st.data())
def test_a_services_reply_is_read_or_told(name, draw):
    make, whole = ROUTES[name]
    content = draw.draw(
        st.one_of(
            BYTES, JSON.map(lambda of: json.dumps(of).encode()), damaged(json.dumps(whole).encode())
        )
    )
    route = make([Answer([5, 9], 0, 1), Answer([6, 9], 0, 1)])
    server = SimpleNamespace(url="http://127.0.0.1:1", log="vllm.log", engine="vLLM")
    with told():
        found, _ = asyncio.run(service.VllmServer.ask(server, Replies(content), route, [1]))
        assert found in (NO_ANSWER, *range(9))


CONTROLS = (
    "<|im_end|>",
    "<|im_start|>",
    "<think>",
    "</think>",
    "<|endoftext|>",
    "{text}",
    "{options}",
    "/no_think",
    "A",
    "\n",
)
LABEL = st.lists(
    st.one_of(st.sampled_from(CONTROLS), st.text(max_size=6)), min_size=1, max_size=4
).map("".join)


@given(
    st.lists(LABEL.map(str.strip).filter(bool), min_size=2, max_size=5, unique=True),
    st.sampled_from(["letters", "names"]),
    LABEL,
)
def test_no_label_and_no_text_is_a_control_token(make_encoder, labels, options, text):
    with told():
        encoder, plain = (
            make_encoder(options, of) for of in (labels, [f"label {i}" for i in range(len(labels))])
        )
        pairs = [(encoder.encode(text), plain.encode("a text"))]
        pairs += [
            (one.ids, other.ids) for one, other in zip(encoder.answers, plain.answers, strict=True)
        ]
        for one, other in pairs:
            assert [of for of in one if of in encoder.controls] == [
                of for of in other if of in encoder.controls
            ]


@pytest.fixture(scope="module")
def make_encoder(qwen3_tokenizer):
    from llamafactory.hparams import DataArguments

    def make(options: str, labels: list[str]) -> PromptEncoder:
        prompt = Prompt(template="{text}\n{options}\nWhich?", options=options)
        encoder = PromptEncoder(
            qwen3_tokenizer, DataArguments(template="qwen3", cutoff_len=512), prompt, labels
        )
        encoder.controls = {
            *qwen3_tokenizer.all_special_ids,
            *qwen3_tokenizer.convert_tokens_to_ids(["<think>", "</think>"]),
        }
        return encoder

    return make


@given(
    st.one_of(
        st.lists(LABEL.filter(str.strip), min_size=2, max_size=4, unique=True),
        st.dictionaries(LABEL, st.none() | st.sampled_from(["a", "b"]), min_size=2, max_size=4),
    ),
    st.one_of(JSON, LABEL, st.integers().map(str)),
)
def test_any_label_is_a_class_dropped_or_told(labels, value):
    with told():
        found = label_name(RawRow("train:1", "rows.csv, row 1", "a text", value), labels)
        assert found is None or found in (labels if isinstance(labels, list) else labels.values())


@given(
    st.text(max_size=40),
    st.booleans(),
    st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=5, unique=True),
)
def test_an_answer_names_an_option_or_none(text, ended, options):
    number, how = read_answer(text, ended, options)
    assert how in ("answered", "unfinished", "unparsed") and number < len(options)
    assert (how == "answered") == (number >= 0)


@given(
    damaged(
        b"\x40\0\0\0\0\0\0\0"
        + json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})
        .ljust(64)
        .encode()
        + b"12345678"
    )
)
def test_a_damaged_checkpoint_is_not_whole(content):
    folder = Path("checkpoint-3")
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    file = folder / "model.safetensors"
    assert is_whole(folder) == (safetensors_error(file) is None and has_finite_weights(file))


@given(BYTES)
def test_a_record_that_does_not_parse_is_made_again(content):
    Path("record.json").write_bytes(content)
    read_json("record.json")


@given(st.text(max_size=40))
def test_no_text_is_markup(text):
    written = escape_markdown(text)
    assert "<" not in written and "\n" not in written and "](" not in written
