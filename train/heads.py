"""Train BERT, or a linear head on the decoder, on the raw text with HF's Trainer; every evaluation leaves a result.

`bert_all` is BERT on all of train, where the methods share fewer rows. `sft_options` is the decoder on the prompt, its head
the vocabulary's rows of the option letters: SFT with the loss over the options alone.

python -m train.heads bert --experiment quick
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from letterhead.config.experiment import Experiment
from letterhead.config.models import Decoder, Encoder, Head
from letterhead.files import LetterheadError, atomic_open, read_json
from letterhead.models import checkpoints
from letterhead.models.prompt import prompt_inputs
from letterhead.runs import results
from letterhead.runs.devices import process_count
from letterhead.runs.processes import guarded, torchrun
from letterhead.runs.stage import OFFLINE, Stage, run, stage_outputs
from letterhead.stats.metrics import FIGURES


class Trained(NamedTuple):
    """A method: the section and key of the experiment that hold its settings, the rows that it is trained on, its title."""

    section: str
    key: str
    rows: str
    title: str

    def model(self, experiment: Experiment) -> Encoder | Decoder:
        """The section of the model that is trained."""
        return getattr(experiment, self.section)

    def head(self, experiment: Experiment) -> Head | None:
        """How it is trained, or None where the experiment leaves it out."""
        return getattr(self.model(experiment), self.key)


METHODS = {
    "bert": Trained("encoder", "head", "decoder_train", "BERT with a linear head"),
    "bert_all": Trained("encoder", "head", "train", "BERT with a linear head, all of train"),
    "linear_head": Trained("decoder", "head", "decoder_train", "linear head on the decoder"),
    "sft_options": Trained("decoder", "sft_options", "decoder_train", "decoder, loss over the options alone"),
}


def main(experiment: Experiment, method: str) -> None:
    os.environ.update(OFFLINE)
    if method == "bert_all" and not results.has_more_rows(experiment):
        print("every method is trained on all of train already")
        return
    trained = METHODS[method]
    if (head := trained.head(experiment)) is None:
        print(f"decoder.{trained.key} is not set: not trained")
        return
    data = stage_outputs(experiment, "data")
    files = [experiment.data_folder / f"{name}.jsonl" for name in (trained.rows, *results.SPLITS)]
    inputs = {
        "head": head.model_dump(),
        "labels": experiment.labels,
        "seed": experiment.seed,
        "figures": FIGURES,
        "rows": [data[str(file)] for file in files],
        "model": checkpoints.model_identity(trained.model(experiment).folder),
    }
    if method == "sft_options":
        inputs |= prompt_inputs(experiment)
    stage = Stage(experiment, method.replace("_", "-"), inputs)
    table = experiment.results_folder / f"{method}_checkpoints.md"
    if not stage.is_current():
        folder = checkpoint_folder(experiment, method)
        stage.begin(folder)
        for path in checkpoints.set_aside_broken(folder):
            print(f"{path}: was cut off while it was written; set aside, not used")
        resume = checkpoints.resumable(folder)
        if resume and (lost := lost_results(experiment, method, resume, stage.inputs_sha256)):
            print(f"results of steps {lost} are gone, and only training makes them; it begins anew")
            shutil.rmtree(folder)
            resume = None
        train(experiment, method, stage.inputs_sha256, resume, stage.lock_descriptor)
        checkpoints.keep_best_and_last(folder)
        kept, made = collect(experiment, method, stage.inputs_sha256)
        with atomic_open(table) as file:
            file.write(results.checkpoint_table(experiment, trained.title, kept, []))
        weights = [file for path in checkpoints.whole_checkpoints(folder) for file in path.glob("*.safetensors")]
        rows = len(results.read_rows(experiment, trained.rows))
        stage.finish(
            [*made, table, *weights],
            rows=rows,
            epochs=head.on(rows).num_train_epochs,
            reading=experiment.reading,
            tokens=None,
            training_seconds=max(result["training_seconds"] for result in kept.values()),
            scoring_seconds=round(sum(result["seconds"] for result in kept.values()), 1),
            resumed_from=checkpoints.step_of(resume) if resume else 0,
        )
    print(table.read_text(encoding="utf-8"))


def train(experiment: Experiment, method: str, inputs_sha256: str, resume: Path | None, lock: int) -> None:
    """Train in this process, or, where NPROC says so, in several that torchrun starts.

    Raises
    ------
    LetterheadError : one of several ended with an error (its own message is on the terminal)
    """
    if (n := process_count()) == 1:
        from train.heads_worker import fit

        return fit(experiment, method, inputs_sha256, resume)
    given = [*sys.argv[1:], "--inputs", inputs_sha256, "--resume", str(resume or "none")]
    child = subprocess.Popen(guarded(torchrun(n, "train.heads_worker", given)), pass_fds=[lock])
    try:
        child.wait()
    finally:
        child.terminate()
        child.wait()
    if child.returncode:
        raise LetterheadError(f"{method}: a process of the training ended with exit code {child.returncode}; see above")


def checkpoint_folder(experiment: Experiment, method: str) -> Path:
    """Where a method's checkpoints lie."""
    return experiment.run_folder / method.replace("_", "-") / "checkpoints"


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
    run(main, __doc__.splitlines()[0], choices=list(METHODS))
