"""The training of a linear head itself; every evaluation leaves a result. Started by
train/heads.py, also by torchrun.

python -m train.heads_worker bert --experiment quick --inputs SHA256 --resume
runs/quick/bert/checkpoints/checkpoint-9
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from letterhead.runs.processes import begin_worker

if __name__ == "__main__":
    begin_worker()

import numpy as np
from scipy.special import softmax

from letterhead.config.experiment import Experiment
from letterhead.config.models import Head
from letterhead.files import read_json, write_json
from letterhead.models import checkpoints, heads
from letterhead.models.adapters import adapter_parameters, with_adapter
from letterhead.models.callbacks import has_ended
from letterhead.models.folding import load_folded
from letterhead.models.precision import precision
from letterhead.models.prompt import OptionEncoder, TextEncoder, load_prompt_encoder
from letterhead.pipeline import METHODS, Method
from letterhead.rows.balance import class_weights, training_rows
from letterhead.runs import results
from letterhead.runs.devices import process_count, share_batch
from letterhead.runs.stage import run
from letterhead.stats.metrics import choosing_losses

CLOCK = "clock.json"  # step → seconds trained
CHOOSING = "choosing_loss"  # the Trainer's metric, on validation rows, that says which step is best


def main(experiment: Experiment, method: str, inputs_sha256: str, resume: str, rate: str) -> None:
    fit(experiment, method, inputs_sha256, Path(resume) if resume != "none" else None, float(rate))


def fit(
    experiment: Experiment, method: str, inputs_sha256: str, resume: Path | None, rate: float
) -> None:
    """Train to the last step, from the checkpoint `resume` if there is one; of several processes
    the first writes.

    Parameters
    ----------
    rate : the learning rate
    """
    trained = METHODS[method]
    folder = trained.checkpoints(experiment)
    clock_file = folder.with_name(CLOCK)
    head = trained.head(experiment).model_copy(update={"learning_rate": rate})
    source = trained.section(experiment).folder
    written = checkpoints.stored_parameters(source)
    if head.lora:
        written = adapter_parameters(source, head.lora)
    needed = checkpoints.head_disk(written)
    checkpoints.require_disk(folder, needed, f"the training of {method}")
    splits = {split: results.read_rows(experiment, split) for split in results.SPLITS}
    splits = {split: rows_of_split for split, rows_of_split in splits.items() if rows_of_split}
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.with_name("tensorboard"))
    begin, evaluating = time.perf_counter(), 0.0
    clock = read_clock(clock_file) if resume else {}
    before = clock.get(str(checkpoints.step_of(resume)), 0.0) if resume else 0.0

    def write(split: str, logits, seconds: float, tokens: int) -> dict[str, float]:
        nonlocal evaluating
        evaluating += seconds
        step = trainer.state.global_step
        clock[str(step)] = round(
            before + time.perf_counter() - begin - evaluating - trainer.saving_seconds, 1
        )
        write_json(clock_file, {"training_seconds": clock})
        probabilities = softmax(logits.astype(np.float64), axis=-1)
        result = results.write_result(
            experiment,
            f"{method}@{step}",
            split,
            splits[split],
            probabilities=probabilities,
            train_loss=mean_loss(trainer.state.log_history, step),
            training_seconds=clock[str(step)],
            seconds=round(seconds, 3),
            tokens=tokens,
            parameters=multiplied,
            dtype="bfloat16" if trainer.args.bf16 else "float32",
            model=str(folder / f"checkpoint-{step}"),
            inputs_sha256=inputs_sha256,
        )
        truth = results.class_numbers(experiment, splits[split])
        figures = {key: getattr(result, key) for key in ("accuracy", "f1_macro", "log_loss", "ece")}
        losses = choosing_losses(truth, probabilities, experiment.balance)
        return figures | {CHOOSING: float(losses.mean())}

    trainer = new_trainer(experiment, trained, head, splits, write, folder, resume)
    multiplied = checkpoints.parameters_per_token(trainer.model)
    begin = time.perf_counter()
    state = read_json(resume / "trainer_state.json") if resume else None
    if not state or not has_ended(state, head.patience):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)


def new_trainer(
    experiment: Experiment,
    method: Method,
    head: Head,
    splits: dict[str, list[dict]],
    on_evaluated: Callable[..., dict[str, float]],
    folder: Path,
    resume: Path | None = None,
    keep: bool = True,
) -> heads.HeadTrainer:
    """A trainer that is ready to train a method.

    Parameters
    ----------
    head : how
    splits : the rows that it is evaluated on
    on_evaluated : as for HeadTrainer
    folder : takes the checkpoints, unless `keep` is false
    resume : a checkpoint to begin from
    """
    from transformers import set_seed

    source, key = method.section(experiment).folder, f"{method.model}.{method.settings}"
    own = results.read_rows(experiment, method.rows)
    rows = training_rows(experiment, own)
    batch, accumulation = share_batch(
        head.per_device_train_batch_size, head.gradient_accumulation_steps, process_count(), key
    )
    best = f"validation_{CHOOSING}" if "validation" in splits else None
    dtype = precision(experiment.decoder.dtype, source)
    # A resuming Trainer ignores weights that are saved under BERT's old names (LayerNorm.gamma), so
    # they are loaded here.
    tokenizer = heads.load_tokenizer(source)
    encoder = row_encoder(experiment, method, tokenizer)
    sets = {
        name: heads.encoded(
            rows_of_split,
            results.class_numbers(experiment, rows_of_split),
            encoder,
            f"encoding {name}",
            in_parts=name == "train",
        )
        for name, rows_of_split in {"train": rows, **splits}.items()
    }
    of_parts = sets["train"]["labels"]
    shared = head.on(len(sets["train"])).model_copy(
        update={"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    )
    arguments = heads.training_arguments(shared, folder, experiment.seed, best, dtype, keep)
    set_seed(experiment.seed)
    # An adapter is read by the Trainer itself; its base is loaded here.
    whole = None if head.lora else resume
    if not method.reads_prompt:
        heads.require_length(source, head.max_length, key)
    if method.reads_prompt and not whole:
        model = load_folded(experiment, encoder.prompt)
    else:
        model = heads.load_head(whole or source, experiment.labels, new_head=not whole)
    if head.lora:
        model = with_adapter(model, head.lora, source)
    return heads.HeadTrainer(
        model,
        arguments,
        tokenizer,
        sets.pop("train"),
        sets,
        on_evaluated,
        class_weights(experiment, [experiment.labels[number] for number in of_parts]),
        head.patience if best else None,
        experiment.eval.batch_tokens,
        encoder.parts,
    )


def trial_loss(experiment: Experiment, method: str, rate: float, trial) -> float:
    """Train at a rate without leaving anything; the lowest loss on validation rows.

    Parameters
    ----------
    trial : Optuna's, which is told the loss of each evaluation

    Raises
    ------
    optuna.TrialPruned : the trial is given up
    LetterheadError : it diverged
    """
    import optuna

    trained, validation = METHODS[method], results.read_rows(experiment, "validation")
    head = trained.head(experiment).model_copy(update={"learning_rate": rate})
    truth, losses = results.class_numbers(experiment, validation), []

    def report(split: str, logits: np.ndarray, seconds: float, tokens: int) -> dict[str, float]:
        probabilities = softmax(logits.astype(np.float64), axis=-1)
        losses.append(float(choosing_losses(truth, probabilities, experiment.balance).mean()))
        trial.report(losses[-1], trainer.state.global_step)
        if trial.should_prune():
            raise optuna.TrialPruned
        return {CHOOSING: losses[-1]}

    splits, nowhere = {"validation": validation}, trained.checkpoints(experiment)
    trainer = new_trainer(experiment, trained, head, splits, report, nowhere, keep=False)
    trainer.train()
    return min(losses)


def score_checkpoint(
    experiment: Experiment, method: str, checkpoint: Path, split: str, inputs_sha256: str
) -> None:
    """Score a checkpoint on a split and write the result that its evaluation in training left."""
    trained = METHODS[method]
    rows, step = results.read_rows(experiment, split), checkpoints.step_of(checkpoint)
    log = read_json(checkpoint / "trainer_state.json")["log_history"]
    clock = read_clock(trained.checkpoints(experiment).with_name(CLOCK))
    source = trained.section(experiment).folder
    dtype = precision(experiment.decoder.dtype, source)
    model, tokenizer = heads.load_head(checkpoint, experiment.labels), heads.load_tokenizer(source)
    multiplied = checkpoints.parameters_per_token(model)
    model = heads.for_inference(model, dtype)
    encoder = row_encoder(experiment, trained, tokenizer)
    ids = encoder.encode([row["text"] for row in rows])
    start = time.perf_counter()
    budget = experiment.eval.batch_tokens
    lengths = heads.read_lengths(ids, encoder.parts)
    logits = heads.class_logits(model, tokenizer, ids, budget, f"scoring {split}", encoder.parts)
    results.write_result(
        experiment,
        f"{method}@{step}",
        split,
        rows,
        probabilities=softmax(logits.astype(np.float64), axis=-1),
        train_loss=mean_loss(log, step),
        training_seconds=clock.get(str(step), 0.0),
        seconds=round(time.perf_counter() - start, 3),
        tokens=heads.padded_tokens(lengths, heads.batches_of(lengths, budget)),
        parameters=multiplied,
        dtype=dtype,
        model=str(checkpoint),
        inputs_sha256=inputs_sha256,
    )


def row_encoder(experiment: Experiment, method: Method, tokenizer) -> TextEncoder | OptionEncoder:
    """What turns texts into the ids that a method reads."""
    if method.reads_prompt:
        return OptionEncoder(load_prompt_encoder(experiment))
    head = method.head(experiment)
    return TextEncoder(tokenizer, head.max_length, head.long_texts)


def read_clock(file: Path) -> dict[str, float]:
    """Step → seconds trained up to it."""
    return (read_json(file) or {"training_seconds": {}})["training_seconds"]


def mean_loss(log: list[dict], step: int) -> float:
    """The training loss between the evaluation before `step` and `step`, from the Trainer's log,
    weighted by steps."""
    start = max(
        (line["step"] for line in log if "eval_test_f1_macro" in line and line["step"] < step),
        default=0,
    )
    total, last = 0.0, start
    for line in log:
        if "loss" in line and start < line["step"] <= step:
            total += line["loss"] * (line["step"] - last)
            last = line["step"]
    return total / (step - start)


if __name__ == "__main__":
    run(
        main,
        __doc__.splitlines()[0],
        [method.name for method in METHODS.values() if method.settings],
        {
            "inputs": "the stage's hash",
            "resume": "a checkpoint, or none",
            "rate": "the learning rate",
        },
    )
