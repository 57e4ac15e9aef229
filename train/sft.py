"""Teach the decoder to answer with an option: LLaMA-Factory's `train` on the experiment's YAML,
resumable.

python -m train.sft --experiment quick
"""

import shlex
import shutil
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, read_json
from letterhead.models import checkpoints
from letterhead.models.callbacks import DIVERGED, Diverged, has_ended, is_stopped
from letterhead.models.llamafactory import command, environment, for_device, sft_plan, unquantisable
from letterhead.pipeline import DISTILL, SFT_TRAINING, record_of
from letterhead.runs.processes import guarded
from letterhead.runs.stage import StageRun, is_absent, run
from letterhead.runs.terminal import TERMINAL
from train.search import require_validation, search

POLL_S = 2
CLOCK = "clock.json"
HF_RATE = 5e-5  # TrainingArguments' own, where the YAML names none


def main(experiment: Experiment) -> None:
    if is_absent(SFT_TRAINING, experiment):
        return
    arguments, model = experiment.sft_arguments(), experiment.decoder.folder
    stage = StageRun(experiment, SFT_TRAINING)
    if stage.is_current():
        stage.tell_current()
        return
    stage.start()
    checkpoints.require_model(model)
    folder = Path(arguments["output_dir"])
    stage.begin(folder)
    for path in checkpoints.set_aside_broken(folder):
        print(f"{path}: was cut off while it was written; set aside, not used")
    resume = checkpoints.resumable(folder)
    settings, searched = experiment.decoder.sft, None
    if settings.patience:
        require_validation(experiment, "decoder.sft.patience")
    if settings.search:
        searched = search(
            settings.search,
            float(arguments.get("learning_rate", HF_RATE)),
            lambda rate, _: trial_loss(experiment, rate, stage),
            stage.folder,
            "decoder.sft.search",
            experiment,
            stage.inputs_sha256,
        )
    if not finished(folder, settings.patience):
        train(experiment, arguments, resume, searched and searched.rate, stage.lock_descriptor)
    whole = checkpoints.whole_checkpoints(folder)
    if not whole:
        raise LetterheadError(
            f"{folder}: LLaMA-Factory left no whole checkpoint; set save_strategy and save_steps"
        )
    checkpoints.prune_optimizer_states(folder)
    checkpoints.note_bases(whole)
    state = read_json(whole[-1] / "trainer_state.json")
    clock = read_json(experiment.sft_folder / CLOCK)
    stage.finish(
        [
            file
            for path in whole
            for file in (
                *sorted(path.glob("*.safetensors")),
                *path.glob(checkpoints.ADAPTER),
                path / "trainer_state.json",
            )
        ],
        headline=f"checkpoints at steps "
        f"{', '.join(str(checkpoints.step_of(path)) for path in whole)}",
        rows=sft_rows(experiment),
        tokens=state.get("num_input_tokens_seen"),
        steps=state["global_step"],
        training_seconds=clock["training_seconds"][str(state["global_step"])],
        dtype="bfloat16 by autocast"
        if (for_device(experiment) | arguments).get("bf16")
        else "float32",
        peak_gpu_memory_mb=clock["peak_gpu_memory_mb"],
        reading=experiment.reading,
        resumed_from=checkpoints.step_of(resume) if resume else 0,
        search=searched and asdict(searched),
    )


def sft_rows(experiment: Experiment) -> int:
    """How many rows SFT learns from: the decoder's training rows, a teacher's, or both, as
    `dataset` says."""
    own = read_json(experiment.data_folder / "data_card.json")["shared"]["sft_rows"]
    names = dataset_names(experiment)
    taught = record_of(DISTILL.name, experiment)["rows"] if "distilled" in names else 0
    return sum(taught if name == "distilled" else own for name in names)


def dataset_names(experiment: Experiment) -> list[str]:
    """What LLaMA-Factory trains on: names in data/EXPERIMENT/dataset_info.json."""
    return experiment.sft_arguments()["dataset"].split(",")


def finished(folder: Path, patience: int | None) -> bool:
    """Whether LLaMA-Factory trained to the end and wrote its closing files."""
    whole = checkpoints.whole_checkpoints(folder)
    state = read_json(whole[-1] / "trainer_state.json") if whole else {}
    closed = [folder.with_name(CLOCK)]
    # A training that stopped early and was killed before LLaMA-Factory's closing files would, begun
    # again, train on.
    closed += [] if is_stopped(state, patience) else [folder / "all_results.json"]
    return bool(whole) and has_ended(state, patience) and None not in map(read_json, closed)


def train(
    experiment: Experiment, arguments: dict, resume: Path | None, rate: float | None, lock: int
) -> None:
    """Run LLaMA-Factory to its end, deleting optimizer states that a newer checkpoint makes
    useless.

    Parameters
    ----------
    rate : a learning rate in place of the YAML's, or None

    Raises
    ------
    LetterheadError : it ended with an error (its own message is on the terminal)
    """
    import torch

    if arguments.get("bf16") and not arguments.get("use_cpu") and not torch.cuda.is_available():
        raise LetterheadError(
            f"{experiment.decoder.sft.config}: bf16 needs a GPU, and none is here; run it "
            f"on one, or (slow) add "
            'SET="decoder.sft.overrides.use_cpu=true decoder.sft.overrides.bf16=false"'
        )
    if refused := unquantisable(experiment):
        raise LetterheadError(refused)
    saves = len(sft_plan(experiment, sft_rows(experiment))[1])
    needed = checkpoints.sft_disk(trained_parameters(experiment), saves)
    checkpoints.require_disk(Path(arguments["output_dir"]), needed, "SFT")
    more: dict[str, Any] = {} if rate is None else {"learning_rate": rate}
    if resume:
        print(f"resuming from {resume}")
        more["resume_from_checkpoint"] = str(resume)
    run_llamafactory(experiment, experiment.sft_folder / CLOCK, lock, more)


def trained_parameters(experiment: Experiment) -> int:
    """How many parameters SFT writes: the model's, or its adapter's."""
    folder = experiment.decoder.folder
    if experiment.decoder.sft.lora is None:
        return checkpoints.stored_parameters(folder)
    from letterhead.models.adapters import adapter_parameters

    return adapter_parameters(folder, experiment.decoder.sft.lora)


def run_llamafactory(experiment: Experiment, clock: Path, lock: int, more: dict[str, Any]) -> None:
    """Run it with `more` arguments.

    Raises
    ------
    LetterheadError : it ended with an error
    """
    from letterhead.plan.memory import for_memory

    asked = command(experiment, clock, **for_memory(experiment) | more)
    print(shlex.join(asked), flush=True)
    child = subprocess.Popen(
        guarded(asked), env=environment(), pass_fds=[lock, *TERMINAL.descriptors]
    )
    folder = Path(more.get("output_dir", experiment.sft_arguments()["output_dir"]))
    try:
        while child.poll() is None:
            time.sleep(POLL_S)
            checkpoints.prune_optimizer_states(folder)
    except BaseException:
        child.terminate()
        child.wait()
        raise
    if child.returncode == DIVERGED:
        raise Diverged("LLaMA-Factory's training diverged; its message is above")
    if child.returncode:
        raise LetterheadError(
            f"LLaMA-Factory ended with exit code {child.returncode}; its message is above"
        )


def trial_loss(experiment: Experiment, rate: float, stage: StageRun) -> float:
    """Train at a rate and keep nothing of it; the lowest loss on validation rows, in nats a
    token of the answer.

    Raises
    ------
    LetterheadError : it diverged
    """
    folder = stage.folder / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    stored = checkpoints.FLOAT * trained_parameters(experiment)
    checkpoints.require_disk(folder, stored, "a trial of SFT")
    more = experiment.sft_validated() | {
        "output_dir": str(folder),
        "learning_rate": rate,
        "save_strategy": "no",
        "plot_loss": False,
        "report_to": "none",
    }
    try:
        run_llamafactory(experiment, folder / CLOCK, stage.lock_descriptor, more)
        log = read_json(folder / "trainer_state.json")["log_history"]
        losses = [line["eval_loss"] for line in log if "eval_loss" in line]
        if not losses:
            raise LetterheadError(
                "decoder.sft.search: no validation loss was logged; lower save_steps"
            )
        return min(losses)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
