"""Score step 0 and every SFT checkpoint by per-option perplexity; results, predictions, a table and
two pictures.

python -m eval.checkpoints --experiment quick
"""

from pathlib import Path

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, atomic_open, read_json
from letterhead.models import checkpoints
from letterhead.models.callbacks import has_ended
from letterhead.pipeline import DATA, EVAL_CKPTS, SFT, SFT_TRAINING, outputs
from letterhead.runs import results
from letterhead.runs.stage import StageRun, is_absent, run


def main(experiment: Experiment) -> None:
    if is_absent(EVAL_CKPTS, experiment):
        return
    stage_files = outputs(SFT_TRAINING, experiment) | outputs(DATA, experiment)
    stage = StageRun(experiment, EVAL_CKPTS)
    table = experiment.results_folder / "sft_checkpoints.md"
    if stage.is_current():
        stage.tell_current()
    else:
        stage.start()
        folder = Path(experiment.sft_arguments()["output_dir"])
        trained = {
            checkpoints.step_of(path): path for path in checkpoints.whole_checkpoints(folder)
        }
        if not trained:
            raise LetterheadError(
                f"{folder}: no whole checkpoint to score; run: make sft EXP={experiment.name}"
            )
        log = checkpoints.log_history(folder)
        untrained = {0: experiment.decoder.folder} if experiment.eval.untrained else {}
        scored, files = score_all(experiment, untrained | trained, stage_files, log)
        pictures = draw(experiment, scored, log)
        by_steps = experiment.sft_arguments().get("save_strategy", "steps") == "steps"
        with atomic_open(table) as file:
            patience = experiment.decoder.sft.patience
            expected = expected_steps(folder, patience) if by_steps else []
            expected = expected[not experiment.eval.untrained :]
            file.write(results.checkpoint_table(experiment, "SFT checkpoints", scored, expected))
        print(table.read_text(encoding="utf-8"))
        last = scored[max(trained), "test"]
        stage.finish(
            [*files, table, *pictures],
            headline=f"macro F1 {last.f1_macro:.3f} on {last.n} test rows at the last "
            f"step, {last.step}; {table}",
            rows=sum(result.n for result in scored.values()),
            tokens=sum(result.tokens for result in scored.values()),
            # Step 0 is the zero-shot row's.
            scoring_seconds=round(
                sum(result.seconds for (step, _), result in scored.items() if step), 1
            ),
        )


def score_all(
    experiment: Experiment, models: dict[int, Path], stage_files: dict[str, str], log: list[dict]
):
    """Score each model on each split, skipping what is scored already; results of other steps are
    deleted.

    Returns
    -------
    dict : (step, split) → result; list : the files that hold results and predictions
    """
    from eval.score import score_model, split_prompts
    from letterhead.models.scoring import forget_base

    scored, files = {}, []
    encoder, prompts = split_prompts(experiment)
    for step, folder in sorted(models.items()):
        losses = [entry["loss"] for entry in log if "loss" in entry and entry["step"] <= step]
        last = losses[-1] if losses else None
        for split, result in score_model(
            experiment, step, folder, stage_files, encoder, prompts, last
        ).items():
            scored[step, split] = result
            files += results.result_files(experiment, f"{SFT.name}@{step}", split)
    forget_base()
    for path in experiment.results_folder.glob(f"{SFT.name}@*"):
        if path not in files:  # of an earlier training, which had other steps
            path.unlink()
    return scored, files


def expected_steps(folder: Path, patience: int | None) -> list[int]:
    """The steps at which the Trainer saves, from its own state, and step 0."""
    state = read_json(checkpoints.whole_checkpoints(folder)[-1] / "trainer_state.json")
    end = state["global_step"] if has_ended(state, patience) else state["max_steps"]
    return sorted({*range(0, end + 1, state["save_steps"]), end})


def draw(experiment: Experiment, scored: dict, log: list[dict]) -> list[Path]:
    """Pictures of macro F1 and of the losses against step; returns their paths."""
    from letterhead.stats.figures import plot_against_step

    f1, loss = experiment.results_folder / "sft_f1.png", experiment.results_folder / "sft_loss.png"
    lines = {}
    for (step, split), result in scored.items():
        steps, values = lines.setdefault(split, ([], []))
        steps.append(step)
        values.append(result.f1_macro)
    plot_against_step(f1, f"{experiment.name}: SFT, the likeliest option", "macro F1", lines)
    trained = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    own = [(step, result.eval_loss) for (step, split), result in scored.items() if split == "test"]
    lines = {
        "training loss (all answer tokens)": (
            [step for step, _ in trained],
            [value for _, value in trained],
        ),
        "the option's own loss (test)": ([step for step, _ in own], [value for _, value in own]),
    }
    plot_against_step(
        loss, f"{experiment.name}: SFT loss", "cross-entropy a token, nats", lines, log=True
    )
    return [f1, loss]


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
