"""Train BERT, or a linear head on the decoder, on the raw text with HF's Trainer; every evaluation leaves a result.

python -m baselines.train bert --experiment quick
"""

import os
import shutil
import time
from pathlib import Path

from letterhead import checkpoints, results
from letterhead.experiment import Experiment
from letterhead.records import LetterheadError, atomic_open, read_json
from letterhead.stage import OFFLINE, Stage, run, stage_outputs

TITLES = {"bert": "BERT with a linear head", "linear_head": "linear head on the decoder"}


def main(experiment: Experiment, method: str) -> None:
    os.environ.update(OFFLINE)
    section, rows_name = {"bert": ("encoder", "train"), "linear_head": ("decoder", "decoder_train")}[method]
    settings = getattr(experiment, section)
    data = stage_outputs(experiment, "data")
    files = [experiment.data_folder / f"{name}.jsonl" for name in (rows_name, *results.SPLITS)]
    inputs = {
        "head": settings.head.model_dump(),
        "labels": experiment.labels,
        "seed": experiment.seed,
        "rows": [data[str(file)] for file in files],
        "model": checkpoints.model_identity(settings.folder),
    }
    stage = Stage(experiment, method.replace("_", "-"), inputs)
    table = experiment.results_folder / f"{method}_checkpoints.md"
    if not stage.is_current():
        folder = stage.folder / "checkpoints"
        stage.begin(folder)
        for path in checkpoints.set_aside_broken(folder):
            print(f"{path}: was cut off while it was written; set aside, not used")
        resume = checkpoints.resumable(folder)
        if resume and (lost := lost_results(experiment, method, resume, stage.inputs_sha256)):
            print(f"results of steps {lost} are gone, and only training makes them; it begins anew")
            shutil.rmtree(folder)
            resume = None
        splits = {split: results.read_rows(experiment, split) for split in results.SPLITS}
        splits = {split: rows for split, rows in splits.items() if rows}
        rows = results.read_rows(experiment, rows_name)
        train(experiment, method, section, rows, splits, folder, resume, stage.inputs_sha256)
        checkpoints.keep_best_and_last(folder)
        kept, made = collect(experiment, method, stage.inputs_sha256)
        with atomic_open(table) as file:
            file.write(results.checkpoint_table(experiment, TITLES[method], kept, []))
        weights = [file for path in checkpoints.whole_checkpoints(folder) for file in path.glob("*.safetensors")]
        stage.finish(
            [*made, table, *weights],
            rows=len(rows),
            epochs=settings.head.num_train_epochs,
            tokens=None,
            training_seconds=max(result["training_seconds"] for result in kept.values()),
            scoring_seconds=round(sum(result["seconds"] for result in kept.values()), 1),
            resumed_from=checkpoints.step_of(resume) if resume else 0,
        )
    print(table.read_text(encoding="utf-8"))


def train(experiment: Experiment, method: str, section: str, rows, splits, folder: Path, resume, inputs_sha256: str) -> None:
    """Train to the last step, from `resume` if there is such a checkpoint."""
    import torch
    from transformers import set_seed

    from letterhead import heads
    from letterhead.prompt import TextEncoder

    settings = getattr(experiment, section)
    head = settings.head
    heads.require_length(settings.folder, head.max_length, f"{section}.head")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.with_name("tensorboard"))
    arguments = heads.training_arguments(
        head, folder, experiment.seed, "validation_f1_macro" if "validation" in splits else None
    )
    set_seed(experiment.seed)
    # A resuming Trainer ignores weights that are saved under BERT's old names (LayerNorm.gamma), so they are loaded here.
    model = heads.load_head(resume or settings.folder, experiment.labels)
    tokenizer = heads.load_tokenizer(settings.folder)
    encoder = TextEncoder(tokenizer, head.max_length)
    sets = {
        name: heads.encoded(of, results.class_numbers(experiment, of), encoder, f"encoding {name}")
        for name, of in {"train": rows, **splits}.items()
    }
    parameters = checkpoints.parameters_per_token(model)
    begin, evaluating, before = time.perf_counter(), 0.0, 0.0
    if resume:
        before = results.read_result(experiment, f"{method}@{checkpoints.step_of(resume)}", "test")["training_seconds"]

    def write(split: str, logits, seconds: float, tokens: int) -> dict[str, float]:
        nonlocal evaluating
        evaluating += seconds
        step = trainer.state.global_step
        result = results.write_result(
            experiment,
            f"{method}@{step}",
            split,
            splits[split],
            probabilities=torch.from_numpy(logits).double().softmax(-1).numpy(),
            train_loss=mean_loss(trainer.state.log_history, step),
            training_seconds=round(before + time.perf_counter() - begin - evaluating, 1),
            seconds=round(seconds, 3),
            tokens=tokens,
            parameters=parameters,
            dtype="bfloat16 by autocast" if arguments.bf16 else "float32",
            model=str(folder / f"checkpoint-{step}"),
            inputs_sha256=inputs_sha256,
        )
        return {key: result[key] for key in ("accuracy", "f1_macro", "ece")}

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


def lost_results(experiment: Experiment, method: str, resume: Path, inputs_sha256: str) -> list[int]:
    """The steps that were evaluated before a checkpoint was saved, but whose results are not on disk."""
    log = read_json(resume / "trainer_state.json")["log_history"]
    evaluated = {(line["step"], key.split("_")[1]) for line in log for key in line if key.endswith("_f1_macro")}
    return sorted(
        {step for step, split in evaluated if not results.kept_result(experiment, f"{method}@{step}", split, inputs_sha256)}
    )


def collect(experiment: Experiment, method: str, inputs_sha256: str) -> tuple[dict, list[Path]]:
    """This training's results by (step, split), and their files; those of an earlier one are deleted."""
    kept, files = {}, []
    for path in experiment.results_folder.glob(f"{method}@*.json"):
        result = read_json(path)
        both = results.result_files(experiment, f"{method}@{result['step']}", result["split"])
        if result["inputs_sha256"] != inputs_sha256:
            for file in both:
                file.unlink(missing_ok=True)
            continue
        kept[result["step"], result["split"]] = result
        files += both
    if not kept:
        raise LetterheadError(f"{experiment.data_folder}: no test rows to evaluate on; set data.rows.test")
    return dict(sorted(kept.items())), files


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0], choices=list(TITLES))
