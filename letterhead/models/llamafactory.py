"""How LLaMA-Factory is started: its arguments, in one process or, by torchrun, in several; and what
a run of it will do.

What its YAML leaves open is filled in for the device; the YAML alone, without us, trains the same
in float32.
"""

import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

from letterhead.config.experiment import Experiment
from letterhead.models.precision import precision
from letterhead.runs.devices import process_count, share_batch
from letterhead.runs.processes import torchrun
from letterhead.runs.stage import OFFLINE

# The keys that make an optimizer step, with HF's defaults.
STEP = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


def command(experiment: Experiment, clock: Path, **more: Any) -> list[str]:
    """The command line that trains the experiment's decoder; NPROC processes share the rows of a
    step.

    Parameters
    ----------
    clock : the file that takes the seconds trained (sft/worker.py)
    more : LLaMA-Factory's keys that override the YAML's and the experiment's

    Raises
    ------
    LetterheadError : NPROC does not divide the rows of a step
    """
    extra = for_device(experiment) | experiment.decoder.sft.overrides | experiment.sft_decided()
    extra |= {"include_num_input_tokens_seen": "non_padding"} | more
    n = process_count()
    if n > 1:
        extra |= dict(
            zip(
                STEP,
                share_batch(*step_of(experiment.sft_arguments()), n, "decoder.sft"),
                strict=True,
            )
        )
    # Quoted: LLaMA-Factory reads the values as YAML, where a bare `no` is false.
    pairs = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in extra.items()]
    patience = str(experiment.decoder.sft.patience or 0)
    arguments = [str(clock), patience, str(experiment.decoder.sft.config), *pairs]
    return (
        torchrun(n, "train.sft_worker", arguments)
        if n > 1
        else [sys.executable, "-m", "train.sft_worker", *arguments]
    )


def for_device(experiment: Experiment) -> dict[str, Any]:
    """LLaMA-Factory's keys that suit this device, of those that the YAML leaves open: the precision
    (`decoder.dtype`, see `precision`), and on a CPU attention by plain matrix products."""
    arguments, keys = experiment.sft_arguments(), {}
    if not {"bf16", "fp16", "pure_bf16"} & set(arguments):
        keys["bf16"] = precision(experiment.decoder.dtype, experiment.decoder.folder) == "bfloat16"
    if not torch.cuda.is_available():
        keys |= {"use_cpu": True, "flash_attn": "disabled"}
    return {key: value for key, value in keys.items() if key not in arguments}


def unquantisable(experiment: Experiment) -> str | None:
    """Why SFT can't have a quantised base here, with the mend; None where it can, or asks for
    none."""
    if not experiment.decoder.sft.quantised:
        return None
    config = experiment.decoder.sft.config
    if not torch.cuda.is_available():
        return (
            f"{config}: quantization_bit needs a GPU, and none is here; run it on one, or add "
            'SET="decoder.sft.overrides.quantization_bit=null"'
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        return (
            f"{config}: quantization_bit needs bitsandbytes; run: .venv/bin/pip install --no-deps "
            "--require-hashes -r requirements/gpu.txt"
        )
    return None


def environment() -> dict[str, str]:
    """The variables that LLaMA-Factory is started with."""
    variables = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ | OFFLINE
    if torch.cuda.is_available():
        variables.pop("GLIBC_TUNABLES", None)  # huge pages are for a training's own memory
    return variables | {"LLAMAFACTORY_VERBOSITY": "WARN"}


def step_of(arguments: dict[str, Any]) -> tuple[int, int]:
    """Batch and gradient accumulation."""
    return tuple(arguments.get(key, default) for key, default in STEP.items())


def planned_steps(
    rows: int, batch: int, accumulation: int, epochs: float, every: float, max_steps: int = -1
) -> tuple[int, list[int]]:
    """How many optimizer steps HF's Trainer makes, and at which of them it saves (or evaluates)
    every `every` steps, or at that share of all if it is below 1; the last step is among them."""
    batches = math.ceil(rows / batch)
    steps = (
        max_steps
        if max_steps > 0
        else math.ceil(epochs * max(math.ceil(batches / accumulation), 1))
    )
    stride = math.ceil(steps * every) if every < 1 else int(every)
    return steps, sorted({*range(stride, steps, stride), steps})


def sft_plan(experiment: Experiment, rows: int) -> tuple[int, list[int]]:
    """SFT's optimizer steps, and those at which it saves."""
    arguments = experiment.sft_arguments()
    epochs, max_steps = arguments.get("num_train_epochs", 3), arguments.get("max_steps", -1)
    steps, saves = planned_steps(
        rows, *step_of(arguments), epochs, arguments.get("save_steps", 500), max_steps
    )
    strategy = arguments.get("save_strategy", "steps")
    if strategy == "epoch":
        saves = [math.ceil(steps * epoch / epochs) for epoch in range(1, math.ceil(epochs) + 1)]
    return steps, saves if strategy in ("steps", "epoch") else []
