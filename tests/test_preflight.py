"""Before a run: the estimate of memory against measured peaks, disk, and what the preflight says of a machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from letterhead import needs
from tests.conftest import ROOT

# What is trained: architecture and shape, how, and the rows of a batch and their tokens.
SMALL = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_hidden_layers": 8}
SHAPES = {
    "llama, SFT": ("llama", {**SMALL, "num_key_value_heads": 3}, {"kind": "sft", "batch": 8, "length": 200}),
    "qwen3, SFT, checkpointing": (
        "qwen3",
        {**SMALL, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 12},
        {"kind": "sft", "batch": 4, "length": 300, "checkpointing": True},
    ),
    "bert, head": ("bert", {**SMALL, "num_hidden_layers": 12}, {"kind": "head", "batch": 24, "length": 128}),
    "qwen3, head": (
        "qwen3",
        {**SMALL, "num_key_value_heads": 2, "head_dim": 64},
        {"kind": "head", "batch": 8, "length": 256},
    ),
}
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "bert": (BertConfig, BertModel),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_estimate_of_memory_is_within_a_fifth_of_the_measured_peak(fetched, workplace, qwen3_tokenizer, name):
    kind, shape, how = SHAPES[name]
    tokenizers = {"qwen3": lambda: qwen3_tokenizer, "llama": lambda: AutoTokenizer.from_pretrained(fetched["smollm2"])}
    tokenizer = tokenizers.get(kind, lambda: AutoTokenizer.from_pretrained(fetched["minilm"]))()
    config, model = CLASSES[kind]
    more = {} if kind == "bert" else {"tie_word_embeddings": True}
    model(config(vocab_size=len(tokenizer), **shape, **more)).save_pretrained("model")
    tokenizer.save_pretrained("model")
    how = {"half": False, "checkpointing": False, "model": "model", "words": how["length"]} | how
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # what is freed goes back at once
    command = [sys.executable, "-m", "tests.peak", json.dumps(how)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr[-3000:]
    measured = next(json.loads(line)["peak"] for line in finished.stdout.splitlines() if line.startswith('{"peak"'))
    classes = None if how["kind"] == "sft" else 2
    said = needs.training_memory(Path("model"), how["batch"], how["length"], how["half"], classes, how["checkpointing"])
    print(f"\n{name}: measured {measured / needs.GIB:.2f} GiB, estimated {said}, ratio {said.total / measured:.2f}")
    assert said.total == pytest.approx(measured, rel=0.2)


def test_the_estimate_in_bfloat16_is_within_a_fifth_of_what_torch_tracks(workplace):
    # A CPU without bfloat16 takes minutes and scratch memory for it, so torch's own tracker counts tensors without storage.
    shape = {**SMALL, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 3}
    config = Qwen3Config(vocab_size=60_000, tie_word_embeddings=True, **shape, architectures=["Qwen3ForCausalLM"])
    config.save_pretrained("model")
    with FakeTensorMode():
        model = Qwen3ForCausalLM(config).train()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        optimizer, tracker = torch.optim.AdamW(model.parameters(), fused=True), MemTracker()
        tracker.track_external(model, optimizer)
        ids = torch.ones(8, 120, dtype=torch.long)
        with tracker:
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(input_ids=ids, attention_mask=ids, labels=ids, use_cache=False).loss
                loss.backward()
                optimizer.step(), optimizer.zero_grad(set_to_none=False)  # a gradient stays, as between accumulated batches
                tracker.reset_mod_stats()
        tracked = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    said = needs.training_memory(Path("model"), 8, 120, True, None, True)
    print(
        f"\nqwen3, bfloat16, checkpointing: tracked {tracked / needs.GIB:.2f} GiB, {said}, ratio {said.total / tracked:.2f}"
    )
    assert said.total == pytest.approx(tracked, rel=0.2)


def test_parameters_are_those_of_the_model_tied_ones_once(tiny_models):
    for name in ("smollm2", "qwen3"):
        model = CLASSES["llama" if name == "smollm2" else name][1].from_pretrained(tiny_models[name])
        assert needs.parameter_count(tiny_models[name]) == sum(p.numel() for p in model.parameters())
    assert torch.get_default_dtype() == torch.float32
