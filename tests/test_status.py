"""make status and the estimates: what is done is called done, what is not is not, and asking
changes nothing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eval import checkpoints
from letterhead.files import LetterheadError, read_json, write_json
from letterhead.models import cpu
from letterhead.models.llamafactory import sft_plan
from letterhead.pipeline import SFT_TRAINING
from letterhead.plan import time as estimate
from letterhead.runs import terminal
from letterhead.runs.stage import ESTIMATE, StageRun, minutes
from prep import data
from report import status
from tests.conftest import ROOT
from tests.test_data import write_csv
from train import distill, fitted, heads, sft

LABELS = ["World", "Sports"]


@pytest.fixture
def experiment(make_experiment):
    """Data and TF-IDF are made, no more."""
    write_csv("rows.csv", [(f"text {i} of {LABELS[i % 2]}", LABELS[i % 2]) for i in range(60)])
    made = make_experiment("rows.csv", LABELS)
    data.main(made)
    fitted.main(made, "tfidf")
    return made


def states(experiment, capsys) -> dict[str, str]:
    capsys.readouterr()
    status.main(experiment)
    lines = re.findall(r"^  (\S+) +(.*?)(?:  .*)?$", capsys.readouterr().out, re.MULTILINE)
    return {name: state.strip() for name, state in lines}


def test_each_stage_is_told_as_it_is_and_nothing_is_changed_by_asking(experiment, capsys):
    before = {path: path.read_bytes() for path in Path("runs").rglob("stage.json")}
    assert states(experiment, capsys) == dict.fromkeys(
        (
            "sft",
            "eval-ckpts",
            "zero-shot",
            "embedding",
            "bert",
            "linear-head",
            "compare",
            "decide",
            "report",
        ),
        "not made",
    ) | {"data": "done", "tfidf": "done"}
    other = experiment.model_copy(
        update={"data": experiment.data.model_copy(update={"max_words": 2})}
    )
    found = states(other, capsys)
    assert (
        found["data"] == "stale"
        and found["tfidf"] == "stale, since data is stale"
        and found["sft"] == "not made"
    )
    at_work = StageRun(experiment, "bert", 0)
    assert not at_work.is_current() and states(experiment, capsys)["bert"] == "running"
    at_work._lock.close()
    Path("runs/mine/sft/checkpoints/checkpoint-3").mkdir(parents=True)
    assert states(experiment, capsys)["sft"] == "begun, goes on"
    assert {path: path.read_bytes() for path in Path("runs").rglob("stage.json")} == before


def test_a_model_that_is_gone_makes_the_data_stale_and_is_not_fetched_by_asking(
    experiment, capsys, monkeypatch
):
    monkeypatch.setattr(
        status, "is_there", lambda model, folder: folder != experiment.encoder.folder
    )
    monkeypatch.setattr("prep.data.fetch_model", lambda *_: pytest.fail("asking fetched a model"))
    assert states(experiment, capsys)["data"] == "stale"


def test_a_stage_says_before_it_begins_how_long_it_takes_and_how_much_is_left(
    experiment, capsys, monkeypatch
):
    plan = {"seconds": {"data": 10.0, "tfidf": 20.0, "sft": 180.0}, "to_do": ["tfidf", "sft"]}
    write_json(Path("runs/mine", ESTIMATE), plan)
    os.utime(Path("runs/mine", ESTIMATE), (1, 1))  # TF-IDF was made since
    write_json("runs/mine/sft/stage.json", {"inputs_sha256": "other", "outputs": {}})
    run = StageRun(experiment, SFT_TRAINING)
    assert not run.is_current() and not run.is_current()  # asking deletes and prints nothing
    assert capsys.readouterr().out == "" and Path("runs/mine/sft/stage.json").exists()
    monkeypatch.setenv("ASKED", "report")
    run.start()
    said = capsys.readouterr().out
    assert not Path("runs/mine/sft/stage.json").exists()
    assert (
        "sft: teach the decoder to answer with an option: about 3 minutes" in said
        and "10%, about 3 minutes to go" in said
    )
    os.utime("runs/mine/tfidf/stage.json", (0, 0))  # it is one of before, and stale
    run.start()
    assert " 0%, about 3 minutes to go" in capsys.readouterr().out
    monkeypatch.setenv("ASKED", "sft")  # which asks nothing about a report
    run.start()
    assert capsys.readouterr().out.endswith("about 3 minutes\n")
    assert [minutes(of) for of in (3, 60, 600, 7200)] == [
        "less than a minute", "about a minute", "about 10 minutes", "about 2.0 hours"
    ]  # fmt: skip


def test_estimates_follow_rows_epochs_and_the_speed_of_the_machine(experiment, monkeypatch):
    card = read_json("data/mine/data_card.json")
    monkeypatch.setattr(estimate, "rate", lambda *_: (100_000_000, 4e11, 4e11))
    first = estimate.stage_seconds(experiment, card)
    assert set(first) == {
        "sft",
        "eval-ckpts",
        "zero-shot",
        "tfidf",
        "embedding",
        "bert",
        "linear-head",
        "compare",
        "decide",
        "report",
    }
    ten = {key: 10 * card["shared"][key] for key in ("rows", "sft_rows")}
    more = card | {"shared": ten}
    trained = [
        of["sft"] - 2 * estimate.START_S for of in (first, estimate.stage_seconds(experiment, more))
    ]
    assert trained[1] == pytest.approx(10 * trained[0], rel=0.05)
    sft = experiment.decoder.sft.model_copy(update={"patience": 1})
    decoder = experiment.decoder.model_copy(update={"sft": sft})
    patient = experiment.model_copy(update={"decoder": decoder})
    looked = estimate.stage_seconds(patient, card)["sft"]
    saves = len(sft_plan(patient, card["shared"]["sft_rows"])[1])
    tokens = estimate.prompt_tokens(card) + estimate.ANSWER_TOKENS
    rows = card["rows"]["validation"]
    assert looked - first["sft"] == pytest.approx(saves * rows * 2 * 1e8 * tokens / 4e11)
    counts = card["label_counts"] | {"validation": {"World": 9, "Sports": 1}}
    uneven, weighted = card | {"label_counts": counts}, {"balance": "weights"}
    looked = estimate.stage_seconds(patient.model_copy(update=weighted), uneven)["sft"]
    assert looked - first["sft"] == pytest.approx(saves * 2 * 9 * 2 * 1e8 * tokens / 4e11)
    monkeypatch.setattr(estimate, "rate", lambda *_: (100_000_000, 2e11, 2e11))
    slower = estimate.stage_seconds(experiment, card)
    assert slower["linear-head"] - estimate.START_S == pytest.approx(
        2 * (first["linear-head"] - estimate.START_S)
    )


def test_what_is_left_out_takes_no_time_and_no_disk_and_tells_so(experiment, monkeypatch, capsys):
    card = read_json("data/mine/data_card.json")
    monkeypatch.setattr(estimate, "rate", lambda *_: (100_000_000, 4e11, 4e11))
    first = estimate.stage_seconds(experiment, card)
    less = experiment.model_copy(update={"leave_out": ["sft", "bert"]})
    then = estimate.stage_seconds(less, card)
    assert set(first) - set(then) == {"sft", "eval-ckpts", "bert"}
    # Step 0, which is scored with the checkpoints where there are some, is left to zero-shot.
    assert first["zero-shot"] < then["zero-shot"] < first["zero-shot"] + first["eval-ckpts"]
    folders = {"decoder": experiment.decoder.folder, "encoder": experiment.encoder.folder}
    assert set(estimate.stage_bytes(less, folders, 50)) == {"linear-head"}
    assert set(estimate.stage_bytes(experiment, folders, 50)) == {"sft", "bert", "linear-head"}
    shown = set(states(less, capsys))
    assert shown & {"sft", "eval-ckpts", "bert", "linear-head"} == {"linear-head"}
    monkeypatch.setenv("ASKED", "bert")
    for stage, argument in ((sft, ()), (checkpoints, ()), (heads, ("bert",))):
        stage.main(less, *argument)
    assert capsys.readouterr().out == "bert: left out, as leave_out says\n"
    with pytest.raises(
        LetterheadError, match="leave_out: 'tfidf' can't be left out; choose of .*sft"
    ):
        status.main(experiment.model_copy(update={"leave_out": ["tfidf"]}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rate_of_a_busy_moment_does_not_stay_and_changes_no_dtype(
    experiment, monkeypatch, tmp_path, dtype
):
    """What was measured fastest counts, also where it is measured again while much else runs."""
    monkeypatch.setattr(cpu, "MEASURED", tmp_path / "precision.json")
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr("letterhead.models.precision.precision", lambda *_: dtype)
    folder, measured = experiment.encoder.folder, []
    for now in (10.0, 150.0, *[20.0] * 10):
        cpu.recent_rate.cache_clear()
        rates = dict.fromkeys(("float32", "bfloat16"), now)
        monkeypatch.setattr(cpu, "matmul_rates", lambda *_, rates=rates: rates)
        _, training, scoring = estimate.rate(experiment, folder)
        measured.append(scoring / estimate.SCORING[dtype] / 1e9)
        assert training / estimate.TRAINING[dtype] == pytest.approx(1e9 * measured[-1])
    assert measured == pytest.approx([10.0, *[150.0] * 10, 20.0])  # ten are kept
    cpu.recent_rate.cache_clear()
    assert cpu.measured_rates(folder) == dict.fromkeys(("float32", "bfloat16"), 10.0)


def test_other_settings_are_said_to_replace_what_is_there(experiment, capsys):
    (experiment.results_folder).mkdir(exist_ok=True)
    capsys.readouterr()
    data.main(
        experiment.model_copy(update={"data": experiment.data.model_copy(update={"max_words": 2})})
    )
    assert (
        'what runs/mine holds will be made anew; SET="name=mine2 …" keeps both'
        in capsys.readouterr().out
    )


def test_further_seeds_are_in_the_estimate(experiment, capsys, monkeypatch):
    monkeypatch.setattr(
        status,
        "stage_seconds",
        lambda *_: dict.fromkeys(["sft", "eval-ckpts", "bert", "report"], 60.0),
    )
    for seeds, message in (
        ([], "about 4 minutes"),
        ([1, 2], "about 7 minutes, further seeds among them (2)"),
    ):
        status.main(experiment.model_copy(update={"seeds": seeds}))
        assert capsys.readouterr().out.rstrip().endswith(message)
    seeded = experiment.model_copy(update={"seeds": [1, 2]})
    StageRun(seeded.trainings()[1], "bert", {"rows": "others"}).finish([])
    status.main(seeded)  # made from other data
    assert (
        capsys.readouterr().out.rstrip().endswith("about 7 minutes, further seeds among them (2)")
    )
    monkeypatch.setattr(status, "is_current", lambda *_: True)
    monkeypatch.setattr(status.pipeline, "inputs_sha256", lambda *_: "")
    status.main(seeded)
    assert (
        capsys.readouterr().out.rstrip().endswith("about 6 minutes, further seeds among them (2)")
    )


def test_before_anything_is_made_all_is_not_made(make_experiment, capsys):
    write_csv("rows.csv", [(f"text {i}", LABELS[i % 2]) for i in range(60)])
    assert set(states(make_experiment("rows.csv", LABELS), capsys).values()) == {"not made"}


@pytest.mark.parametrize(("asked", "is_told"), [("report", False), ("status distill", True)])
def test_a_stage_that_only_another_target_needs_says_less(
    experiment, capsys, monkeypatch, asked, is_told
):
    monkeypatch.setenv("ASKED", asked)
    assert bool(states(experiment, capsys)) is is_told
    distill.main(experiment)
    assert ("no section distill" in capsys.readouterr().out) is is_told


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["exp=quick"], "no variable exp; did you mean EXP=?"),
        (["Set=seed=1"], "no variable Set; did you mean SET=?"),
        (["STUDIE=curve"], "no variable STUDIE; did you mean STUDY=?"),
        (["TEXT=title"], "TEXT= is for make new"),
        (["LABELS=2"], "no variable LABELS; did you mean LABEL=?"),
    ],
)
def test_misspelt_variables_are_refused_with_the_right_name(said, message):
    told = subprocess.run(["make", "-n", "help", *said], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode and message in told.stderr


@pytest.mark.parametrize(
    ("target", "message"),
    [("predcit", "no target predcit; did you mean make predict?"), ("zzz", "make help lists them")],
)
def test_a_misspelt_target_is_refused_with_the_right_name(target, message):
    told = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode and message in told.stderr


def test_what_tools_read_from_the_environment_may_stand_on_the_command_line():
    told = subprocess.run(
        ["make", "-n", "help", "HF_ENDPOINT=https://a.mirror", "CUDA_VISIBLE_DEVICES="], cwd=ROOT
    )
    assert told.returncode == 0


@pytest.mark.parametrize("named", ["smoke.yaml", "experiments/smoke.yaml"])
def test_an_experiment_may_be_named_with_its_ending_and_folder(named):
    shown = subprocess.run(
        ["make", "-pn", "help", f"EXP={named}"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert re.search(r"^EXP .*= smoke$", shown, re.MULTILINE)


def test_a_folder_with_spaces_and_another_make_are_told(tmp_path):
    (folder := tmp_path / "my project").mkdir()
    shutil.copy(ROOT / "Makefile", folder)
    told = subprocess.run(["make", "-n", "help"], cwd=folder, capture_output=True, text=True)
    assert told.returncode and "has spaces" in told.stderr and "move it" in told.stderr
    assert "GNU make is needed here" in (ROOT / "BSDmakefile").read_text()


def test_a_worker_that_did_not_inherit_the_terminal_draws_no_bar_and_works_on(monkeypatch):
    """Several processes score under `make … NPROC=2`: they inherit the variable, not the file."""
    monkeypatch.setenv(terminal.INHERITED, "987")
    monkeypatch.setattr(terminal, "TERMINAL", terminal.Terminal())
    assert terminal.TERMINAL.errors() is sys.stderr
    with terminal.progress(total=1, disable=True) as bar:
        bar.update()
