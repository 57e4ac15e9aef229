"""Before a run: the estimate of memory against measured peaks, disk, and what the preflight says of
a machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

import prep.preflight
from letterhead import pipeline
from letterhead.config.experiment import load_experiment
from letterhead.config.models import Lora
from letterhead.files import write_json
from letterhead.models import checkpoints, llamafactory
from letterhead.plan import memory as needs
from letterhead.plan.time import START_S, stage_seconds, trial_of
from letterhead.rows.fetch import is_there
from letterhead.serving import vllm as service
from prep import data
from tests.conftest import ROOT
from tests.fakes import ModelHub, running
from tests.test_data import write_csv
from tests.test_prompt import LABELS, nasty_rows

# What is trained: architecture and shape, how, and the rows of a batch and their tokens.
SMALL = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_attention_heads": 6,
    "num_hidden_layers": 8,
}
SHAPES = {
    "llama, SFT": (
        "llama",
        {**SMALL, "num_key_value_heads": 3},
        {"kind": "sft", "batch": 8, "length": 200},
    ),
    "qwen3, SFT, checkpointing": (
        "qwen3",
        {**SMALL, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 12},
        {"kind": "sft", "batch": 4, "length": 300, "checkpointing": True},
    ),
    "llama, SFT, adapter": (
        "llama",
        {**SMALL, "num_key_value_heads": 3},
        {"kind": "sft", "batch": 8, "length": 200, "lora": {"rank": 8}},
    ),
    "bert, head, adapter": (
        "bert",
        {**SMALL, "num_hidden_layers": 12},
        {"kind": "head", "batch": 24, "length": 128, "lora": {"rank": 8}},
    ),
    "bert, head": (
        "bert",
        {**SMALL, "num_hidden_layers": 12},
        {"kind": "head", "batch": 24, "length": 128},
    ),
    "qwen3, head": (
        "qwen3",
        {**SMALL, "num_key_value_heads": 2, "head_dim": 64},
        {"kind": "head", "batch": 8, "length": 256},
    ),
}
ANSWER_TOKENS = 8  # of tests/peak.py's rows, in round numbers
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "bert": (BertConfig, BertModel),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_the_estimate_of_memory_is_within_a_fifth_of_the_measured_peak(
    fetched, workplace, qwen3_tokenizer, name
):
    kind, shape, how = SHAPES[name]
    tokenizers = {
        "qwen3": lambda: qwen3_tokenizer,
        "llama": lambda: AutoTokenizer.from_pretrained(fetched["smollm2"]),
    }
    tokenizer = tokenizers.get(kind, lambda: AutoTokenizer.from_pretrained(fetched["minilm"]))()
    config, model = CLASSES[kind]
    more = {"tie_word_embeddings": True}
    if kind == "bert":  # a GPU's kernels save no probabilities, as the CPU's does with dropout
        more = {"attention_probs_dropout_prob": 0.0}
    model(config(vocab_size=len(tokenizer), **shape, **more)).save_pretrained("model")
    tokenizer.save_pretrained("model")
    how = {"half": False, "checkpointing": False, "model": "model", "words": how["length"]} | how
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    # What is freed goes back at once.
    environment["GLIBC_TUNABLES"] = (
        "glibc.malloc.mmap_threshold=65536:glibc.malloc.trim_threshold=65536"
    )
    command = [sys.executable, "-m", "tests.peak", json.dumps(how)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr[-3000:]
    measured = next(
        json.loads(line)["peak"]
        for line in finished.stdout.splitlines()
        if line.startswith('{"peak"')
    )
    classes = None if how["kind"] == "sft" else 2
    lora = Lora(**how["lora"]) if "lora" in how else None
    sizes = how["batch"], how["length"], how["half"]
    projected = None if classes else ANSWER_TOKENS
    said = needs.training_memory(
        Path("model"), *sizes, classes, how["checkpointing"], lora, projected
    )
    print(
        f"\n{name}: measured {measured / checkpoints.GIB:.2f} GiB, estimated {said}, "
        f"ratio {said.total / measured:.2f}"
    )
    assert said.total == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("classes", [None, 4], ids=["SFT, checkpointing", "head"])
def test_the_estimate_in_bfloat16_is_within_a_fifth_of_what_torch_tracks(workplace, classes):
    # A CPU without bfloat16 takes minutes and scratch memory for it, so torch's own tracker counts
    # tensors without storage.
    batch = (
        64 if classes else 8
    )  # activations must be most of a head's peak, or this could not fail on them
    shape = {**SMALL, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 3}
    config = Qwen3Config(
        vocab_size=60_000, tie_word_embeddings=True, **shape, architectures=["Qwen3ForCausalLM"]
    )
    config.save_pretrained("model")
    with FakeTensorMode():
        if classes:
            config.num_labels, config.pad_token_id = classes, 0
            model = Qwen3ForSequenceClassification(config).train()
        else:
            model = Qwen3ForCausalLM(config).train()
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        optimizer, tracker = torch.optim.AdamW(model.parameters(), fused=True), MemTracker()
        tracker.track_external(model, optimizer)
        ids = torch.ones(batch, 120, dtype=torch.long)
        labels = torch.zeros(batch, dtype=torch.long) if classes else ids
        with tracker:
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(
                        input_ids=ids, attention_mask=ids, labels=labels, use_cache=False
                    ).loss
                loss.backward()
                (
                    optimizer.step(),
                    optimizer.zero_grad(set_to_none=False),
                )  # a gradient stays, as between accumulated batches
                tracker.reset_mod_stats()
        tracked = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    said = needs.training_memory(Path("model"), batch, 120, True, classes, not classes)
    ratio = said.total / tracked
    print(
        f"\nbfloat16, {classes} classes: tracked {tracked / checkpoints.GIB:.2f} GiB, "
        f"estimated {said}, ratio {ratio:.2f}"
    )
    assert said.total == pytest.approx(tracked, rel=0.2)


def test_attention_dropout_takes_no_memory_on_a_gpu(workplace):
    totals = []
    for dropout in (0.0, 0.1):
        config = BertConfig(vocab_size=1000, attention_probs_dropout_prob=dropout, **SMALL)
        config.save_pretrained("bert")
        totals.append(needs.training_memory(Path("bert"), 64, 350, True, 4).total)
    assert totals[0] == totals[1]


def test_several_gpus_hold_copies_of_the_gradients_and_want_shared_memory(
    workplace, monkeypatch, make_experiment
):
    config = BertConfig(vocab_size=1000, **SMALL)
    config.save_pretrained("bert")
    one, two = (needs.training_memory(Path("bert"), 2, 32, True, 4, processes=n) for n in (1, 2))
    assert two.gradients == 2 * one.gradients and two.activations == one.activations
    monkeypatch.setattr(prep.preflight, "_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("NPROC", "2")
    small = SimpleNamespace(total=64 << 20)
    monkeypatch.setattr(prep.preflight.shutil, "disk_usage", lambda _: small)
    plan = SimpleNamespace(experiment=make_experiment("rows.csv", LABELS))
    with pytest.raises(prep.preflight.No, match=r"/dev/shm has 64 MiB, .*--shm-size=1g"):
        prep.preflight.device(plan)


def test_parameters_are_those_of_the_model_tied_ones_once(tiny_models):
    for name in ("smollm2", "qwen3"):
        model = CLASSES["llama" if name == "smollm2" else name][1].from_pretrained(
            tiny_models[name]
        )
        assert needs.parameter_count(tiny_models[name]) == sum(
            p.numel() for p in model.parameters()
        )
        assert checkpoints.stored_parameters(tiny_models[name]) == needs.parameter_count(
            tiny_models[name]
        )
    assert torch.get_default_dtype() == torch.float32


def preflight(**variables: str) -> subprocess.CompletedProcess:
    """`make preflight` on experiments/mine.yaml, in a process of its own."""
    command = [sys.executable, "-m", "prep.preflight", "--experiment", "mine", "--when", "always"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture
def lock(workplace):
    Path("requirements").symlink_to(ROOT / "requirements")


def test_an_experiment_that_fits_is_a_go_before_and_after_its_rows_are_made(make_experiment, lock):
    write_csv("rows.csv", nasty_rows(140))
    rows, options = (
        {"train": 96, "validation": 10, "test": 20},
        {"sft_options": {"num_train_epochs": 1}},
    )
    experiment = make_experiment("rows.csv", LABELS, data={"rows": rows}, decoder_keys=options)
    before = preflight()
    assert before.returncode == 0 and before.stdout.rstrip().endswith("GO"), (
        before.stdout + before.stderr
    )
    assert "ok  steps:        not known before the rows are made" in before.stdout
    data.main(experiment)
    after = preflight()
    assert after.returncode == 0, after.stdout + after.stderr
    for told in (
        "ok  device:       CPU",
        f"ok  labels:       all {len(LABELS)} have training rows",
        "ok  steps:        SFT 24, saved at 5, 10, 15, 20, 24; BERT 9, evaluated every "
        "2; linear head 18",
        "SFT on the options 6, evaluated every 2",
        "sft-options 0.",
        "SFT on the options 0.",
        "loss on: '<'=44 'think'=17400",
        "(the longest row)",
        "ok  hours:        not measured: no device",
    ):
        assert told in after.stdout, (told, after.stdout)


def test_what_is_missing_is_a_no_with_its_mend_and_the_exit_code_says_so(make_experiment, lock):
    write_csv("rows.csv", nasty_rows(140))
    make_experiment(
        "rows.csv",
        [*LABELS, "Weather"],
        sft={"bf16": True},
        encoder_keys={"model": "hf:me/bert"},
        data={"rows": {"validation": 2}},
    )
    told = preflight(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert told.returncode == 1
    for line in (
        "no  device:       no GPU, and the YAML says bf16; take a machine with a GPU, "
        "or (slow) SET=",
        "no  models:       hf:me/bert: no hub answers at http://127.0.0.1:9",
        "no  labels:       none of the 140 training rows is of Weather; check data.labels",
        "no  memory:       the encoder's configuration can't be had; mend `models` first",
    ):
        assert line in told.stdout, (line, told.stdout)
    assert "NO-GO: device, models, labels," in told.stderr


def test_a_model_at_the_hub_is_looked_at_and_not_fetched(
    make_experiment, tiny_models, lock, monkeypatch
):
    files = {path.name: path.read_bytes() for path in tiny_models["bert"].iterdir()}
    monkeypatch.setattr(ModelHub, "files", files)
    write_csv("rows.csv", nasty_rows(140))
    make_experiment(
        "rows.csv", LABELS, encoder_keys={"model": "hf:me/bert", "head": {"max_length": 128}}
    )
    with running(ModelHub) as address:
        online = {
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": "hub",
        }
        told = preflight(**online)
        assert told.returncode == 0, told.stdout + told.stderr
        size = len(files["model.safetensors"])
        assert (
            f"hf:me/bert at the hub, {size / 1e9:.1f} GB" in told.stdout
            and "BERT 0." in told.stdout
        )
        assert not list(Path().rglob("hub/**/*.safetensors")) and not Path("model/bert").exists()
        del files["model.safetensors"]
        told = preflight(**online)
    assert (
        told.returncode == 1
        and "no  models:       hf:me/bert: holds no safetensors file" in told.stdout
    )


def test_a_model_whose_download_breaks_off_is_fetched_again(tiny_models, workplace, monkeypatch):
    folder, files = (
        Path("model/bert"),
        {path.name: path.read_bytes() for path in tiny_models["bert"].iterdir()},
    )
    monkeypatch.setattr(ModelHub, "files", files)
    monkeypatch.setattr(ModelHub, "dies", True)
    with running(ModelHub) as address:
        online = {
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": "hub",
        }
        code = "from pathlib import Path\nfrom letterhead.runs.stage import telling\n"
        code += "from letterhead.rows.fetch import fetch_model\n"
        code += f"with telling(): fetch_model('hf:me/bert', Path({str(folder)!r}))"

        def fetched() -> subprocess.CompletedProcess:
            environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"} | online
            return subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, env=environment
            )

        broken = fetched()
        assert broken.returncode == 1 and "error: hf:me/bert: cannot be fetched" in broken.stderr, (
            broken.stderr
        )
        assert "Traceback" not in broken.stderr and not folder.exists()
        monkeypatch.setattr(ModelHub, "dies", False)
        assert (whole := fetched()).returncode == 0, whole.stderr
        assert is_there("hf:me/bert", folder)
        for damaged in ("model.safetensors", "tokenizer.json", "config.json"):
            os.truncate(folder / damaged, 100)
            assert not is_there("hf:me/bert", folder)
            (folder / damaged).write_bytes(files[damaged])
        assert is_there("hf:me/bert", folder)
        os.truncate(folder / damaged, 100)
        assert (whole := fetched()).returncode == 0, whole.stderr
        assert {name: (folder / name).read_bytes() for name in files} == files


def test_a_batch_that_a_gpu_does_not_hold_is_a_no_with_the_step_that_fits(
    make_experiment, workplace
):
    write_csv("rows.csv", nasty_rows(20))
    Qwen3Config(vocab_size=151_936, **SMALL, architectures=["Qwen3ForCausalLM"]).save_pretrained(
        "big"
    )
    make_experiment("rows.csv", LABELS, decoder_folder=Path("big"), encoder_keys={"model": "big"})
    step = "per_device_train_batch_size=12 decoder.sft.overrides.gradient_accumulation_steps=8"
    experiment = load_experiment(
        "mine", f"decoder.sft.overrides.{step} decoder.sft.overrides.cutoff_len=8192"
    )
    with pytest.raises(
        prep.preflight.No,
        match=r"SFT: SET=\"decoder.sft.overrides.per_device_train_batch_size=(\d+)",
    ) as told:
        prep.preflight.memory(prep.preflight.Plan(experiment, workplace))
    fits = int(str(told.value).rsplit("SFT: SET=", 1)[1].split("batch_size=")[1].split()[0])
    assert f"decoder.sft.overrides.gradient_accumulation_steps={96 // fits}" in str(told.value)
    _, _, projected = prep.preflight.Plan(experiment, workplace).longest("sft")
    said = needs.training_memory(Path("big"), fits, 8192, True, None, False, None, projected)
    whole = said.total + needs.CUDA_OVERHEAD
    assert fits in (1, 2, 3, 4, 6) and whole <= 24 << 30


@pytest.mark.parametrize(
    ("free", "left_open", "expected"),
    [
        (24 << 30, True, {needs.CHECKPOINTING: True}),
        (1 << 30, True, {needs.CHECKPOINTING: False}),
        (24 << 30, False, {}),
    ],
)
def test_layers_are_computed_twice_only_where_a_gpu_has_no_room_to_keep_them(
    make_experiment, monkeypatch, free, left_open, expected
):
    write_csv("rows.csv", nasty_rows(140))
    rows = {"rows": {"train": 96, "validation": 10, "test": 20}}
    keys = {"bf16": True, needs.CHECKPOINTING: None if left_open else False}
    experiment = make_experiment("rows.csv", LABELS, data=rows, sft=keys)
    data.main(experiment)
    assert needs.for_memory(experiment) == {}  # no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(needs, "free_gpu_memory", lambda _: free)
    assert needs.for_memory(experiment) == expected
    if free >> 30 > 1:  # preflight decides alike
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        said = prep.preflight.memory(prep.preflight.Plan(experiment, Path()))
        assert ("no gradient checkpointing, since there is room" in said) == left_open


def test_a_gpus_hours_come_from_the_trial_of_sft(make_experiment, monkeypatch):
    write_csv("rows.csv", nasty_rows(140))
    rows = {"rows": {"train": 96, "validation": 10, "test": 20}}
    experiment = make_experiment("rows.csv", LABELS, data=rows)
    data.main(experiment)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = pipeline.read_card(experiment)
    assert stage_seconds(experiment, card) == {}
    monkeypatch.setattr("letterhead.plan.time.device_name", lambda: "some GPU")
    write_json("runs/mine/trial.json", trial_of(experiment) | {"seconds_a_step": 100.0})
    steps, _ = llamafactory.sft_plan(experiment, card["shared"]["sft_rows"])
    found = stage_seconds(experiment, card)
    assert found["sft"] == pytest.approx(2 * START_S + 100 * steps)
    assert found["linear-head"] > START_S
    other = load_experiment("mine", "decoder.sft.overrides.learning_rate=1e-5")
    assert stage_seconds(other, card) == {}
    for elsewhere in ({"device": "another GPU"}, {"processes": 2}):
        kept = trial_of(experiment) | {"seconds_a_step": 100.0} | elsewhere
        write_json("runs/mine/trial.json", kept)
        assert stage_seconds(experiment, card) == {}


@pytest.mark.parametrize(("tokens", "go"), [(64, True), (2048, False)])
def test_hours_of_thinking_by_hf_on_a_gpu_are_a_no_go(make_experiment, monkeypatch, tokens, go):
    monkeypatch.setattr(prep.preflight, "_gpu", lambda: True)
    monkeypatch.setattr(service, "ENVIRONMENT", Path("nowhere"))
    write_csv("rows.csv", nasty_rows(20))
    thinking = {"thinking": {"tokens": tokens, "batch": 64, "rows": None}}
    rows = {"rows": {"test": 7600}}
    experiment = make_experiment("rows.csv", LABELS, data=rows, eval=thinking)
    plan = prep.preflight.Plan(experiment, Path())
    if go:
        assert "HF's generate, about 8 minutes" in prep.preflight.serving(plan)
        return
    with pytest.raises(prep.preflight.No, match=r"about 4.1 hours; .* make setup-serve"):
        prep.preflight.serving(plan)


def test_the_trial_times_twenty_steps_and_leaves_nothing_behind(
    make_experiment, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write_csv("rows.csv", nasty_rows(140))
    experiment = make_experiment(
        "rows.csv", LABELS, data={"rows": {"train": 96, "validation": 10, "test": 20}}
    )
    data.main(experiment)
    assert 0 < prep.preflight.trial(experiment, tmp_path / "trial") < 30
    assert not Path("runs/mine/sft").exists()


def test_the_trial_is_kept_for_its_inputs_and_left_out_where_sft_is_done(
    make_experiment, tmp_path, monkeypatch
):
    tried = []
    monkeypatch.setattr(prep.preflight, "_gpu", lambda: True)
    monkeypatch.setattr(prep.preflight, "trial", lambda *_: tried.append(1) or 0.5)
    write_csv("rows.csv", nasty_rows(140))
    rows = {"rows": {"train": 96, "validation": 10, "test": 20}}
    experiment = make_experiment("rows.csv", LABELS, data=rows)
    data.main(experiment)
    for _ in range(2):
        plan = prep.preflight.Plan(experiment, tmp_path)
        assert prep.preflight.hours(plan).startswith("SFT 0.50 s a step: 0.00 h for 24 steps")
    other = load_experiment("mine", "decoder.sft.overrides.learning_rate=1e-5")
    prep.preflight.hours(prep.preflight.Plan(other, tmp_path))
    assert len(tried) == 2
    done = {"inputs_sha256": pipeline.inputs_sha256(pipeline.SFT_TRAINING, other)}
    write_json("runs/mine/sft/stage.json", done | {"training_seconds": 600, "outputs": {}})
    assert "SFT is done: it took about 10 minutes" in prep.preflight.hours(
        prep.preflight.Plan(other, tmp_path)
    )
    assert len(tried) == 2


def test_on_a_machine_without_a_gpu_a_run_is_not_held_up(make_experiment, capsys):
    prep.preflight.main(make_experiment("rows.csv", LABELS), "gpu")
    assert capsys.readouterr().out == ""
