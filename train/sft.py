"""Teach the decoder to answer with an option: LLaMA-Factory's `train` on the experiment's YAML,
resumable.

python -m train.sft --experiment quick
"""

import shlex
import subprocess
import time
from pathlib import Path

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, read_json
from letterhead.models import checkpoints
from letterhead.models.llamafactory import command, environment, for_device, sft_plan
from letterhead.pipeline import DISTILL, SFT_TRAINING, record_of
from letterhead.runs.processes import guarded
from letterhead.runs.stage import StageRun, run
from letterhead.runs.terminal import TERMINAL

POLL_S = 2
CLOCK = "clock.json"


def main(experiment: Experiment) -> None:
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
    if not finished(folder):
        train(experiment, arguments, resume, stage.lock_descriptor)
    whole = checkpoints.whole_checkpoints(folder)
    if not whole:
        raise LetterheadError(
            f"{folder}: LLaMA-Factory left no whole checkpoint; set save_strategy and save_steps"
        )
    checkpoints.prune_optimizer_states(folder)
    state = read_json(whole[-1] / "trainer_state.json")
    clock = read_json(experiment.sft_folder / CLOCK)
    stage.finish(
        [
            file
            for path in whole
            for file in (*sorted(path.glob("*.safetensors")), path / "trainer_state.json")
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
    )


def sft_rows(experiment: Experiment) -> int:
    """How many rows SFT learns from: the decoder's training rows, a teacher's, or both, as
    `dataset` says."""
    own = read_json(experiment.data_folder / "data_card.json")["shared"]["rows"]
    names = dataset_names(experiment)
    taught = record_of(DISTILL.name, experiment)["rows"] if "distilled" in names else 0
    return sum(taught if name == "distilled" else own for name in names)


def dataset_names(experiment: Experiment) -> list[str]:
    """What LLaMA-Factory trains on: names in data/EXPERIMENT/dataset_info.json."""
    return experiment.sft_arguments()["dataset"].split(",")


def finished(folder: Path) -> bool:
    """Whether LLaMA-Factory trained to the last step and wrote its closing files."""
    whole = checkpoints.whole_checkpoints(folder)
    state = read_json(whole[-1] / "trainer_state.json") if whole else {}
    closed = [folder / "all_results.json", folder.with_name(CLOCK)]
    return (
        bool(whole)
        and state["global_step"] >= state["max_steps"]
        and None not in map(read_json, closed)
    )


def train(experiment: Experiment, arguments: dict, resume: Path | None, lock: int) -> None:
    """Run LLaMA-Factory to its end, deleting optimizer states that a newer checkpoint makes
    useless.

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
    saves = len(sft_plan(experiment, sft_rows(experiment))[1])
    needed = checkpoints.sft_disk(checkpoints.stored_parameters(experiment.decoder.folder), saves)
    checkpoints.require_disk(Path(arguments["output_dir"]), needed, "SFT")
    more = {}
    if resume:
        print(f"resuming from {resume}")
        more["resume_from_checkpoint"] = str(resume)
    asked = command(experiment, experiment.sft_folder / CLOCK, **more)
    print(shlex.join(asked), flush=True)
    child = subprocess.Popen(
        guarded(asked), env=environment(), pass_fds=[lock, *TERMINAL.descriptors]
    )
    try:
        while child.poll() is None:
            time.sleep(POLL_S)
            checkpoints.prune_optimizer_states(Path(arguments["output_dir"]))
    except BaseException:
        child.terminate()
        child.wait()
        raise
    if child.returncode:
        raise LetterheadError(
            f"LLaMA-Factory ended with exit code {child.returncode}; its message is above"
        )


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
