"""Score step 0 and every SFT checkpoint by per-option perplexity; results, predictions, a table and two pictures.

python -m eval.checkpoints --experiment quick
"""

import os
import time
from pathlib import Path

from letterhead import checkpoints
from letterhead.experiment import Experiment
from letterhead.records import (
    LetterheadError,
    atomic_open,
    read_json,
    read_jsonl,
    sha256_file,
    sha256_json,
    versions,
    write_json,
    write_jsonl,
)
from letterhead.stage import OFFLINE, Stage, run, stage_outputs

SPLITS = ("test", "validation")


def main(experiment: Experiment) -> None:
    os.environ.update(OFFLINE)
    made = stage_outputs(experiment, "sft") | stage_outputs(experiment, "data")
    stage = Stage(experiment, "eval-ckpts", {"made": made, **scoring_inputs(experiment)})
    table = experiment.results_folder / "sft_checkpoints.md"
    if not stage.is_current():
        folder = Path(experiment.sft_arguments()["output_dir"])
        trained = {checkpoints.step_of(path): path for path in checkpoints.whole_checkpoints(folder)}
        if not trained:
            raise LetterheadError(f"{folder}: no whole checkpoint to score; run: make sft EXP={experiment.name}")
        log = checkpoints.log_history(folder)
        results, files = score_all(experiment, {0: experiment.decoder.folder} | trained, made, log)
        pictures = draw(experiment, results, log)
        with atomic_open(table) as file:
            by_steps = experiment.sft_arguments().get("save_strategy", "steps") == "steps"
            file.write(render_table(experiment, results, expected_steps(folder) if by_steps else []))
        rows = sum(result["n"] for result in results.values())
        seconds = sum(result["seconds"] for result in results.values())
        tokens = sum(result["tokens"] for result in results.values())
        device = next(iter(results.values()))["device"]
        figures = {"rows": rows, "tokens": tokens, "scoring_seconds": round(seconds, 1), "device": device}
        stage.finish([*files, table, *pictures], **figures)
    print(table.read_text(encoding="utf-8"))
    print(f"{table} and sft_f1.png, sft_loss.png beside it")


def scoring_inputs(experiment: Experiment) -> dict:
    """The configuration that decides a score; how rows are batched does not."""
    arguments = experiment.sft_arguments()
    return {
        "prompt": experiment.prompt.model_dump(),
        "labels": experiment.labels,
        "score": experiment.eval.score,
        "dtype": experiment.decoder.dtype,
        "template": {key: arguments.get(key) for key in ("template", "cutoff_len", "enable_thinking", "default_system")},
    }


def result_paths(experiment: Experiment, step: int, split: str) -> tuple[Path, Path]:
    """The files of a checkpoint's result and of its predictions."""
    name = f"sft@{step}" + ("" if split == "test" else f".{split}")
    return experiment.results_folder / f"{name}.json", experiment.results_folder / f"{name}.predictions.jsonl"


def score_all(experiment: Experiment, models: dict[int, Path], made: dict[str, str], log: list[dict]):
    """Score each model on each split, skipping what is scored already from the same inputs.

    Returns
    -------
    dict : (step, split) → result; list : the files that hold results and predictions
    """
    results, files, encoder, prompts = {}, [], None, {}
    for step, model_folder in sorted(models.items()):
        checkpoints.require_model(model_folder)
        weights = {p.name: made.get(str(p)) or sha256_file(p) for p in sorted(model_folder.glob("*.safetensors"))}
        model = None
        for split in SPLITS:
            rows_file = experiment.data_folder / f"{split}.jsonl"
            if rows_file.stat().st_size == 0:
                continue
            result_file, predictions_file = result_paths(experiment, step, split)
            files += [result_file, predictions_file]
            inputs = sha256_json({"weights": weights, "rows": made[str(rows_file)], **scoring_inputs(experiment)})
            kept = read_json(result_file)
            if kept and kept["inputs_sha256"] == inputs and predictions_file.exists():
                results[step, split] = kept
                continue
            from letterhead.prompt import load_prompt_encoder
            from letterhead.scoring import load_decoder

            encoder = encoder or load_prompt_encoder(experiment)
            if split not in prompts:
                rows = list(read_jsonl(rows_file))
                prompts[split] = (rows, [encoder.encode(row["text"]) for row in rows])
            model = model or load_decoder(model_folder, experiment.decoder.dtype)
            result, predictions = score_split(experiment, model, encoder, *prompts[split], f"step {step}, {split}")
            losses = [entry["loss"] for entry in log if "loss" in entry and entry["step"] <= step]
            result |= {"step": step, "split": split, "train_loss": losses[-1] if losses else None}
            result |= {"model": str(model_folder), "inputs_sha256": inputs}
            write_jsonl(predictions_file, predictions)
            write_json(result_file, result)  # last: it says that the predictions are whole
            results[step, split] = result
    for path in experiment.results_folder.glob("sft@*"):
        if path not in files:  # of an earlier training, which had other steps
            path.unlink()
    return results, files


def score_split(experiment: Experiment, model, encoder, rows: list[dict], prompts: list, title: str):
    """Score one model on the rows of one split; returns the result file's figures and the predictions' lines."""
    import numpy as np
    import torch

    from letterhead.metrics import classification_figures
    from letterhead.scoring import score_options

    labels = experiment.labels
    truth = np.array([labels.index(row["label"]) for row in rows])
    start = time.perf_counter()
    with_end = experiment.prompt.options == "names"
    scores = score_options(model, prompts, encoder.answers, with_end, experiment.eval.batch_tokens, progress=title)
    seconds = time.perf_counter() - start
    probabilities, perplexity = scores.probabilities(experiment.eval.score), scores.perplexity
    own = scores.log_likelihood[np.arange(len(rows)), truth] / scores.token_count[truth]
    result = {
        "experiment": experiment.name,
        "method": "sft",
        "seed": experiment.seed,
        **classification_figures(truth, probabilities, labels, experiment.seed),
        "eval_loss": float(-own.mean()),
        "seconds": round(seconds, 3),
        "rows_per_second": round(len(rows) / seconds, 3),
        "tokens": scores.tokens,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": versions(),
    }
    predictions = [
        {
            "id": row["id"],
            "label": row["label"],
            "prediction": labels[int(p.argmax())],
            "probabilities": dict(zip(labels, p.tolist(), strict=True)),
            "perplexity": dict(zip(labels, ppl.tolist(), strict=True)),
        }
        for row, p, ppl in zip(rows, probabilities, perplexity, strict=True)
    ]
    return result, predictions


def expected_steps(folder: Path) -> list[int]:
    """The steps at which the Trainer saves, from its own state."""
    state = read_json(checkpoints.whole_checkpoints(folder)[-1] / "trainer_state.json")
    return sorted({*range(state["save_steps"], state["max_steps"] + 1, state["save_steps"]), state["max_steps"]})


def draw(experiment: Experiment, results: dict, log: list[dict]) -> list[Path]:
    """Pictures of macro F1 and of the losses against step; returns their paths."""
    from letterhead.figures import plot_against_step

    f1, loss = experiment.results_folder / "sft_f1.png", experiment.results_folder / "sft_loss.png"
    lines = {}
    for (step, split), result in results.items():
        steps, values = lines.setdefault(split, ([], []))
        steps.append(step)
        values.append(result["f1_macro"])
    plot_against_step(f1, f"{experiment.name}: SFT, option with the lowest perplexity", "macro F1", lines)
    trained = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    own = [(step, result["eval_loss"]) for (step, split), result in results.items() if split == "test"]
    lines = {
        "training loss (all answer tokens)": ([step for step, _ in trained], [value for _, value in trained]),
        "the option's own loss (test)": ([step for step, _ in own], [value for _, value in own]),
    }
    plot_against_step(loss, f"{experiment.name}: SFT loss", "cross-entropy a token, nats", lines, log=True)
    return [f1, loss]


def render_table(experiment: Experiment, results: dict, expected: list[int]) -> str:
    """The article's table in Markdown: one line a checkpoint, figures on test rows, validation F1 beside them."""
    test = {step: result for (step, split), result in results.items() if split == "test"}
    validation = {step: result for (step, split), result in results.items() if split == "validation"}
    if not test:
        raise LetterheadError(f"{experiment.data_folder / 'test.jsonl'}: no test rows; set data.rows.test")
    lines = [
        f"# {experiment.name}: SFT checkpoints, {next(iter(test.values()))['n']} test rows\n",
        "| Step | Training loss | Option's own loss | Accuracy | Precision | Recall | F1 | 95 % interval | F1 validation |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | :---: | ---: |",
    ]
    for step in sorted({0, *expected} | set(test)):
        if step not in test:
            lines.append(f"| {step} | not scored: no whole checkpoint | | | | | | | |")
            continue
        result = test[step]
        trained = "not trained" if result["train_loss"] is None else f"{result['train_loss']:.4f}"
        low, high = result["f1_macro_ci95"]
        chosen = f"{validation[step]['f1_macro']:.4f}" if step in validation else "no rows"
        figures = [result[key] for key in ("eval_loss", "accuracy", "precision_macro", "recall_macro", "f1_macro")]
        numbers = " | ".join(f"{value:.4f}" for value in figures)
        lines.append(f"| {step} | {trained} | {numbers} | {low:.3f} to {high:.3f} | {chosen} |")
    best = max(test, key=lambda step: test[step]["f1_macro"])
    lines.append(f"\nBest on test (the article's choice): step {best}, F1 {test[best]['f1_macro']:.4f}.")
    if validation:
        step = max(validation, key=lambda s: (validation[s]["f1_macro"], -s))
        lines.append(f"Chosen on validation: step {step}, F1 {test[step]['f1_macro']:.4f} on test (the honest figure).")
    else:
        lines.append("No validation rows (data.rows.validation is 0): no checkpoint can be chosen without looking at test.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
