"""Train BERT, or a linear head on the decoder, on the raw text with HF's Trainer; every evaluation
leaves a result.

`bert_all` is BERT on all of train, where the methods share fewer rows. `sft_options` is the decoder
on the prompt, its head the vocabulary's rows of the option letters: SFT with the loss over the
options alone.

python -m train.heads bert --experiment quick
"""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, atomic_open, read_json
from letterhead.models import checkpoints
from letterhead.pipeline import METHODS, STAGES, arguments_of
from letterhead.runs import results
from letterhead.runs.devices import process_count
from letterhead.runs.processes import guarded, torchrun
from letterhead.runs.stage import StageRun, is_absent, run
from letterhead.runs.terminal import TERMINAL
from train.search import require_validation, search


def main(experiment: Experiment, method: str) -> None:
    trained = METHODS[method]
    if is_absent(STAGES[trained.stage], experiment):
        return
    head = trained.head(experiment)
    stage = StageRun(experiment, STAGES[trained.stage])
    table = experiment.results_folder / f"{method}_checkpoints.md"
    if stage.is_current():
        stage.tell_current()
    else:
        stage.start()
        folder = trained.checkpoints(experiment)
        stage.begin(folder)
        for path in checkpoints.set_aside_broken(folder):
            print(f"{path}: was cut off while it was written; set aside, not used")
        resume = checkpoints.resumable(folder)
        rate, searched = head.learning_rate, None
        key = f"{trained.model}.{trained.settings}"
        if head.patience:
            require_validation(experiment, f"{key}.patience")
        if head.long_texts == "chunks" and process_count() > 1:
            raise LetterheadError(
                f"{key}.long_texts: chunks are trained on in one process; leave NPROC=1"
            )
        if head.search:
            from train.heads_worker import trial_loss

            if process_count() > 1:
                raise LetterheadError(f"{key}.search: its trials run in one process; leave NPROC=1")
            searched = search(
                head.search,
                rate,
                lambda rate, trial: trial_loss(experiment, method, rate, trial),
                stage.folder,
                f"{key}.search",
                experiment,
                stage.inputs_sha256,
            )
            rate = searched.rate
        train(experiment, method, stage.inputs_sha256, resume, rate, stage.lock_descriptor)
        checkpoints.keep_best_and_last(folder)
        gaps = score_again(experiment, method, stage.inputs_sha256)
        kept, files = collect(experiment, method, stage.inputs_sha256)
        with atomic_open(table) as file:
            file.write(results.checkpoint_table(experiment, trained.title, kept, gaps))
        whole = checkpoints.whole_checkpoints(folder)
        checkpoints.note_bases(whole)
        weights = [file for path in whole for file in path.glob("*.safetensors")]
        print(table.read_text(encoding="utf-8"))
        last = kept[max(kept)[0], "test"]
        stage.finish(
            [*files, table, *weights],
            headline=f"macro F1 {last.f1_macro:.3f} on {last.n} test rows at the last "
            f"step, {last.step}",
            rows=len(results.read_rows(experiment, trained.rows)),
            epochs=round(read_json(whole[-1] / "trainer_state.json")["epoch"], 2),
            reading=experiment.reading,
            tokens=None,
            training_seconds=max(result.training_seconds for result in kept.values()),
            scoring_seconds=round(sum(result.seconds for result in kept.values()), 1),
            resumed_from=checkpoints.step_of(resume) if resume else 0,
            search=searched and asdict(searched),
        )


def train(
    experiment: Experiment,
    method: str,
    inputs_sha256: str,
    resume: Path | None,
    rate: float,
    lock: int,
) -> None:
    """Train in this process, or, where NPROC says so, in several that torchrun starts.

    Raises
    ------
    LetterheadError : one of several ended with an error (its own message is on the terminal)
    """
    if (n := process_count()) == 1:
        from train.heads_worker import fit

        fit(experiment, method, inputs_sha256, resume, rate)
        return
    arguments = [*sys.argv[1:], "--inputs", inputs_sha256, "--resume", str(resume or "none")]
    arguments += ["--rate", str(rate)]
    child = subprocess.Popen(
        guarded(torchrun(n, "train.heads_worker", arguments)),
        pass_fds=[lock, *TERMINAL.descriptors],
    )
    try:
        child.wait()
    finally:
        child.terminate()
        child.wait()
    if child.returncode:
        raise LetterheadError(
            f"{method}: a process of the training ended with exit code {child.returncode}; "
            f"see above"
        )


def score_again(experiment: Experiment, method: str, inputs_sha256: str) -> list[int]:
    """Score the checkpoints anew that were evaluated in training and whose results are gone.

    Returns
    -------
    list : the steps whose checkpoints are gone, too; they leave a gap
    """
    folder = METHODS[method].checkpoints(experiment)
    whole = {checkpoints.step_of(path): path for path in checkpoints.whole_checkpoints(folder)}
    gaps = set()
    for step, split in lost_results(experiment, method, max(whole.items())[1], inputs_sha256):
        if step in whole:
            from train.heads_worker import score_checkpoint

            score_checkpoint(experiment, method, whole[step], split, inputs_sha256)
        else:
            print(
                f"{method}: the result of step {step} on {split} rows is gone, and so is its "
                f"checkpoint; a gap is left"
            )
            gaps.add(step)
    return sorted(gaps)


def lost_results(
    experiment: Experiment, method: str, checkpoint: Path, inputs_sha256: str
) -> list[tuple[int, str]]:
    """Step and split of what was evaluated before a checkpoint was saved and is not on disk."""
    log = read_json(checkpoint / "trainer_state.json")["log_history"]
    evaluated = {
        (line["step"], key.split("_")[1])
        for line in log
        for key in line
        if key.endswith("_f1_macro")
    }
    return sorted(
        (step, split)
        for step, split in evaluated
        if not results.kept_result(experiment, f"{method}@{step}", split, inputs_sha256)
    )


def collect(experiment: Experiment, method: str, inputs_sha256: str) -> tuple[dict, list[Path]]:
    """This training's results by (step, split), and their files; those of an earlier one, and what
    is not whole, are deleted."""
    kept, files = {}, []
    for path in experiment.results_folder.glob(f"{method}@*.json"):
        result = results.parse_result(path)
        if result is None:
            continue
        name = f"{method}@{result.step}"
        both = results.result_files(experiment, name, result.split)
        if not results.kept_result(experiment, name, result.split, inputs_sha256):
            for file in both:
                file.unlink(missing_ok=True)
            continue
        kept[result.step, result.split] = result
        files += both
    if not kept:
        raise LetterheadError(
            f"{experiment.data_folder}: no test rows to evaluate on; set data.rows.test"
        )
    return dict(sorted(kept.items())), files


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0], choices=arguments_of("train.heads"))
