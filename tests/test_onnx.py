"""Encoders in ONNX Runtime answer as torch does, in a folder that needs neither torch nor
transformers."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.contenders import Row, loops, measure_rows
from letterhead.files import LetterheadError, read_json, write_json
from letterhead.models import classifier, heads, onnx
from letterhead.models.prompt import TextEncoder
from letterhead.pipeline import BERT, EMBEDDING
from letterhead.runs import contenders, results
from prep import data
from serve import export, predict
from tests.test_data import write_csv
from tests.test_prompt import LABELS, nasty_rows
from tests.test_serve import read
from train import fitted

# What the folder's own lines may import, and what they may not
ABSENT = ("torch", "transformers", "sentence_transformers", "sklearn", "letterhead")


@pytest.fixture
def make(make_experiment, tiny_models):
    def make(**encoder):
        write_csv("rows.csv", nasty_rows(120))
        made = make_experiment(
            "rows.csv",
            LABELS,
            data={"rows": {"validation": 10, "test": 20}, "max_words": 12},
            encoder_keys={"model": str(tiny_models["bert"]), "prefix": "query: "} | encoder,
        )
        data.main(made)
        return made

    return make


@pytest.fixture
def experiment(make):
    return make()


def trained(experiment, method: str) -> str:
    """The full name of a method that was trained, or, BERT, given a random head."""
    if method == EMBEDDING.name:
        fitted.main(experiment, method)
        return method
    torch.manual_seed(0)
    checkpoint = Path("runs/mine/bert/checkpoints/checkpoint-30")
    model = heads.load_head(experiment.encoder.folder, LABELS)
    with torch.no_grad():
        model.classifier.weight.mul_(50)  # so that the answers are not all alike
    model.save_pretrained(checkpoint)
    heads.load_tokenizer(experiment.encoder.folder).save_pretrained(checkpoint)
    write_json(checkpoint / "trainer_state.json", {"global_step": 30})
    return f"{BERT.name}@30"


@pytest.mark.parametrize("method", [BERT.name, EMBEDDING.name])
def test_an_encoder_answers_in_onnx_as_in_torch_and_its_card_without_torch(
    make, fetched, method, monkeypatch, capsys
):
    experiment = make(**({"model": str(fetched["minilm"])} if method == EMBEDDING.name else {}))
    name = trained(experiment, method)
    monkeypatch.setattr(contenders, "temperature_of", lambda _, of: 2.5 if of == name else None)
    export.main(experiment, name, "onnx")
    folder, source = Path(f"runs/mine/export/{name}.onnx"), Path(f"runs/mine/export/{name}")
    texts = [row["text"] for row in results.read_rows(experiment, "test")]
    texts += ["Ein [SEP] Tor", "word " * 700]
    model = onnx.OnnxClassifier(folder, onnx.FLOAT32)
    torchs = classifier.load_classifier(experiment, str(source))
    expected = torchs(texts)
    assert np.abs(model(texts) - expected).max() < 1e-5 and expected.std(axis=0).max() > 1e-4
    alone = np.concatenate([model([text]) for text in texts])
    assert np.abs(alone - expected).max() < 1e-5
    assert np.abs(classifier.load_classifier(experiment, name)(texts) - expected).max() < 1e-5

    # ids are those of training
    config = read_json(folder / "config.json")
    reader = TextEncoder(heads.load_tokenizer(experiment.encoder.folder), 512)
    clean = [onnx.break_up(re.compile(config["control"]), text) for text in texts]
    assert clean == reader.neutralise(texts) and clean[-2] == "Ein [ SEP] Tor"
    ids = [
        [token for token, seen in zip(one.ids, one.attention_mask, strict=True) if seen]
        for one in model.tokenizer.encode_batch(clean)
    ]
    assert ids == reader.encode(texts) and max(map(len, ids)) == 512

    checked = config["checked"]
    assert set(checked) == {"float32", "int8"} and checked["float32"]["difference"] < 1e-3
    assert checked["float32"]["same"] == checked["float32"]["rows"] == 20
    assert checked["int8"]["difference"] > checked["float32"]["difference"]
    agrees = checked["int8"]["validation_same"] >= 0.99 * checked["int8"]["validation_rows"]
    assert config["file"] == ("model_int8.onnx" if agrees else "model.onnx")
    sizes = [(folder / file).stat().st_size for file in ("model.onnx", "model_int8.onnx")]
    assert sizes[0] > 3 * sizes[1]
    assert "of 20 test rows have the label" in capsys.readouterr().out

    # the card's lines, where torch is not
    card = (folder / "README.md").read_text()
    assert "library_name: onnx\n" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    blocked = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); "
    told = subprocess.run(
        [sys.executable, "-c", blocked + f"exec({code!r})"], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    shares = [float(one) for one in re.findall(r"\d\.\d+(?:e-\d+)?", told.stdout)]
    chosen = onnx.OnnxClassifier(folder)
    cut = "The text that is to be labelled."
    assert shares == pytest.approx(chosen([cut])[0], abs=1e-6)

    write_csv("in.csv", nasty_rows(30))
    predict.main(experiment, "in.csv", "onnx.csv", str(folder))
    write_json(folder / "config.json", config | {"file": "model.onnx"})
    predict.main(experiment, "in.csv", "float32.csv", str(folder))
    predict.main(experiment, "in.csv", "torch.csv", str(source))
    answers = [
        np.array([line[-len(LABELS) :] for line in read(file)[1:]], float)
        for file in ("onnx.csv", "float32.csv", "torch.csv")
    ]
    assert np.abs(answers[1] - answers[2]).max() < 1e-4
    largest = np.abs(answers[0] - answers[1]).max()
    assert 1e-6 < largest < 0.1 if agrees else largest == 0


def test_int8_that_answers_otherwise_is_not_what_is_named(experiment, monkeypatch):
    name, write = trained(experiment, BERT.name), onnx.write

    def swapped(source, folder, labels, max_length):
        """int8 as it would be were its rounding coarse: another model."""
        write(source, folder, labels, max_length)
        other = Path("other")
        model = heads.load_head(source, labels)
        with torch.no_grad():
            model.classifier.weight.mul_(-1)
        model.save_pretrained(other)
        heads.load_tokenizer(source).save_pretrained(other)
        target = Path("other.onnx")
        target.mkdir()
        write(other, target, labels, max_length)
        (folder / "model_int8.onnx").write_bytes((target / "model.onnx").read_bytes())

    monkeypatch.setattr(onnx, "write", swapped)
    export.main(experiment, name, "onnx")
    config = read_json(f"runs/mine/export/{name}.onnx/config.json")
    assert config["file"] == "model.onnx"
    assert config["checked"]["int8"]["same"] < config["checked"]["float32"]["same"] == 20


def test_what_is_no_encoder_and_what_is_no_format_are_told(experiment, workplace):
    with pytest.raises(LetterheadError, match="FORMAT=gguf: no such format; choose safetensors or"):
        export.main(experiment, "sft@0", "gguf")
    for name in ("sft@0", "tfidf"):
        with pytest.raises(
            LetterheadError, match=f"{name}: is no encoder; FORMAT=onnx writes .*bert"
        ):
            export.main(experiment, name, "onnx")
    name = trained(experiment, BERT.name)
    export.main(experiment, name, "onnx")
    folder = Path(f"runs/mine/export/{name}.onnx")
    file = folder / read_json(folder / "config.json")["file"]
    file.write_bytes(file.read_bytes()[:9999])
    with pytest.raises(LetterheadError, match="cannot be loaded .* export the model again"):
        classifier.load_classifier(experiment, str(folder))


def test_the_bench_measures_both_precisions_of_one_export(experiment, monkeypatch):
    name = trained(experiment, BERT.name)
    experiment.bench.requests, experiment.bench.concurrency = 10, [1, 4]
    both = [Row(BERT.name, engine, "head") for engine in ("onnx", "onnx_int8")]
    names = {BERT.name: name}
    first, _ = measure_rows(experiment, both[:1], names, Path("bench"))
    written = Path("bench/bert.onnx/model.onnx").stat().st_mtime_ns
    done, skipped = measure_rows(experiment, both, names, Path("bench"))
    assert done[:1] == first and not skipped
    assert Path("bench/bert.onnx/model.onnx").stat().st_mtime_ns == written
    assert [row["is_approximate"] for row in done] == [False, True]
    asked = [row for _, drawn in loops(experiment) for row in drawn if row["split"] == "test"]
    answers = classifier.load_classifier(experiment, name)([row["text"] for row in asked])
    right = [LABELS[i] == row["label"] for i, row in zip(answers.argmax(1), asked, strict=True)]
    assert done[0]["accuracy"] == pytest.approx(np.mean(right)) and done[0]["rps_single"] > 0


def test_a_price_of_rounded_weights_counts_where_they_answer_alike(monkeypatch):
    def prices(is_approximate: bool, same: float | None) -> int:
        row = {"method": "bert", "name": "bert@9", "cost_per_million": 1.0}
        row |= {"is_approximate": is_approximate, "same_as_evaluated": same}
        monkeypatch.setattr(results, "read_bench", lambda _: {"rows": [row]})
        return len(results.read_prices(None))

    assert [prices(True, same) for same in (1.0, 0.99, 0.98, None)] == [1, 1, 0, 0]
    assert prices(False, 0.5) == prices(False, None) == 1
