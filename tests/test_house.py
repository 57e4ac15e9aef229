"""The house: stages and methods are listed once, each shelf uses those below it, and what is
derived follows by itself."""

import ast
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest

from eval import compare, decide
from letterhead import pipeline
from letterhead.config.experiment import Experiment
from letterhead.config.section import Section
from letterhead.files import LetterheadError, read_json
from letterhead.pipeline import METHODS, STAGES, Method, Need, Stage
from letterhead.runs import results
from letterhead.runs.stage import StageRun
from report import build, status
from serve import page, predict
from tests import test_report
from tests.conftest import ROOT
from tests.test_data import write_csv

# Each shelf of the library, and how high it stands; it uses those that stand no higher.
SHELVES = {
    "files": 0,
    "config": 1,
    "pipeline": 2,
    "stats": 2,
    "runs": 3,
    "models": 4,
    "rows": 5,
    "plan": 5,
    "serving": 5,
}
STAGE_FOLDERS = ("prep", "train", "eval", "bench", "serve", "report", "study")
# Keys that decide no result, and why
DECIDE_NOTHING = {
    "name": "where files lie",
    "leave_out": "which stages there are",
    "eval.batch_tokens": "how rows are batched",
    "eval.thinking.batch": "how rows are batched",
    "distill.key": "who pays",
    "distill.concurrency": "how fast the teacher is asked",
    "distill.requests_per_minute": "how fast the teacher is asked",
    "endpoint.key": "who pays",
    "endpoint.concurrency": "how fast the LLM is asked",
    "endpoint.requests_per_minute": "how fast the LLM is asked",
    "distill.price_of_prompts": "what it costs",
    "distill.price_of_replies": "what it costs",
    "bench": "what is measured, which the bench keeps with each row",
    "serve": "how vLLM is started",
}
# Names of stages and methods that are names of folders, or of sections of an experiment, as well
FOLDERS_TOO = {"data", "report"}
SECTIONS_TOO = {
    ("letterhead.config.experiment", "sft"),
    ("letterhead.config.models", "sft"),
    ("prep.new", "compare"),
    ("prep.new", "sft"),
    ("prep.new", "sft_options"),
    ("prep.preflight", "sft"),
    ("study.run", "distill"),
}


def sources() -> dict[str, ast.Module]:
    """Every module of the product → its syntax tree."""
    folders = ("letterhead", *STAGE_FOLDERS)
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(
            path.read_text(encoding="utf-8")
        )
        for path in files
    }


def imported(tree: ast.AST, modules: set[str]) -> set[str]:
    """The modules of the product that a tree imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def test_names_of_stages_and_methods_are_written_in_the_pipeline_alone():
    found = {
        (module, node.value)
        for module, tree in sources().items()
        if module != "letterhead.pipeline"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in {*STAGES, *METHODS} - FOLDERS_TOO
    }
    assert found == SECTIONS_TOO


def test_each_shelf_imports_only_those_below_it_and_no_stage_another():
    trees = sources()
    modules = set(trees)
    wrong = []
    for module, tree in trees.items():
        top, *rest = module.split(".")
        for other in imported(tree, modules):
            other_top, *other_rest = other.split(".")
            if top == "letterhead":
                climbs = other_top == "letterhead" and SHELVES[other_rest[0]] > SHELVES[rest[0]]
                if climbs or other_top != "letterhead":
                    wrong.append(f"{module} -> {other}")
            elif other_top not in (top, "letterhead"):
                wrong.append(f"{module} -> {other}")
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    trees = sources()
    graph = {}
    for module, tree in trees.items():
        top_level = ast.Module(
            [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], []
        )
        graph[module] = imported(top_level, set(trees)) - {module}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in graph[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def makefile() -> dict[str, tuple[list[str], str]]:
    """Target → prerequisites and recipe."""
    text = (ROOT / "Makefile").read_text()
    found = re.findall(
        r"^([a-z][\w-]*):([^#=\n]*)(?:##[^\n]*)?\n((?:\t[^\n]*\n)*)", text, re.MULTILINE
    )
    return {target: (prerequisites.split(), recipe) for target, prerequisites, recipe in found}


def test_the_makefiles_targets_and_prerequisites_are_those_of_the_stages():
    targets = makefile()
    made_by = {stage.make_target for stage in STAGES.values()}

    def before(target: str) -> set[str]:
        direct = [name for name in targets[target][0] if name in targets]
        return {*direct, *(name for one in direct for name in before(one))}

    scored = {
        name
        for method in METHODS.values()
        if method.when is not pipeline.never
        for name in (method.stage, method.trained_by)
    }
    for stage in STAGES.values():
        command = f"{stage.module} {stage.argument} $(STAGE)".replace("  ", " ")
        assert command in targets[stage.make_target][1], stage.name
        needs = {need.stage for need in stage.needs}
        if stage is pipeline.COMPARE:
            needs = scored - {None}
        elif stage is pipeline.CASCADES:
            needs = {method.stage for method in METHODS.values() if method.loader} - {stage.name}
        needed = {STAGES[name].make_target for name in needs}
        assert needed - {stage.make_target} <= before(stage.make_target), stage.name
        # Nothing is made for a stage that it, or what it needs, does not read.
        further = before(stage.make_target) & made_by
        allowed = set(needed)
        for name in needed:
            allowed |= before(name)
        assert further <= allowed | {pipeline.DATA.name}, stage.name


def leaves(section: type[Section], prefix: str = "") -> list[str]:
    """The dotted keys of an experiment's schema."""
    keys = []
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        inner = next(
            (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None
        )
        is_model = name == "model"  # of text, or of parts
        keys += (
            [f"{prefix}{name}"] if inner is None or is_model else leaves(inner, f"{prefix}{name}.")
        )
    return keys


def test_every_key_of_an_experiment_decides_a_stage_or_is_said_to_decide_nothing():
    covered = set()
    for stage in STAGES.values():
        covered |= {f"{model}.model" for model in stage.models}
        for key in stage.keys:
            path, _, names = key.partition(":")
            covered |= {f"{path}.{name}" for name in names.split(",")} if names else {path}
    covered |= {"distill.of"}  # by what is taken over from there
    open_keys = []
    for key in leaves(Experiment):
        parts = key.split(".")
        beginnings = {".".join(parts[: i + 1]) for i in range(len(parts))}
        if not beginnings & (covered | set(DECIDE_NOTHING)):
            open_keys.append(key)
    assert not open_keys


@pytest.mark.parametrize(
    "key",
    ["decoder.dtype=bfloat16", "encoder.head.learning_rate=0.3", "compare.margin=0.2", "seed=7"],
)
def test_another_key_makes_stale_what_hangs_on_it(make_experiment, key):
    from letterhead.config.experiment import load_experiment
    from prep import data

    write_csv("rows.csv", [(f"text {i} of {'ab'[i % 2]}", "xy"[i % 2]) for i in range(60)])
    experiment = make_experiment("rows.csv", ["x", "y"])
    data.main(experiment)
    other = load_experiment("mine", key)
    StageRun(experiment, "compare", 0).finish([])
    changed = {
        name
        for name in ("sft", "bert", "linear-head", "tfidf", "decide")
        if pipeline.inputs_sha256(STAGES[name], experiment)
        != pipeline.inputs_sha256(STAGES[name], other)
    }
    assert (
        changed
        == {
            "decoder.dtype=bfloat16": {"sft", "bert", "linear-head"},
            "encoder.head.learning_rate=0.3": {"bert"},
            "compare.margin=0.2": {"decide"},
            "seed=7": {"sft", "bert", "linear-head", "tfidf"},
        }[key]
    )


def test_inputs_are_computed_without_a_trace_and_name_what_is_not_made(make_experiment):
    write_csv("rows.csv", [("a", "x"), ("b", "y")] * 20)
    experiment = make_experiment("rows.csv", ["x", "y"])
    with pytest.raises(
        LetterheadError, match="runs/mine/data: not made yet; run: make data EXP=mine"
    ):
        pipeline.inputs(STAGES["bert"], experiment)
    pipeline.inputs(pipeline.DATA, experiment)
    assert not Path("runs").exists() and not Path("data").exists()
    needs_itself = Stage("odd", "nothing", "none", needs=(Need("data", when=pipeline.never),))
    assert pipeline.inputs(needs_itself, experiment)["files"] == {}


def load_first_class(experiment: Experiment, name: str):
    """A classifier that answers with the first class, or nearly."""
    classes = len(experiment.labels)
    shares = np.full(classes, 0.1 / (classes - 1))
    shares[0] = 0.9
    return lambda texts: np.tile(shares, (len(texts), 1))


def test_a_method_that_is_registered_is_compared_decided_shown_and_predicted_with(
    make_experiment, monkeypatch, capsys
):
    stage = Stage(
        "first-class",
        "answer with the first class",
        "tests.none",
        needs=(Need("data", ("test.jsonl",)),),
    )
    method = Method(
        "first_class",
        "The first class",
        stage.name,
        stage.name,
        pipeline.SHARED,
        loader="tests.test_house:load_first_class",
    )
    monkeypatch.setitem(STAGES, stage.name, stage)
    monkeypatch.setitem(METHODS, method.name, method)
    monkeypatch.setitem(test_report.SKILL, method.name, 0.4)
    experiment = test_report.drawn(make_experiment, validation=60)
    assert method in pipeline.compared_methods(experiment)
    comparison = read_json("runs/mine/results/comparison.json")
    entry = comparison["methods"][method.name]
    assert entry["title"] == "The first class" and entry["f1_macro"] < 0.9
    assert any(method.name in (pair["a"], pair["b"]) for pair in comparison["pairs"])
    assert method.name in read_json("runs/mine/results/decision.json")["prices"]
    assert "The first class" in Path("runs/mine/report/report.html").read_text()
    assert "The first class" in Path("runs/mine/report/REPORT.md").read_text()
    capsys.readouterr()
    status.main(experiment)
    assert re.search(r"^  first-class +", capsys.readouterr().out, re.MULTILINE)
    assert page.trained_methods(experiment)[method.name].startswith("The first class (macro F1")
    write_csv("in.csv", [("a text", "")])
    predict.main(experiment, "in.csv", "out.csv", method.name)
    assert f",{experiment.labels[0]},0." in Path("out.csv").read_text()
    for module in (compare, decide, build):
        module.main(experiment)  # up to date


def test_what_make_starts_is_offline_before_a_library_is_imported_but_for_what_fetches():
    recipes = (ROOT / "Makefile").read_text()
    online = set(re.findall(r"\$\(ONLINE\) ([\w.]+)", recipes))
    assert online == {
        "prep.new",
        "prep.data",
        "prep.preflight",
        "serve.predict",
        "prep.licenses",
        "letterhead.runs.devices",
    }
    prefix = re.search(r"^RUN = (.*) \$\(ONLINE\)$", recipes, re.MULTILINE)[1]
    settings = dict(pair.split("=") for pair in prefix.split())
    code = "import train.heads_worker, huggingface_hub.constants as hub, datasets.config as sets\n"
    code += "print(hub.HF_HUB_OFFLINE, sets.HF_HUB_OFFLINE)"
    bare = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    for environment, expected in ((bare | settings, "True True"), (bare, "False False")):
        ended = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=environment | {"PYTHONPATH": str(ROOT)},
        )
        assert ended.stdout.strip() == expected, ended.stderr


def test_a_lost_result_of_a_head_costs_a_scoring_and_a_pruned_checkpoint_leaves_a_gap(
    make_experiment, tiny_models, capsys
):
    from prep import data
    from train import heads, heads_worker

    labels = ["World", "Sports", "Business"]
    write_csv("rows.csv", [(f"text {i} of {labels[i % 3]} news", labels[i % 3]) for i in range(60)])
    head = {"per_device_train_batch_size": 8, "eval_steps": 0.25, "num_train_epochs": 2}
    encoder = {"model": str(tiny_models["bert"]), "head": head}
    experiment = make_experiment(
        "rows.csv", labels, data={"rows": {"validation": 8, "test": 8}}, encoder_keys=encoder
    )
    data.main(experiment)
    heads.main(experiment, "bert")
    folder = METHODS["bert"].checkpoints(experiment)
    kept = sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))
    steps = sorted(
        result["step"]
        for path in experiment.results_folder.glob("bert@*.json")
        if (result := read_json(path))
    )
    pruned = min(set(steps) - set(kept))
    files = {
        step: results.result_files(experiment, f"bert@{step}", "test")
        for step in (kept[-1], pruned)
    }
    before = files[kept[-1]][1].read_bytes()
    weights = {path: path.read_bytes() for path in folder.glob("*/model.safetensors")}
    for both in files.values():
        for file in both:
            file.unlink()
    heads.main(experiment, "bert")
    assert files[kept[-1]][1].read_bytes() == before and not files[pruned][0].exists()
    assert {path: path.read_bytes() for path in folder.glob("*/model.safetensors")} == weights
    assert (
        f"step {pruned} on test rows is gone, and so is its checkpoint; a gap is left"
        in capsys.readouterr().out
    )
    assert (
        f"| {pruned} | not scored: no whole checkpoint"
        in (experiment.results_folder / "bert_checkpoints.md").read_text()
    )
    assert heads_worker.CLOCK in {path.name for path in folder.parent.iterdir()}
