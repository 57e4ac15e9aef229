"""The peak memory of a real training, in a process of its own: `python -m tests.peak '{"kind":
"sft", …}'` prints bytes.

Resident memory at its highest after training began, less what was there then without the model's
weights.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback


def resident(what: str) -> int:
    return int(re.search(rf"{what}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) << 10


class Peak(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        self.before = resident("VmRSS") - sum(
            p.numel() * p.element_size() for p in model.parameters()
        )

    def on_train_end(self, args, state, control, **kwargs):
        print(json.dumps({"peak": resident("VmHWM") - self.before}))


def sft(given: dict) -> None:
    """Two optimizer steps of two batches each by LLaMA-Factory, on rows of one length."""
    from llamafactory.train.tuner import run_exp

    from train.sft_worker import LessWork

    row = {
        "instruction": "word " * given["words"],
        "input": "",
        "output": "<think>\n\n</think>\n\nA",
    }
    Path("rows.json").write_text(json.dumps([row] * 4 * given["batch"]))
    Path("dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    arguments = {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora" if "lora" in given else "full",
        "dataset_dir": ".",
        "dataset": "rows",
    }
    arguments |= {
        "template": "qwen3",
        "cutoff_len": given["length"],
        "use_cpu": True,
        "bf16": given["half"],
    }
    arguments |= {
        "model_name_or_path": given["model"],
        "disable_gradient_checkpointing": not given["checkpointing"],
    }
    arguments |= {"output_dir": "made", "save_strategy": "no", "report_to": "none", "max_steps": 2}
    arguments |= {"per_device_train_batch_size": given["batch"], "gradient_accumulation_steps": 2}
    arguments |= {f"lora_{key}": value for key, value in given.get("lora", {}).items()}
    run_exp(arguments, callbacks=[Peak(), LessWork()])


def head(given: dict) -> None:
    """Two optimizer steps of two batches each of a head, on rows of one length."""
    from letterhead.config.models import Head, Lora
    from letterhead.models import heads
    from letterhead.models.adapters import with_adapter

    n = 4 * given["batch"]
    ids = np.random.default_rng(0).integers(1000, 3000, size=(n, given["length"])).tolist()
    rows = Dataset.from_dict(
        {"input_ids": ids, "labels": [0, 1] * (n // 2), "length": [given["length"]] * n}
    )
    settings = Head(
        per_device_train_batch_size=given["batch"],
        gradient_accumulation_steps=2,
        num_train_epochs=1,
    )
    arguments = heads.training_arguments(
        settings, "made", 0, None, "bfloat16" if given["half"] else "float32"
    )
    arguments.eval_strategy = arguments.save_strategy = "no"
    arguments.report_to = []
    heads.attention = lambda: "sdpa"  # as on a GPU, for which the estimate is
    model = heads.load_head(Path(given["model"]), ["no", "yes"])
    if "lora" in given:
        model = with_adapter(model, Lora(**given["lora"]), Path(given["model"]))
    trainer = heads.HeadTrainer(model, arguments, heads.load_tokenizer(Path(given["model"])), rows)
    trainer.add_callback(Peak())
    trainer.train()


if __name__ == "__main__":
    torch.manual_seed(0)
    asked = json.loads(sys.argv[1])
    {"sft": sft, "head": head}[asked["kind"]](asked)
