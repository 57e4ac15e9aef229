"""Predict and export: the same bytes after a kill, the same answers as the evaluation, a letter
folded into a head."""

import csv
import fcntl
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import openpyxl
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    pipeline,
)

from letterhead.config.data import Columns
from letterhead.config.experiment import load_experiment
from letterhead.config.models import Head
from letterhead.files import LetterheadError, read_json, write_json
from letterhead.models import classifier, folding, heads, tfidf
from letterhead.models.checkpoints import require_model
from letterhead.models.folding import load_folded
from letterhead.models.prompt import load_prompt_encoder
from letterhead.models.scoring import load_decoder, score_options
from letterhead.runs.stage import StageRun
from prep import data
from serve import export, predict
from serve.start import served
from tests.conftest import ROOT, a_result
from tests.fakes import ModelHub, running
from tests.test_data import write_csv
from tests.test_prompt import LABELS, nasty_rows


@pytest.fixture
def experiment(make_experiment, tiny_models):
    write_csv("rows.csv", nasty_rows(120))
    made = make_experiment("rows.csv", LABELS, data={"rows": {"validation": 10, "test": 20}})
    data.main(made)
    return made


def read(path: str) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(params=["cpu", "a GPU"])
def device(request, monkeypatch):
    """On a GPU, as predict believes, two chunks are at work at once."""
    monkeypatch.setattr(predict, "device_name", lambda: request.param)


@pytest.mark.parametrize("model", ["tfidf", "sft@0"])
def test_predictions_keep_rows_order_and_columns(experiment, device, model, monkeypatch):
    monkeypatch.setattr(predict, "CHUNK", 16)
    rows = [(f"{i}", text, 'x,"y"\nz') for i, (text, _) in enumerate(nasty_rows(50))]
    with open("in.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("number", "text", "more"), *rows])
    predict.main(experiment, "in.csv", "out/labelled.csv", model)
    header, *lines = read("out/labelled.csv")
    assert header == ["number", "text", "more", "prediction", *(f"p({label})" for label in LABELS)]
    assert [tuple(line[:3]) for line in lines] == rows
    probabilities = np.array([[float(p) for p in line[4:]] for line in lines])
    assert np.abs(probabilities.sum(1) - 1).max() < 1e-5
    assert [line[3] for line in lines] == [LABELS[i] for i in probabilities.argmax(1)]
    texts = [text.strip() for _, text, _ in rows]
    if model == "tfidf":
        rows = [json.loads(line) for line in open("data/mine/train.jsonl")]
        fitted = tfidf.fit(experiment, rows)
        expected = [LABELS[i] for i in fitted.score(texts).probabilities.argmax(axis=1)]
    else:
        encoder = load_prompt_encoder(experiment)
        scores = score_options(
            load_decoder(experiment.decoder.folder, "float32"),
            [encoder.encode(t) for t in texts],
            encoder.answers,
            False,
            700,
        )
        expected = [LABELS[i] for i in scores.log_likelihood.argmax(1)]
    assert [line[3] for line in lines] == expected
    assert not list(Path("out").glob("*.part*"))


def test_two_processes_predict_as_one_does_and_say_what_is_wrong_before_they_write(
    experiment, monkeypatch
):
    write_csv("in.csv", nasty_rows(50))
    predict.main(experiment, "in.csv", "one.csv", "sft@0")
    monkeypatch.setattr(predict, "CHUNK", 8)
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    predict.main(experiment, "in.csv", "two.csv", "sft@0")
    one, two = read("one.csv"), read("two.csv")
    n = len(LABELS)
    assert [line[:-n] for line in one] == [line[:-n] for line in two]  # rows, order and predictions
    numbers = [np.array([line[-n:] for line in lines[1:]], dtype=float) for lines in (one, two)]
    assert np.abs(numbers[0] - numbers[1]).max() < 1e-4
    with pytest.raises(LetterheadError, match="zero_shot_think@1: no such method"):
        predict.main(experiment, "in.csv", "three.csv", "zero_shot_think@1")
    assert not list(Path().glob("three.csv*"))


def test_a_killed_prediction_goes_on_and_ends_with_the_same_bytes(experiment):
    write_csv("in.csv", nasty_rows(20_000))
    command = [
        sys.executable,
        "-m",
        "serve.predict",
        "--experiment",
        "mine",
        "--in",
        "in.csv",
        "--model",
        "tfidf",
        "--out",
    ]

    def start(out: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, out], env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
        )

    def done() -> int:
        return (read_json("out.csv.part.json") or {"rows": 0})["rows"]

    assert start("whole.csv").wait(300) == 0
    kills = []
    for seed in range(2):
        before, process = done(), start("out.csv")
        while process.poll() is None and done() <= before:
            time.sleep(0.002)
        time.sleep(
            random.Random(seed).uniform(0, 0.04)
        )  # about a chunk's time: anywhere in its work
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills.append(done())
    assert 0 < kills[0] < kills[1] < 20_000 and not Path("out.csv").exists()
    with open(
        "out.csv.part", "ab"
    ) as part:  # what a kill between the chunk and its record leaves; too short to hit
        part.write(b"a chunk that nobody recor")
    assert start("out.csv").wait(300) == 0
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert len(read("out.csv")) == 20_001


def test_two_predictions_into_one_file_do_not_mix(experiment):
    Path("in.csv").write_text("text\none\ntwo\n")
    with open(".out.csv.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LetterheadError, match="out.csv: another process is writing it"):
            predict.main(experiment, "in.csv", "out.csv", "tfidf")
        with (
            predict.alone(Path("other.csv")),
            pytest.raises(LetterheadError),
            predict.alone(Path("other.csv")),
        ):
            pass
    predict.main(experiment, "in.csv", "out.csv", "tfidf")
    assert len(read("out.csv")) == 3 and not list(Path().glob(".o*.lock"))


def test_bad_input_names_file_row_and_mend_and_keeps_what_is_done(
    experiment, device, monkeypatch, capsys
):
    monkeypatch.setattr(predict, "CHUNK", 2)
    Path("in.csv").write_text("text\none\n\ntwo\nthree\n  \nfive\n\n")
    with pytest.raises(
        LetterheadError,
        match=r"in.csv, row 4 \(line 6\): the text is empty; fill it in.*bad_rows: drop",
    ):
        predict.main(experiment, "in.csv", "out.csv", "tfidf")
    assert read_json("out.csv.part.json")["rows"] == 2 and not Path("out.csv").exists()
    dropping = experiment.model_copy(
        update={"data": experiment.data.model_copy(update={"bad_rows": "drop"})}
    )
    predict.main(dropping, "in.csv", "dropped.csv", "tfidf")
    Path("wide.csv").write_text(
        "text,n,n\none,1,x\n,,\n\ntwo,2,y\n"
    )  # columns of one name, and blank lines
    predict.main(experiment, "wide.csv", "wide.out.csv", "tfidf")
    assert [line[:3] for line in read("wide.out.csv")[1:]] == [
        ["one", "1", "x"],
        ["", "", ""],
        ["two", "2", "y"],
    ]
    Path("broken.csv").write_text("text,n\none,1\nmore,2,3\nless\n\nlast,4\n")
    predict.main(dropping, "broken.csv", "broken.out.csv", "tfidf")
    kept = [(line[:2], bool(line[2])) for line in read("broken.out.csv")[1:]]
    assert kept == [
        (["one", "1"], True),
        (["more", "2"], False),
        (["less", ""], True),  # the row ends before a column that nobody reads
        (["last", "4"], True),
    ]
    header, *lines = read("dropped.csv")
    assert [line[0] for line in lines] == ["one", "two", "three", "  ", "five"]
    assert [bool(line[1]) for line in lines] == [True, True, True, False, True] and lines[3][
        1:
    ] == [""] * (len(header) - 1)
    said = capsys.readouterr().out
    assert re.findall(r"(\w+\.\S*csv): .* (\d+) of them without a text and left empty", said) == [
        ("dropped.csv", "1"),
        ("wide.out.csv", "1"),
        ("broken.out.csv", "1"),
    ]
    Path("in.csv").write_text("title\none\n")
    with pytest.raises(
        LetterheadError, match="no column 'text'; mine reads text, and this file has title; rename"
    ):
        predict.main(experiment, "in.csv", "out.csv", "tfidf")
    with pytest.raises(LetterheadError, match="OUT is IN"):
        predict.main(experiment, "in.csv", "./in.csv", "tfidf")
    Path("in.csv").write_text("text,n\none,1,2\n")
    with pytest.raises(LetterheadError, match=r"row 1 \(line 2\): 3 fields, but the header has 2"):
        predict.main(experiment, "in.csv", "out.csv", "tfidf")
    for encoding in ("latin-1", "utf-16"):
        Path("in.csv").write_bytes("text\none\ncafé\n".encode(encoding))
        with pytest.raises(
            LetterheadError, match=r"in.csv, line [13]: not utf-8 .* save the file as UTF-8"
        ):
            predict.main(experiment, "in.csv", "out.csv", "tfidf")
    with pytest.raises(LetterheadError, match="has no report yet, .*run: make report EXP=mine"):
        predict.main(experiment, "rows.csv", "out.csv", "best")
    with pytest.raises(LetterheadError, match="bert@7: no whole checkpoint; .* holds steps none"):
        predict.main(experiment, "rows.csv", "out.csv", "bert@7")


def test_a_text_of_several_columns_is_put_together_as_in_training(experiment):
    Path("in.csv").write_text("body,n,title\nsecond,1,first\n,2,alone\n")
    columns = Columns(text=["title", "body"], empty_parts=True)
    experiment = experiment.model_copy(
        update={"data": experiment.data.model_copy(update={"columns": columns})}
    )
    _, rows = predict.read_table(Path("in.csv"), experiment)
    assert [text for _, text in rows] == ["first\nsecond", "alone"]
    columns.empty_parts = False
    with pytest.raises(LetterheadError, match=r"in.csv, row 2 .*: column 'body' is empty"):
        list(predict.read_table(Path("in.csv"), experiment)[1])


def test_every_kind_of_file_that_training_reads_is_labelled_alike(experiment):
    rows = [{"n": i, "text": f'a "quoted" text, {i}', "more": None if i else "x"} for i in range(3)]
    write_csv(
        "in.csv", [(of["n"], of["text"], of["more"] or "") for of in rows], ["n", "text", "more"]
    )
    Path("in.tsv").write_text("".join(f"{n}\t{text}\t{more}\n" for n, text, more in read("in.csv")))
    Path("in.jsonl").write_text(
        "".join(json.dumps(of if of["more"] else of | {"more": None}) + "\n" for of in rows)
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "in.parquet")
    for kind in ("csv", "tsv", "jsonl", "parquet"):
        predict.main(experiment, f"in.{kind}", f"{kind}.csv", "tfidf")
        assert Path(f"{kind}.csv").read_bytes() == Path("csv.csv").read_bytes()
    assert read("csv.csv")[1][:3] == ["0", rows[0]["text"], "x"]
    late = {"text": "b", "n": True, "late": 0.5}  # a key that only the last row has
    Path("in.jsonl").write_text(
        '{"text": "a", "n": [1, "\\ud800"]}\n' * 200 + json.dumps(late) + "\n"
    )
    predict.main(experiment, "in.jsonl", "odd.csv", "tfidf")
    odd = read("odd.csv")
    found = [odd[i][:3] for i in (0, 1, -1)]
    assert found == [["text", "n", "late"], ["a", '[1, "?"]', ""], ["b", "true", "0.5"]]
    moment = datetime(2026, 1, 2, 3, 4)
    table = {"text": ["a"], "day": [moment.date()], "time": [moment], "price": [Decimal("1.50")]}
    pyarrow.parquet.write_table(pyarrow.table(table), "typed.parquet")
    predict.main(experiment, "typed.parquet", "typed.csv", "tfidf")
    assert read("typed.csv")[1][:4] == ["a", "2026-01-02", "2026-01-02 03:04:00", "1.50"]
    for name, content, message in (
        ("in.pdf", "text\na\n", "a .pdf file; known: .csv"),
        ("twice.csv", "text,n,text\na,1,2\n", "2 columns are called 'text'; rename all but one"),
        ("none.csv", "", "no columns"),
    ):
        Path(name).write_text(content)
        with pytest.raises(LetterheadError, match=message):
            predict.main(experiment, name, "out.csv", "tfidf")


def test_what_is_written_has_the_form_that_its_ending_says(experiment):
    rows = [("1", 'a "quoted", text'), ("2", ""), ("3", "two\nlines"), ("4", "a\rb")]
    rows.append(("5", "long " * 500_000))
    write_csv("in.csv", rows, ["n", "text"])
    experiment.data.bad_rows = "drop"
    for kind in ("csv", "jsonl", "parquet"):
        predict.main(experiment, "in.csv", f"out.{kind}", "tfidf")
    header, *lines = read("out.csv")
    at = header.index("prediction")
    objects = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    table = pyarrow.parquet.read_table("out.parquet")
    assert table.column_names == header == list(objects[0])
    for line, found, of_table in zip(lines, objects, table.to_pylist(), strict=True):
        assert [found[name] for name in header[:at]] == line[:at]
        assert found["prediction"] == of_table["prediction"] == (line[at] or None)
        shares = [float(value) if value else None for value in line[at + 1 :]]
        assert [found[name] for name in header[at + 1 :]] == shares
        assert [of_table[name] for name in header[at + 1 :]] == shares
    assert objects[1]["prediction"] is None
    assert [found["text"] for found in objects] == [text for _, text in rows]
    assert not list(Path().glob("out*.part*")) and not list(Path().glob("*.written"))
    with pytest.raises(LetterheadError, match=r"out.xlsx: OUT is written as .csv"):
        predict.main(experiment, "in.csv", "out.xlsx", "tfidf")
    write_csv("twice.csv", rows, ["prediction", "text"])
    with pytest.raises(LetterheadError, match=r".jsonl would have two columns 'prediction'"):
        predict.main(experiment, "twice.csv", "out.jsonl", "tfidf")


def test_texts_without_a_name_and_workbooks_are_labelled(experiment):
    texts = ["a text of one", "another text"]
    Path("in.txt").write_text("".join(f"{text}\n" for text in texts))
    write_csv("named.csv", [(text,) for text in texts], ["text"])
    book = openpyxl.Workbook()
    for text in ("text", *texts):
        book.active.append([text])
    book.save("in.xlsx")
    Path("in.csv.gz").write_bytes(gzip.compress(Path("named.csv").read_bytes()))
    answers = []
    for name in ("named.csv", "in.txt", "in.xlsx", "in.csv.gz"):
        predict.main(experiment, name, "out.csv", "tfidf")
        answers.append([line[1:] for line in read("out.csv")[1:]])
    assert len(answers[0]) == 2 and all(found == answers[0] for found in answers)


def test_lines_that_training_skips_below_the_header_are_skipped_in_files_of_that_kind(
    experiment, capsys
):
    of_tab = experiment.data.model_copy(
        update={"skip_lines": 2, "source": "pypi:some==1/of.tab#sha256=0"}
    )
    experiment = experiment.model_copy(update={"data": of_tab})
    lines = ["text\tn", "string\tdiscrete", "meta\tclass", "one\t1"]
    Path("in.tab").write_text("".join(f"{line}\n" for line in lines))
    Path("in.tsv").write_text("".join(f"{line}\n" for line in (lines[0], *lines[3:])))
    for kind in ("tab", "tsv"):
        assert [text for _, text in predict.read_table(Path(f"in.{kind}"), experiment)[1]] == [
            "one"
        ]
        assert ("in.tab: 2 lines below the header are left out" in capsys.readouterr().out) == (
            kind == "tab"
        )


def test_best_is_the_comparisons_choice(experiment):
    write_json(
        "runs/mine/results/comparison.json",
        {"methods": {"tfidf": {}, "bert@30": {}}},
    )
    write_json("runs/mine/results/decision.json", {"ship": "tfidf"})
    assert classifier.named_method(experiment, "best") == "tfidf"
    assert classifier.named_method(experiment, "bert") == "bert@30"
    with pytest.raises(LetterheadError, match="elmo: no such method"):
        classifier.named_method(experiment, "elmo")


@pytest.mark.parametrize("decoder", ["smollm2", "qwen3"])
def test_the_folded_model_is_the_sft_model(make_experiment, decoder, monkeypatch):
    monkeypatch.setattr(folding, "CHECKED_ROWS", 60)
    write_csv("rows.csv", nasty_rows(200))
    experiment = make_experiment(
        "rows.csv", LABELS, decoder=decoder, data={"rows": {"validation": 10, "test": 100}}
    )
    data.main(experiment)
    export.main(experiment, "sft@0")
    folder = Path("runs/mine/export/sft@0")
    require_model(folder)
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    encoder = load_prompt_encoder(experiment)
    texts = [json.loads(line)["text"] for line in open("data/mine/test.jsonl")]
    prompts = [encoder.encode(text) for text in texts]
    decoder_model = load_decoder(experiment.decoder.folder, "float32")
    scores = score_options(decoder_model, prompts, encoder.answers, False, 4096).log_likelihood
    ids = [encoder.encode_before_option(text) for text in texts]
    with torch.inference_mode():
        logits = torch.cat(
            [
                model(**tokenizer.pad({"input_ids": [one]}, return_tensors="pt")).logits
                for one in ids
            ]
        )
        batch = model(**tokenizer.pad({"input_ids": ids[:8]}, return_tensors="pt")).logits
    assert torch.allclose(batch, logits[:8], atol=1e-4)
    assert logits.argmax(1).tolist() == scores.argmax(1).tolist()
    relative = logits.double().log_softmax(-1).numpy()
    expected = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    assert np.abs(relative - expected).max() < 1e-4
    assert model.config.id2label == dict(enumerate(LABELS))

    said = said_by_the_cards_code(folder)
    assert repr(dict(enumerate(LABELS))) in said
    shares = torch.softmax(
        model(torch.tensor([encoder.encode_before_option(export.EXAMPLE)])).logits[0], -1
    )
    printed = [
        float(number) for number in re.findall(r"\d\.\d+(?:e-\d+)?", said.partition("tensor")[2])
    ]
    assert printed == pytest.approx(shares.tolist(), abs=1e-3)
    facts = read_json(folder / "letterhead_export.json")
    assert (
        facts["same_predictions"] == facts["rows_checked"] == 60 < len(texts)
        and facts["largest_difference"] < 1e-4
    )
    # With SmolLM2's own tokenizer text would fail: its "\n\n" is one token at the end, and two
    # where an option follows.
    assert facts["rows_whose_prompt_works_as_text"] == 60
    odd = [text for text in texts[:60] if "{{idx}}" in text]  # which LLaMA-Factory fills in
    assert facts["rows_whose_chat_template_gives_the_ids"] == 60 - len(odd)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    for text, of_text, row in zip(texts, ids, scores, strict=True):
        asked = [{"role": "user", "content": encoder.instruction(text)}]
        if "{{idx}}" not in text:
            assert (
                tokenizer.apply_chat_template(asked, enable_thinking=False, return_dict=False)
                == of_text
            )
        assert (
            classify(tokenizer.decode(of_text, clean_up_tokenization_spaces=False))[0]["label"]
            == LABELS[row.argmax()]
        )
    asked = [{"role": "user", "content": "hm"}]
    assert "think" not in tokenizer.apply_chat_template(asked, tokenize=False)  # a switch
    assert "pipeline_tag" not in (folder / "README.md").read_text()


def test_names_of_several_tokens_cannot_be_folded(make_experiment):
    write_csv("rows.csv", nasty_rows(120))
    keys = {"rows": {"validation": 10, "test": 20}}
    experiment = make_experiment("rows.csv", LABELS, data=keys, prompt={"options": "names"})
    data.main(experiment)
    with pytest.raises(
        LetterheadError, match="only single letters can be folded; set prompt.options: letters"
    ):
        export.main(experiment, "sft@0")
    with pytest.raises(LetterheadError, match="no_think: can't be exported; choose tfidf"):
        export.main(experiment, "zero_shot_no_think")


def test_an_export_carries_a_card_that_hubs_read_and_code_that_runs(experiment):
    """A checkpoint of BERT, and what a hub reads of the figures; the card's own lines label a
    text."""
    torch.manual_seed(0)
    tiny = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    tiny.id2label, tiny.label2id = (
        dict(enumerate(LABELS)),
        {label: i for i, label in enumerate(LABELS)},
    )
    folder = Path("runs/mine/bert/checkpoints/checkpoint-30")
    BertForSequenceClassification(tiny).save_pretrained(folder)
    AutoTokenizer.from_pretrained(experiment.encoder.folder).save_pretrained(folder)
    write_json(folder / "trainer_state.json", {"global_step": 30, "max_steps": 30})
    torch.save({}, folder / "optimizer.pt")
    result = a_result(f1_macro=0.91234, f1_macro_ci95=[0.88, 0.94], accuracy=0.9, n=20)
    write_json("runs/mine/results/bert@30.json", asdict(result))
    hostile = experiment.model_copy(
        update={"title": "![x](https://127.0.0.1:1/p.png) <b>bold</b>\n# A heading"}
    )
    export.main(hostile, "bert@30")
    exported = Path("runs/mine/export/bert@30")
    assert not list(exported.glob("*.pt")) and not (exported / "trainer_state.json").exists()
    card = ModelCard.load(exported / "README.md")
    assert card.data.pipeline_tag == "text-classification" and card.data.metrics == [
        "f1",
        "accuracy",
    ]
    assert [(of.metric_type, of.metric_value) for of in card.data.eval_results] == [
        ("f1", 0.9123),
        ("accuracy", 0.9),
    ]
    assert "0.912 | 0.880 to 0.940 | 0.900 | 20" in card.text
    assert "![x](" not in card.text and "<b>" not in card.text and "\n# A heading" not in card.text
    assert load_experiment(str(exported / "experiment.yaml")).labels == LABELS
    said = said_by_the_cards_code(exported)
    assert all(repr(label) in said for label in LABELS)


def test_weights_that_learnt_other_labels_texts_or_prompts_are_refused(experiment):
    for stage in ("bert", "sft"):
        checkpoint = Path(f"runs/mine/{stage}/checkpoints/checkpoint-30")
        heads.load_head(experiment.encoder.folder, LABELS).save_pretrained(checkpoint)
        write_json(checkpoint / "trainer_state.json", {"global_step": 30})
        StageRun(experiment, stage, 0).finish([], reading=experiment.reading)
    changes = {
        "data.labels": {"data": experiment.data.model_copy(update={"labels": LABELS[::-1]})},
        "data.max_words": {"data": experiment.data.model_copy(update={"max_words": 3})},
        "data.columns.text": {
            "data": experiment.data.model_copy(update={"columns": Columns(text=["text", "more"])})
        },
        "prompt": {
            "prompt": experiment.prompt.model_copy(update={"template": "{text}? {options}"})
        },
    }
    for key, sections in changes.items():
        changed = experiment.model_copy(update=sections)
        for name in ("bert@30", "sft@30"):
            assert classifier.model_folder(experiment, name).is_dir()
            if (name, key) == ("bert@30", "prompt"):
                assert classifier.model_folder(changed, name).is_dir()
                continue
            with pytest.raises(
                LetterheadError,
                match=f"{name}: was trained with another {key} than the experiment has now",
            ):
                classifier.model_folder(changed, name)


@pytest.mark.parametrize("form", ["head", "folded", "options"])
def test_an_exported_model_labels_rows_from_its_path_and_from_a_hub(experiment, form):
    """The same probabilities as the method that it was, whatever the order of its classes."""
    if form == "head":
        torch.manual_seed(0)
        heads.load_head(experiment.encoder.folder, LABELS).save_pretrained(
            checkpoint := Path("runs/mine/bert/checkpoints/checkpoint-30")
        )
        AutoTokenizer.from_pretrained(experiment.encoder.folder).save_pretrained(checkpoint)
        write_json(checkpoint / "trainer_state.json", {"global_step": 30})
    if form == "options":
        experiment.decoder.sft_options = Head()
        checkpoint = Path("runs/mine/sft-options/checkpoints/checkpoint-30")
        encoder = load_prompt_encoder(experiment)
        load_folded(experiment, encoder).save_pretrained(checkpoint)
        encoder.tokenizer.save_pretrained(checkpoint)
        write_json(checkpoint / "trainer_state.json", {"global_step": 30})
        folder = Path("runs/mine/export/sft_options@30")
        assert served(experiment, "sft_options@30")[1:3] == (folder, "pooling")
    name = {"head": "bert@30", "folded": "sft@0", "options": "sft_options@30"}[form]
    export.main(experiment, name)
    exported = Path("runs/mine/export") / name
    write_csv("in.csv", nasty_rows(30))
    predict.main(experiment, "in.csv", "method.csv", name)
    weights = load_file(exported / "model.safetensors")
    last = "classifier" if form == "head" else "score"
    for key in (key for key in weights if key.startswith(last)):
        weights[key] = weights[key].flip(0)
    save_file(weights, exported / "model.safetensors", {"format": "pt"})
    config = read_json(exported / "config.json")
    write_json(exported / "config.json", config | {"id2label": dict(enumerate(reversed(LABELS)))})
    predict.main(experiment, "in.csv", "path.csv", str(exported))
    method, path = read("method.csv"), read("path.csv")
    assert [line[: -len(LABELS)] for line in method] == [line[: -len(LABELS)] for line in path]
    given, again = (
        np.array([line[-len(LABELS) :] for line in of[1:]], float) for of in (method, path)
    )
    assert np.abs(given - again).max() < 1e-4 and given.std(0).max() > 1e-3

    if form == "head":
        files = {file.name: file.read_bytes() for file in exported.iterdir()}
        environment = {
            "PYTHONPATH": str(ROOT),
            "PATH": "/usr/bin:/bin",
            "HF_HOME": "hf",
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-m", "serve.predict", "--experiment", "mine"]
        command += ["--in", "in.csv", "--out", "hub.csv"]
        command += ["--model", f"hf:me/classifier@{ModelHub.COMMIT}"]
        keys = {"repository": "models/me/classifier", "files": files}
        hub = type("Classifier", (ModelHub,), keys)
        with running(hub) as address:
            finished = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env=environment | {"HF_ENDPOINT": address},
            )
        assert finished.returncode == 0, finished.stderr
        assert Path("hub.csv").read_bytes() == Path("path.csv").read_bytes()

    write_json(exported / "config.json", config | {"id2label": {0: "yes", 1: "no"}})
    with pytest.raises(LetterheadError, match="its classes are yes, no, and the experiment's"):
        predict.main(experiment, "in.csv", "other.csv", str(exported))
    experiment.decoder.dtype = "auto"  # which asks the model's shapes
    with pytest.raises(LetterheadError, match="runs/none: no checkpoint there"):
        predict.main(experiment, "in.csv", "other.csv", "runs/none")
    assert not Path("other.csv").exists()


def said_by_the_cards_code(exported: Path) -> str:
    """What the lines of Python in a model card print."""
    code = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert told.returncode == 0, told.stderr
    return told.stdout


def test_rows_on_which_rounding_may_decide_are_counted_in_bfloat16_alone(
    experiment, capsys, monkeypatch
):
    shares = {"near": [0.42, 0.4, 0.1, 0.08], "clear": [0.9, 0.05, 0.03, 0.02]}
    assert predict.near_ties(np.array(list(shares.values()))) == 1
    assert predict.near_ties(np.empty((0, 0))) == 0
    monkeypatch.setattr(
        predict,
        "load_classifier",
        lambda *_: lambda texts: np.array([shares[text] for text in texts]),
    )
    monkeypatch.setattr(predict, "model_folder", lambda *_: experiment.encoder.folder)
    write_csv("in.csv", [("near", ""), ("clear", ""), ("near", "")])
    for dtype, said in (("bfloat16", "2 rows have two classes within 0.1"), ("float32", "")):
        monkeypatch.setattr(predict, "precision", lambda *_, dtype=dtype: dtype)
        predict.main(experiment, "in.csv", f"{dtype}.csv", "bert@30")
        printed = capsys.readouterr().out
        assert said in printed and ("rounding" in printed) == bool(said)
