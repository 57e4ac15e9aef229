"""Experiments are checked when they are loaded, and an error names file, key and mend."""

from pathlib import Path

import pytest

from letterhead.config.experiment import load_experiment
from letterhead.files import LetterheadError

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml"))
)
def test_shipped_experiments_are_valid_and_complete(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    experiment = load_experiment(name)
    assert experiment.name == name and len(experiment.labels) >= 2
    assert experiment.sft_arguments()["dataset_dir"] == f"data/{name}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("data.rwos.test=3", r"quick.yaml with SET: data.rwos: unknown key; did you mean rows"),
        (
            "prompt.template='What is it? {options}'",
            r"prompt.template: write \{text\} once .* it stands 0x",
        ),
        ("seed=many", "seed: Input should be a valid integer"),
        ("data.rows.test", "'data.rows.test' is not key=value"),
        (
            "decoder.sft_options.learning_rat=1",
            "decoder.sft_options.learning_rat: unknown key; did you mean learning_rate",
        ),
        (
            "'decoder.model={parts: [pypi:a==1/b], tide: true}'",
            "decoder.model.whole: missing; add it\n.*did you mean tied",
        ),
        (
            "'encoder.model={parts: [hf:a], whole: x.bin}'",
            "encoder.model.parts.0: .*\n  encoder.model.whole: ",
        ),
        ("decoder.model=none.yaml", "decoder.model: none.yaml: no such file"),
        ("decoder.sft.config=none.yaml", "none.yaml: no such file"),
        (
            "decoder.model=model/other",
            "model is model/other, but .*full_sft.yaml trains model/SmolLM2-135M-Instruct",
        ),
        (
            "decoder.sft.overrides.finetuning_type=freeze",
            "must say stage: sft and finetuning_type: full or lora",
        ),
        ("prompt.options=numbers", "prompt.options: Input should be 'letters' or 'names'"),
        ("data.labels=[a,b]", "cannot be read as YAML with SET"),
        ("compare.metric=auc", "compare.metric: String should match pattern"),
        ("compare.metric=recall:Sport", "compare: 'Sport' is no label; they are Business, "),
        ("compare.metric=cost", "metric: cost and costs go together; write both"),
        (
            "'compare.costs={Technology: {Politics: 1}}'",
            "metric: cost and costs go together; write",
        ),
        (
            "compare.metric=cost 'compare.costs={Technology: {News: 1}}'",
            "compare: 'News' is no label",
        ),
        ("decoder.sft.overrides.seed=7", "seed is 42, but .*overrides say 7; name one"),
    ],
)
def test_a_wrong_key_is_named_with_its_mend(monkeypatch, overrides, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(LetterheadError, match=message):
        load_experiment("quick", overrides)


def test_a_missing_experiment_names_those_there_are(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(LetterheadError, match="no such experiment; did you mean quick?"):
        load_experiment("qiuck")
    with pytest.raises(LetterheadError, match="no such experiment; choose one of ag_news, .*quick"):
        load_experiment("xyz")


def test_more_labels_than_letters_is_an_error(make_experiment):
    with pytest.raises(
        LetterheadError, match="27 labels, but letters go to 26; set prompt.options: names"
    ):
        make_experiment("rows.csv", [f"class {i}" for i in range(27)])
    assert (
        len(
            make_experiment(
                "rows.csv", [f"class {i}" for i in range(27)], prompt={"options": "names"}
            ).labels
        )
        == 27
    )


def test_a_file_that_is_not_yaml_is_an_error(workplace):
    for text in ("data: [", "just text", "a: 1\na: 2"):
        Path("broken.yaml").write_text(text)
        with pytest.raises(LetterheadError, match=r"broken\.yaml"):
            load_experiment("broken.yaml")


def test_five_lines_of_yaml_are_an_experiment(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "mine.yaml"
    path.write_text(
        "title: my reviews\ndata:\n  source: reviews.csv\n  labels: [bad, good]\n  "
        "rows: {test: 500}\n"
    )
    assert load_experiment(str(path)).labels == ["bad", "good"]
    for labels, message in {
        "[no, yes]": "put quotes around that label",
        "{a: yes, b: c}": "put quotes around that label",
        "[a, null]": "a name is empty",
        "[a, a]": "a name stands twice",
        "[a]": "at least two classes",
        "4": "write a list of names, or a map",
    }.items():
        path.write_text(f"title: t\ndata: {{source: a.csv, labels: {labels}}}\n")
        with pytest.raises(LetterheadError, match=message):
            load_experiment(str(path))


def test_overrides_reach_llamafactory(monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = load_experiment("quick", "decoder.sft.overrides.learning_rate=3e-5").sft_arguments()
    assert (
        arguments["learning_rate"] == 3e-5
        and arguments["output_dir"] == "runs/quick/sft/checkpoints"
    )
