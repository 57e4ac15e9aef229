"""A study's cells are ordinary experiments on nested rows, done once each, and its sentences say
what its table says."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from letterhead.config.experiment import load_experiment
from letterhead.config.models import Encoder
from letterhead.files import LetterheadError, read_json, read_jsonl, write_jsonl
from letterhead.pipeline import METHODS
from letterhead.runs import results
from letterhead.runs.stage import StageRun
from letterhead.stats.figures import caption_of
from prep import data
from study import run
from study.cells import make, seed_keys, settings
from tests.conftest import ROOT
from tests.test_data import write_csv

LABELS = ["a", "b", "c"]
STAGES = {
    "tfidf": ("tfidf",),
    "bert": ("bert",),
    "linear-head": ("linear-head",),
    "eval-ckpts": ("eval-ckpts", "sft"),
}
# The better with many rows is the worse with few.
SKILL = {
    "bert": lambda rows: 0.01 * rows,
    "linear_head": lambda rows: 1.6,
    "tfidf": lambda rows: 0.5,
    "sft": lambda rows: 1.0,
}


@pytest.fixture
def studied(make_experiment, monkeypatch):
    """An experiment, a study of it, and what `make` was asked for; its trainings are drawn, not
    trained."""
    write_csv(
        "rows.csv", [(f"text {i} of {'many ' * (i % 5)}words", LABELS[i % 3]) for i in range(500)]
    )
    rows = {"validation": 30, "test": 150}
    experiment = make_experiment(
        "rows.csv", LABELS, data={"rows": rows}, decoder_keys={"train_rows": 60}
    )
    Path("experiments/studies").mkdir()
    keys = {
        "title": "How many rows?",
        "rows": [30, 60, None],
        "seeds": [1, 2],
        "methods": list(SKILL),
        "keys": {"eval.untrained": False},
    }
    Path("experiments/studies/curve.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    asked = []

    def fake(name: str, overrides: str, targets) -> None:
        cell = load_experiment(name, overrides)
        asked.append(cell.name)
        if len(asked) == fake.fails_at:
            raise LetterheadError("killed")
        data.main(cell)
        (cell.run_folder / "sft" / "checkpoints").mkdir(
            parents=True, exist_ok=True
        )  # gigabytes of weights
        rng = np.random.default_rng([cell.seed, 1])
        n = read_json(cell.data_folder / "data_card.json")["rows"]["train"]
        for target in targets:
            method = {"eval-ckpts": "sft", "zero-shot": "zero"}.get(
                target, target.replace("-", "_")
            )
            names = ["zero_shot_no_think", "zero_shot_calibrated"] if method == "zero" else [method]
            files = []
            for one in names:
                for split in results.SPLITS:
                    of = results.read_rows(cell, split)
                    score = rng.normal(size=(len(of), 3))
                    score[np.arange(len(of)), results.class_numbers(cell, of)] += SKILL.get(
                        one, lambda _: 0.1
                    )(n)
                    odds = np.exp(score)
                    step = f"{one}@10" if one in ("bert", "linear_head", "sft") else one
                    results.write_result(
                        cell,
                        step,
                        split,
                        of,
                        probabilities=odds / odds.sum(1, keepdims=True),
                        seconds=1.0,
                        tokens=900,
                        parameters={"tfidf": 3}.get(one, 1000),
                        dtype="float32",
                        model="m",
                        inputs_sha256="0",
                    )
                    files += results.result_files(cell, step, split)
            for stage in STAGES.get(target, (target,)):
                StageRun(cell, stage, 0).finish(files, rows=n, scoring_seconds=1.0)

    fake.fails_at = 0
    monkeypatch.setattr(run, "make", fake)
    return experiment, asked, fake


def test_the_curve_is_drawn_from_cells_on_nested_rows_each_done_once(studied):
    experiment, asked, fake = studied
    fake.fails_at = 5
    with pytest.raises(LetterheadError, match="killed"):
        run.main(experiment, "mine", "", "curve")
    so_far = Path("runs/mine/study-curve/STUDY.md").read_text()
    assert "**So far 1 of 2 seeds.**" in so_far and "Highest macro F1 (one seed)" in so_far
    fake.fails_at = 0
    run.main(experiment, "mine", "", "curve")
    cells = [f"mine.curve.{rows}.seed{seed}" for seed in (1, 2) for rows in (30, 60, 320)]
    assert asked == [
        "mine",
        *cells[:4],
        "mine",
        *cells[3:],
    ]  # what was done before the failure is not done again
    run.main(experiment, "mine", "", "curve")
    assert asked[9:] == ["mine"]
    assert [str(path) for path in Path("runs").glob("*/*/checkpoints")] == [
        "runs/mine/sft/checkpoints"
    ]

    def ids(cell: str, split: str) -> set[str]:
        return {row["id"] for row in read_jsonl(Path("data", cell, f"{split}.jsonl"))}

    for split in ("test", "validation"):
        assert all(ids(cell, split) == ids("mine", split) for cell in cells)
    for seed in (1, 2):
        few, some, all_ = (
            ids(f"mine.curve.{rows}.seed{seed}", "decoder_train") for rows in (30, 60, 320)
        )
        assert (
            few < some < all_
            and len(few) == 30
            and few == ids(f"mine.curve.30.seed{seed}", "train")
        )
    assert ids("mine.curve.30.seed1", "train") != ids("mine.curve.30.seed2", "train")

    made = read_json("runs/mine/study-curve/study.json")
    assert [point["rows"] for point in made["found"]] == [30, 60, 320]
    for point in made["found"]:
        for method in SKILL:
            of, name = (
                point["arms"][METHODS[method].title],
                f"{method}@10" if METHODS[method].has_steps else method,
            )
            trained = [
                load_experiment("mine", f"name=mine.curve.{point['rows']}.seed{seed}")
                for seed in (1, 2)
            ]
            each = [results.read_result(training, name, "test").f1_macro for training in trained]
            assert of["f1_macro"] == pytest.approx(np.mean(each))
            assert of["f1_macro_ci95"][0] < of["f1_macro"] <= of["f1_macro_ci95"][1]
    best, fits, *passed = made["sentences"]
    assert (
        best == "Highest macro F1 (mean of 2 seeds): LLM, linear head at 30 to 60 rows, BERT "
        "at 320 rows."
    )
    assert "less than 0.01" in fits and any(
        one.startswith("BERT passes LLM, linear head between 60 and 320 rows (") for one in passed
    )
    for point in made["found"]:
        assert len(point["leads"]) == 6
        for pair, lead in point["leads"].items():
            a, b = pair.split(" over ")
            assert lead["interval"][0] < lead["f1_difference"] < lead["interval"][1]
            assert lead["f1_difference"] == pytest.approx(
                point["arms"][a]["f1_macro"] - point["arms"][b]["f1_macro"], abs=0.01
            )
            assert run.lead_of(point, b, a) == (-lead["f1_difference"], run.lead_of(point, a, b)[1])
    table = Path("runs/mine/study-curve/STUDY.md").read_text()
    assert "So far" not in table and "each seed draws its training rows" in table
    assert all(line in table for line in made["sentences"]) and table.count("\n| ") == 5
    assert Path("runs/mine/study-curve/study.png").stat().st_size > 20_000


def test_few_rows_are_trained_in_no_fewer_steps(studied):
    experiment, *_ = studied
    few, many = (run.keys_for_rows(experiment, rows, 60) for rows in (15, 320))
    for key in (
        "decoder.head.num_train_epochs",
        "encoder.head.num_train_epochs",
        "decoder.sft.overrides.num_train_epochs",
    ):
        assert few[key] == 4 * many[key]
    assert many["encoder.head.num_train_epochs"] == experiment.encoder.head.num_train_epochs


def test_a_study_may_vary_any_keys(studied):
    experiment, asked, _ = studied
    cells = {
        "gently": {"decoder.head.learning_rate": 1e-5},
        "boldly": {"decoder.head.learning_rate": 1e-3},
    }
    keys = {"title": "Which rate?", "cells": cells, "seeds": [3], "methods": ["linear_head"]}
    Path("experiments/studies/rate.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    run.main(experiment, "mine", "bench.training_rows=64", "rate")
    assert asked[1:] == ["mine.rate.gently.seed3", "mine.rate.boldly.seed3"]
    made = read_json("runs/mine/study-rate/study.json")
    (point,) = made["found"]
    assert point["rows"] is None and set(point["arms"]) == {"gently", "boldly"}
    assert (
        made["sentences"][0].startswith("Highest macro F1 (one seed): ")
        and "Not told apart from it: " in made["sentences"][0]
    )


def test_a_wrong_key_of_the_last_cell_is_told_before_the_first_is_made(studied):
    experiment, asked, _ = studied
    keys = {
        "title": "Wrong?",
        "cells": {"a": {}, "b": {"compare.margn": 0.1}},
        "methods": ["tfidf"],
    }
    Path("experiments/studies/wrong.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    with pytest.raises(LetterheadError, match="compare.margn: unknown key; did you mean margin"):
        run.main(experiment, "mine", "", "wrong")
    assert asked == []


def test_a_picture_names_the_models_of_all_cells(studied):
    experiment, *_ = studied
    other = experiment.model_copy(update={"encoder": Encoder(model="model/other")})
    assert "; seeds 1, 2" in caption_of(experiment, [1, 2]) and " and " not in caption_of(
        experiment, [1]
    )
    assert f"BERT: {experiment.encoder.folder.name} and other; seed 1" in caption_of(
        experiment, [1], [experiment, other]
    )


def test_a_cell_is_done_again_where_what_it_learnt_from_is_another(studied):
    experiment, asked, _ = studied
    data.main(experiment)
    ids = [row["id"] for row in read_jsonl("data/mine/train.jsonl")]
    keys = {
        "title": "Hard?",
        "rows": [30],
        "seeds": [1],
        "methods": ["sft"],
        "cells": {"hard": {"data.rows.train_from": "hard"}},
    }
    keys["keys"] = {"data.rows.ranking": "margins.jsonl"}
    Path("experiments/studies/hard.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    for sign, cells in ((1, 1), (1, 1), (-1, 2)):
        write_jsonl("margins.jsonl", [{"id": of, "margin": sign * i} for i, of in enumerate(ids)])
        run.main(experiment, "mine", "", "hard")
        assert asked.count("mine.hard.hard.30.seed1") == cells
        drawn = {
            row["id"] for row in read_jsonl("data/mine.hard.hard.30.seed1/decoder_train.jsonl")
        }
        assert len(drawn) == 30 and (drawn < set(ids[:100])) == (sign == 1)


def test_what_is_untrained_is_drawn_beside_the_arms_unless_far_from_them_or_an_arm(monkeypatch):
    figures = []
    monkeypatch.setattr(run, "save", lambda figure, *_: figures.append(figure))
    trained = {"f1_macro": 0.9, "f1_macro_ci95": [0.85, 0.95], "trainings": [{"f1_macro": 0.9}]}
    untrained = {"zero_shot_no_think": 0.1, "zero_shot_calibrated": 0.8}
    for methods, drawn, told in (
        (
            ["sft"],
            ["LLM zero-shot, contextual calibration"],
            "LLM zero-shot, option perplexity: 0.100, not drawn",
        ),
        (["sft", *untrained], [], None),
    ):
        study = run.Study(title="Which?", cells={"one": {}, "other": {}}, methods=methods)
        arms = {study.arm(cell, method): trained for cell in study.cells for method in methods}
        run.draw_arms(Path("study.png"), "", study, [{"arms": arms}], untrained)
        (axes,) = figures.pop().axes
        assert axes.get_legend_handles_labels()[1] == drawn
        assert axes.get_xlabel().split("\n")[1:] == ([told] if told else [])
        assert [text.get_text() for text in axes.get_yticklabels()] == list(arms)


def test_a_study_may_vary_rows_and_keys_and_each_cell_its_methods(studied):
    experiment, asked, _ = studied
    keys = {"title": "Both?", "rows": [30, 60], "seeds": [1, 2], "methods": ["linear_head", "bert"]}
    keys["cells"] = {"fast": {}, "slow": {"decoder.head.learning_rate": 1e-5, "methods": ["bert"]}}
    Path("experiments/studies/both.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    run.main(experiment, "mine", "", "both")
    assert asked[1:5] == [
        f"mine.both.{cell}.{rows}.seed1" for rows in (30, 60) for cell in ("fast", "slow")
    ]
    made = read_json("runs/mine/study-both/study.json")
    arms = ["fast: LLM, linear head", "fast: BERT", "slow: BERT"]
    assert [set(point["arms"]) for point in made["found"]] == [set(arms), set(arms)]
    assert (
        made["sentences"][-1].startswith("slow: BERT against fast: ")
        and " at 30, " in made["sentences"][-1]
    )
    assert Path("runs/mine/study-both/study.png").stat().st_size > 20_000
    keys = {
        "title": "Untrained?",
        "seeds": [1],
        "cells": {"letters": {}},
        "methods": ["zero_shot_no_think", "bert"],
    }
    Path("experiments/studies/zero.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    run.main(experiment, "mine", "", "zero")
    (point,) = read_json("runs/mine/study-zero/study.json")["found"]
    assert set(point["arms"]) == {"letters: LLM zero-shot, option perplexity", "letters: BERT"}
    assert run.lead_of(point, "letters: BERT", "letters: LLM zero-shot, option perplexity")[
        1
    ]  # told apart


def test_a_study_that_is_wrong_is_refused(studied):
    with pytest.raises(
        LetterheadError, match=r"studies/none.yaml: no such study; choose one of curve"
    ):
        run.load_study("none")
    for keys, message in (
        ({}, "name rows, or cells, or both"),
        ({"rows": [9], "methods": ["x"]}, "x unknown"),
        ({"cells": {"a": {"methods": ["y"]}}}, "y unknown"),
        ({"cells": {"a b": {}}}, "a b"),
        ({"row": [9]}, "bad.yaml: row: unknown key; did you mean rows\\?"),
        ({"rows": [9], "seeds": []}, "seeds: "),
    ):
        Path("experiments/studies/bad.yaml").write_text(yaml.safe_dump({"title": "t"} | keys))
        with pytest.raises(LetterheadError, match=message):
            run.load_study("bad")


def test_make_is_told_the_cell_alone_whatever_the_outer_make_was_told(make_experiment, monkeypatch):
    write_csv("rows.csv", [("a text", "a"), ("another", "b")])
    experiment = make_experiment("rows.csv", ["a", "b"], title="it's a title", seeds=[4, 5])
    Path("Makefile").write_text('say:\n\t@printf "%s|%s" "$$EXP" "$$SET" > said\nexport EXP SET\n')
    monkeypatch.setenv("MAKEFLAGS", " -- EXP=other SET=seed=9")
    said = settings("bench.training_rows=64", seed_keys(experiment.trainings()[1], experiment))
    make("mine", said, ["say"])
    name, overrides = Path("said").read_text().split("|")
    cell = load_experiment(name, overrides)
    assert (cell.name, cell.seed, cell.seeds, cell.data.seed) == ("mine.seed5", 5, [], 42)
    assert cell.bench.training_rows == 64
    with pytest.raises(LetterheadError, match="make --no-print-directory none EXP=mine .* failed"):
        make("mine", said, ["none"])


@pytest.mark.parametrize(
    "study", sorted(path.stem for path in (ROOT / "experiments/studies").glob("*.yaml"))
)
def test_every_cell_of_a_shipped_study_is_a_valid_experiment(monkeypatch, study):
    monkeypatch.chdir(ROOT)
    name = {
        "hard_rows": "ag_news_base",
        "think_block": "ag_news_base",
        "text_length": "newsgroups20",
    }.get(study, "quick")
    teacher = "'distill={endpoint: http://127.0.0.1:8000/v1, model: big}'"
    overrides = teacher if study in ("think_distill", "grpo") else ""
    experiment, of = load_experiment(name, overrides), run.load_study(study)
    for cell in of.all_cells:
        at = (50 if of.rows else None, cell, 5)
        made = load_experiment(name, run.said_of(of, study, experiment, name, overrides, at, 400))
        assert made.name == ".".join(
            [name, study, *([cell] if cell else []), *(["50"] if of.rows else []), "seed5"]
        )
        assert made.seed == 5 and made.data.seed == experiment.data.seed
        assert not made.distill or made.distill.of == name
        assert "sft_options" not in of.methods_of(cell) or made.decoder.sft_options


def test_the_user_is_heard_over_the_study_and_the_cell_over_the_user(studied):
    experiment, asked, _ = studied
    keys = {"title": "Which?", "seeds": [1], "methods": ["bert", "sft_options"], "rows": [30]}
    keys["keys"] = {
        "decoder.sft_options": {"num_train_epochs": 2, "learning_rate": 1e-5},
        "encoder.head.learning_rate": 1e-5,
    }
    keys["cells"] = {"mine": {"encoder.head.num_train_epochs": 9}}
    Path("experiments/studies/which.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    study, mine = (
        run.load_study("which"),
        "decoder.sft_options.learning_rate=0.3 encoder.head.num_train_epochs=4 name=x seed=8",
    )
    made = load_experiment(
        "mine", run.said_of(study, "which", experiment, "mine", mine, (30, "mine", 1), 60)
    )
    assert (made.name, made.seed) == ("mine.which.mine.30.seed1", 1)
    assert made.decoder.sft_options.learning_rate == 0.3 and made.encoder.head.learning_rate == 1e-5
    assert (
        made.decoder.sft_options.num_train_epochs == 4
    )  # twice the study's, since there are half as many rows
    assert made.encoder.head.num_train_epochs == 9
