"""The training of a linear head itself; every evaluation leaves a result. Started by baselines/train.py, also by torchrun.

python -m train.heads_worker bert --experiment quick --inputs SHA256 --resume runs/quick/bert/checkpoints/checkpoint-9
"""

import os
import time
from pathlib import Path

from letterhead.runs.processes import begin_worker

if __name__ == "__main__":
    begin_worker()

import torch

from letterhead.config.experiment import Experiment
from letterhead.files import read_json
from letterhead.models import checkpoints, heads
from letterhead.models.folding import load_folded
from letterhead.models.precision import precision
from letterhead.models.prompt import OptionEncoder, TextEncoder, load_prompt_encoder
from letterhead.runs import results
from letterhead.runs.devices import process_count, share_batch
from letterhead.runs.stage import OFFLINE, run
from train.heads import METHODS, checkpoint_folder


def main(experiment: Experiment, method: str, inputs_sha256: str, resume: str) -> None:
    os.environ.update(OFFLINE)
    fit(experiment, method, inputs_sha256, Path(resume) if resume != "none" else None)


def fit(experiment: Experiment, method: str, inputs_sha256: str, resume: Path | None) -> None:
    """Train to the last step, from the checkpoint `resume` if there is one; of several processes the first writes."""
    from transformers import set_seed

    trained, folder = METHODS[method], checkpoint_folder(experiment, method)
    source, head, key = trained.model(experiment).folder, trained.head(experiment), f"{trained.section}.{trained.key}"
    needed = checkpoints.head_disk(checkpoints.stored_parameters(source))
    checkpoints.require_disk(folder, needed, f"the training of {method}")
    rows = results.read_rows(experiment, trained.rows)
    splits = {split: results.read_rows(experiment, split) for split in results.SPLITS}
    splits = {split: of for split, of in splits.items() if of}
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.with_name("tensorboard"))
    batch, accumulation = share_batch(
        head.per_device_train_batch_size, head.gradient_accumulation_steps, process_count(), key
    )
    shared = head.on(len(rows)).model_copy(
        update={"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    )
    best = "validation_log_loss" if "validation" in splits else None
    dtype = precision(experiment.decoder.dtype, source)
    arguments = heads.training_arguments(shared, folder, experiment.seed, best, dtype)
    set_seed(experiment.seed)
    # A resuming Trainer ignores weights that are saved under BERT's old names (LayerNorm.gamma), so they are loaded here.
    if method == "sft_options":
        encoder = OptionEncoder(load_prompt_encoder(experiment))
        model = heads.load_head(resume, experiment.labels) if resume else load_folded(experiment, encoder.prompt)
    else:
        heads.require_length(source, head.max_length, key)
        encoder = TextEncoder(heads.load_tokenizer(source), head.max_length)
        model = heads.load_head(resume or source, experiment.labels, new_head=not resume)
    tokenizer = heads.load_tokenizer(source)
    sets = {
        name: heads.encoded(of, results.class_numbers(experiment, of), encoder, f"encoding {name}")
        for name, of in {"train": rows, **splits}.items()
    }
    multiplied = checkpoints.parameters_per_token(model)
    begin, evaluating, before = time.perf_counter(), 0.0, 0.0
    if resume:
        before = results.read_result(experiment, f"{method}@{checkpoints.step_of(resume)}", "test")["training_seconds"]

    def write(split: str, logits, seconds: float, tokens: int) -> dict[str, float]:
        nonlocal evaluating
        evaluating += seconds
        step = trainer.state.global_step
        trained = before + time.perf_counter() - begin - evaluating - trainer.saving_seconds
        result = results.write_result(
            experiment,
            f"{method}@{step}",
            split,
            splits[split],
            probabilities=torch.from_numpy(logits).double().softmax(-1).numpy(),
            train_loss=mean_loss(trainer.state.log_history, step),
            training_seconds=round(trained, 1),
            seconds=round(seconds, 3),
            tokens=tokens,
            parameters=multiplied,
            dtype=dtype,
            model=str(folder / f"checkpoint-{step}"),
            inputs_sha256=inputs_sha256,
        )
        return {key: result[key] for key in ("accuracy", "f1_macro", "log_loss", "ece")}

    trainer = heads.HeadTrainer(model, arguments, tokenizer, sets.pop("train"), sets, write)
    state = read_json(resume / "trainer_state.json") if resume else None
    if not state or state["global_step"] < state["max_steps"]:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)


def mean_loss(log: list[dict], step: int) -> float:
    """The training loss between the evaluation before `step` and `step`, from the Trainer's log, weighted by steps."""
    start = max((line["step"] for line in log if "eval_test_f1_macro" in line and line["step"] < step), default=0)
    total, last = 0.0, start
    for line in log:
        if "loss" in line and start < line["step"] <= step:
            total += line["loss"] * (line["step"] - last)
            last = line["step"]
    return total / (step - start)


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0], list(METHODS), {"inputs": "the stage's hash", "resume": "a checkpoint, or none"})
